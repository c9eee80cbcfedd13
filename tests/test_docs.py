"""What documents, scripts, recipes and messages name exists: files, modules, commands, options, targets, recipe keys.

Three kinds of text are read. Prose is all of a document. Code is what a document has in backticks and code blocks.
Messages are the comments and strings of the four packages, of scripts and of recipes.
"""

import importlib.util
import io
import re
import shlex
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from docs.generate_reference import PAGE, render
from launcher.cli import app
from launcher.recipe import Recipe, load

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "generation", "trainer", "launcher")
FOLDERS = (*PACKAGES, "toy_world", "english", "tests", "docs", "recipes", "slurm", "models")
SUFFIXES = ("py", "sbatch", "yaml", "md", "jinja", "svg")
OTHER_FILES = {
    *("recipe.yaml", "script.py"),  # in a run folder, and a user's
    # Files of the papers' published code, which constants are taken from.
    *("bootstrap_instructions.py", "gen_ins.py", "gen_res.py", "generate_instruction.py", "identify_clf_or_not.py"),
    *("openai_access.py", "prepare_for_finetuning.py", "wizardlm.py"),
}

PATH = re.compile(rf"(?<![\w./<>{{}}*$-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
FILE_NAME = re.compile(rf"(?<![\w./<>{{}}*$-])[\w-]+\.(?:{'|'.join(SUFFIXES)})(?!\.?\w)")
MODULE = re.compile(rf"(?<![\w./-])(?:{'|'.join((*PACKAGES, 'toy_world', 'english', 'tests'))})(?:\.\w+)+(?::\w+)?")
KEY = re.compile(r"(?<![\w./-])(?:model|engine|synthesize|train|export|evaluate|slurm)(?:\.[a-z]\w*)+")
COMMAND = re.compile(r"(?<![\w/-])tunesmith (?P<verbs>[a-z]+(?: ?\| ?[a-z]+(?: -\w)*)*)(?P<rest>[^`#\n]*)")
MODULE_RUN = re.compile(r"python3? (?:-\w )*-m (?P<module>[\w.]+)(?P<rest>[^`#\n]*)")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
TARGET = re.compile(r"(?<![\w-])make (?:[A-Z]+=\S+ )*(?P<target>[a-z][\w-]*)")
COMMAND_LINE = re.compile(r"^\$ (.+)$", flags=re.MULTILINE)
SETTING = re.compile(r"^(?P<key>[a-z]\w*(?:\.[a-z]\w*)*)(?:=|: ).+$")


@cache
def tracked(*patterns: str) -> tuple[Path, ...]:
    """Files under version control, new ones among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs git and a clone: {error}", allow_module_level=True)
    names = listed.stdout.split()
    return tuple(ROOT / name for name in names if (ROOT / name).is_file())


DOCUMENTS = tracked("*.md")
MESSAGES = tracked(*(f"{package}/**.py" for package in PACKAGES), "slurm/*", "recipes/**.yaml", "Makefile")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(document: str) -> list[str]:
    """Code blocks, fenced or indented, and what is in backticks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", document, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", document, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(?![-*]).+$", rest, flags=re.MULTILINE)
    return [*fenced, *indented, *(code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", rest))]


def messages_of(path: Path) -> str:
    """Comments and strings of a Python file, without what f-strings compute; other files whole."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = (tokenize.STRING, tokenize.COMMENT)
    return "\n".join(re.sub(r"\{[^{}]*\}", "{}", token.string) for token in tokens if token.type in kinds)


def unknown_paths(text: str, near: Path = ROOT) -> Iterator[str]:
    for found in PATH.findall(text):
        place = found.rstrip("./-")
        if "*" in place:
            if not any(ROOT.glob(place)):
                yield found
        elif not (ROOT / place).exists() and not (near / place).exists():
            yield found
    names = {path.name for path in tracked()} | OTHER_FILES
    yield from (name for name in FILE_NAME.findall(text) if name not in names)


def unknown_modules(text: str) -> Iterator[str]:
    for found in MODULE.findall(text):
        if found.rpartition(".")[2] not in SUFFIXES and not is_defined(found):
            yield found


def is_defined(name: str) -> bool:
    """Whether a dotted name is a module of ours, or something that is defined in one."""
    parts = re.split(r"[.:]", name)
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.is_file():
            defined = rf"^(?:class |def |async def )?{parts[end]}\b" if end < len(parts) else ""
            return bool(re.search(defined, file.read_text(), flags=re.MULTILINE))
    return False


@cache
def commands() -> dict[str, set[str]]:
    """Command -> its options."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        for inner in [command, *getattr(command, "commands", {}).values()]:
            found.setdefault(name, {"--help"}).update(*(option.opts for option in inner.params))
    return found


def unknown_commands(text: str) -> Iterator[str]:
    for match in COMMAND.finditer(text):
        verbs = re.findall(r"(?<!-)\b[a-z]+", match["verbs"])
        options = {option for verb in verbs for option in commands().get(verb, ())}
        if not set(verbs) <= commands().keys() or not set(OPTION.findall(match["rest"])) <= options:
            yield match[0]
    for match in MODULE_RUN.finditer(text):
        module = match["module"]
        if module.split(".")[0] in (*PACKAGES, "tests", "toy_world", "english", "docs"):
            spec = importlib.util.find_spec(module)
            source = Path(spec.origin).read_text() if spec and spec.origin else ""
            if not source or any(f'"{option}"' not in source for option in re.findall(r"--[a-z][\w-]*", match["rest"])):
                yield match[0]


@cache
def targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def unknown_targets(text: str) -> Iterator[str]:
    yield from (match[0] for match in TARGET.finditer(text) if match["target"] not in targets())


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """All config models of a field, whether optional, in a list, or one of several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, tuple, list, dict):
        return [model for each in get_args(annotation) for model in models_in(each)]
    return []


def is_key(path: list[str], models: list[type[BaseModel]]) -> bool:
    """Whether some model has this chain of keys. Below a list the keys are those of its entries."""
    fields = [model.model_fields[path[0]] for model in models if path[0] in model.model_fields]
    if not fields:
        return False
    return len(path) == 1 or is_key(path[1:], [model for field in fields for model in models_in(field.annotation)])


@cache
def all_keys() -> frozenset[str]:
    """Every dotted key, from the recipe's root."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield prefix + name
            for inner in models_in(field.annotation):
                yield from walk(inner, f"{prefix}{name}.")

    return frozenset(walk(Recipe, ""))


def unknown_keys(text: str) -> Iterator[str]:
    for found in KEY.findall(text):
        if found.rpartition(".")[2] not in (*SUFFIXES, "safetensors", "json", "log") and not is_key(
            found.split("."), [Recipe]
        ):
            yield found


def unknown_settings(code: str) -> Iterator[str]:
    """`key: value` and `key=value` in backticks, where `key` may be the end of a longer one."""
    match = SETTING.match(code)
    if match and match["key"] != "key.sub" and not any(f".{key}".endswith(f".{match['key']}") for key in all_keys()):
        yield code


def unknown_yaml_keys(code: str) -> Iterator[str]:
    """A part of a recipe in a document, from its root."""
    try:
        content = yaml.safe_load(code)
    except yaml.YAMLError:
        return
    if isinstance(content, dict) and set(content) <= set(Recipe.model_fields):
        yield from (path for path in paths_of(content) if not is_key(path.split("."), [Recipe]))


def paths_of(content: dict, prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        yield prefix + key
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict) and key not in ("columns", "sweep", "chat_template_kwargs"):
                yield from paths_of(inner, f"{prefix}{key}.")


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    unknown = [*unknown_paths(text, document.parent), *unknown_modules(text)]
    for code in code_of(text) if document != PAGE else ():  # made of messages, which are checked where they are
        unknown += [*unknown_commands(code), *unknown_targets(code), *unknown_keys(code)]
        unknown += [*unknown_settings(code), *unknown_yaml_keys(code)]
    assert not unknown


@pytest.mark.parametrize("source", MESSAGES, ids=named)
def test_what_a_comment_or_message_names_exists(source: Path) -> None:
    text = messages_of(source)
    commands_in_code = [*re.findall(r"`([^`]+)`", text), *re.findall(r"tunesmith \w+ (?:RECIPE|RUN|recipes/).*", text)]
    unknown = [*unknown_paths(text, source.parent), *unknown_modules(text), *unknown_keys(text)]
    for code in commands_in_code:
        unknown += [*unknown_commands(code), *unknown_targets(code)]
    assert not unknown


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_a_link_leads_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = target.partition("#")
        place = (document.parent / path).resolve() if path else document
        if "://" not in target and (not place.exists() or (anchor and anchor not in anchors(place))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("command", sorted({c for d in DOCUMENTS for c in COMMAND_LINE.findall(d.read_text())}))
def test_a_command_in_a_document_has_a_recipe_that_is_valid(command: str) -> None:
    arguments = shlex.split(command)
    for number, argument in enumerate(arguments):
        if argument.endswith(".yaml"):
            load(ROOT / argument, [value for value in arguments[number + 1 :] if "=" in value and value[0] != "-"])


def test_the_readme_has_no_long_table_cell() -> None:
    cells = [
        cell for line in (ROOT / "README.md").read_text().splitlines() if line[:1] == "|" for cell in line.split("|")
    ]
    assert max(map(len, cells)) <= 100


def test_the_errors_that_the_readme_explains_exist() -> None:
    messages = "\n".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    _, _, table = (ROOT / "README.md").read_text().partition("| message |")
    explained = re.findall(r"^\| `(?:\.\.\. )?([^`]+)`", table, flags=re.MULTILINE)
    assert len(explained) >= 4 and not [message for message in explained if message not in messages]


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_identifiers_that_documents_name_are_in_the_code() -> None:
    """A word with an underscore in backticks is a key, a function, a file or a column; the code has it somewhere."""
    code = "\n".join(
        path.read_text() for path in tracked("*.py", "*.sbatch", "Makefile", "*.jinja", "*.yaml", "*.jsonl")
    )
    known = set(re.findall(r"\w+", code))
    unknown = {
        f"{named(document)}: {word}"
        for document in DOCUMENTS
        for span in code_of(document.read_text())
        for word in re.findall(r"(?<![\w./*-])[A-Za-z]+(?:_[A-Za-z0-9]+)+(?![\w/*-])", span)
        if word not in known
    }
    assert not unknown


def test_files_of_a_run_that_documents_name_are_in_the_code() -> None:
    code = "\n".join(path.read_text() for path in tracked("*.py", "recipes/**.yaml"))
    unknown = {
        f"{named(document)}: {name}"
        for document in DOCUMENTS
        for span in code_of(document.read_text())
        for name in re.findall(r"[a-z_]+\.jsonl?\b", span)
        if name not in code and name not in ("qa.jsonl", "held_out.jsonl")
    }
    assert not unknown


def test_the_reference_is_that_of_the_code() -> None:
    assert PAGE.read_text() == render(), "docs/reference.md is older than the code. Run `make reference`"


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("See docs/absent.md.", unknown_paths), ("recipes/absent.yaml", unknown_paths),
        ("as absent.py does", unknown_paths),
        ("launcher.absent", unknown_modules), ("trainer.train.absent", unknown_modules),
        ("tunesmith absent RECIPE", unknown_commands), ("tunesmith run RECIPE --absent", unknown_commands),
        ("python -m tests.absent", unknown_commands), ("python -m toy_world.build --absent", unknown_commands),
        ("make absent", unknown_targets), ("train.lora.absent", unknown_keys), ("synthesize.absent", unknown_keys),
        ("absent: 3", unknown_settings), ("lora.absent=3", unknown_settings), ("train: {absent: 1}", unknown_yaml_keys),
    ],
)  # fmt: skip
def test_a_check_finds_what_does_not_exist(text: str, check) -> None:
    assert list(check(text))


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("docs/reference.md, recipes/*.yaml and train.py", unknown_paths),
        ("launcher.cli and trainer.train.train", unknown_modules),
        ("cluster.engines.engine:VLLMEngine", unknown_modules),
        ("tunesmith logs -f RUN", unknown_commands), ("tunesmith status | logs -f | cancel RUN", unknown_commands),
        ("python -m toy_world.build base-data --out X", unknown_commands), ("make SEED=1 chaos", unknown_targets),
        ("train.lora.rank and synthesize.models.writer.path", unknown_keys), ("lora.rank=3", unknown_settings),
        ("train: {data: [{path: a, weight: 2}]}", unknown_yaml_keys),
    ],
)  # fmt: skip
def test_a_check_passes_what_exists(text: str, check) -> None:
    assert not list(check(text))
