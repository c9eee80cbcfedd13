"""Prompt templates: Jinja files in a sandbox, each with the hash of its text.

prompts = load_prompts(Path("generation/prompts/self_instruct"), {"classify": ("instruction",)})
prompts["classify"].render(instruction="Sort the words.")
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from cluster.errors import InputError

SHOWN = ("instruction", "output", "first", "second", "demonstrations")  # variables that a template may not leave out


@dataclass(frozen=True)
class Prompt:
    """One template.

    `name`: folder/file without the suffix. `sha`: the first 16 hex digits of the SHA-256 of the file's text.
    """

    name: str
    sha: str
    path: Path
    template: jinja2.Template
    variables: frozenset[str] = frozenset()  # what it gets
    uses: frozenset[str] = frozenset()  # what it reads of these

    def render(self, **variables: object) -> str:
        """Fill in the template. Raises InputError if the template needs a value or operation that it does not get."""
        try:
            return self.template.render(**variables)
        except (jinja2.UndefinedError, SecurityError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{self.path}: the template cannot be rendered: {error}. Fix it.") from error


def load_prompts(folder: Path, variables: Mapping[str, tuple[str, ...]]) -> dict[str, Prompt]:
    """Load templates from a folder. `variables`: for each template's name the variables that it gets.

    Raises InputError for a missing file, a syntax error (with its line), a variable that the template does not get, or
    one that it has to show and does not read.
    """
    # A block on a line of its own leaves no blank line. The last line break of a file is not part of the prompt.
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.clear()
    return {name: _load(folder / f"{name}.jinja", environment, known) for name, known in variables.items()}


def _load(path: Path, environment: jinja2.Environment, known: tuple[str, ...]) -> Prompt:
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in path.parent.glob("*.jinja"))) or "no .jinja file"
        raise InputError(
            f"{path}: no such prompt. `synthesize.prompts` must be a folder that contains it. The folder has {found}."
        )
    text = path.read_text(encoding="utf-8")
    try:
        read = meta.find_undeclared_variables(environment.parse(text))
        template = environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: {error.message}. Fix the template.") from error
    if unknown := read - set(known):
        raise InputError(f"{path}: uses {', '.join(sorted(unknown))}, but the template gets only {', '.join(known)}.")
    missing = [name for name in known if name in SHOWN and name not in read]
    if missing and not (missing == ["instruction"] and "input" in read):  # an input can be the whole prompt
        raise InputError(
            f"{path}: does not use {', '.join(missing)}, so its prompts are the same for different values. Put "
            f"{' and '.join('{{ ' + name + ' }}' for name in missing)} into it."
        )
    sha = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Prompt(f"{path.parent.name}/{path.stem}", sha, path, template, frozenset(known), read & set(known))
