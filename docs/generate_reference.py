"""Write docs/reference.md from the command line's help texts and the recipe's field descriptions: `make reference`."""

import json
import re
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer.main
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.engines.config import Sampling
from generation.config.common import RoleConfig, SynthesisConfig
from generation.config.filters import FILTER_CONFIGS
from generation.config.methods import METHOD_CONFIGS
from launcher.cli import app
from launcher.recipe import Recipe
from launcher.slurm_config import JobConfig, OneNodeJobConfig

PAGE = Path(__file__).with_name("reference.md")
INTRODUCTION = """\
# Reference

All commands and all keys of a recipe. `make reference` writes this page from the code, and a test fails if the page is
older than the code. The [guides](../README.md) show how to use the keys.

"""
RECIPE = """\
## Recipe

A recipe is a YAML file with these keys. An unknown key is an error. On the command line `key.sub=value` replaces a
value.

"""
SAMPLING = "The keys of every section that sets how an answer is sampled. Each such section has its own defaults."
FILTERS = """\
### Filters

The entries of `synthesize.instruction_filters` and `synthesize.row_filters`.

"""
MAX_ITEMS = 8  # of a default that is a list
SHARED = {  # sections of the same keys are described once, under this heading
    RoleConfig: "synthesize.models.<role>",
    JobConfig: "slurm.<stage>",
    OneNodeJobConfig: "slurm.export and slurm.evaluate",
}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
NAMES = {
    int: "integer", float: "number", str: "text", bool: "`true` or `false`", Path: "path", type(None): "`null`",
    Any: "any value",
}  # fmt: skip


def main() -> None:
    PAGE.write_text(render())


def render() -> str:
    return "".join([INTRODUCTION, *commands(), RECIPE, *recipe_sections()])


def commands() -> Iterator[str]:
    yield "## Commands\n\n"
    for name, command in walk("tunesmith", typer.main.get_command(app)):
        arguments = [
            parameter.metavar or parameter.name.upper()
            for parameter in command.params
            if parameter.param_type_name == "argument"
        ]
        yield f"### {' '.join([name, *arguments])}\n\n{paragraph(command.help)}\n\n"
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        yield "".join(
            f"- `{', '.join(option.opts)}`: {paragraph(option_help(option))}.\n" for option in options
        ) + "\n" * bool(options)


def walk(prefix: str, group: Any) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from walk(f"{prefix} {name}", command)
        else:
            yield f"{prefix} {name}", command


def option_help(option: Any) -> str:
    default = option.default.value if isinstance(option.default, Enum) else option.default
    return option.help if default is None or default is False else f"{option.help}; default `{default}`"


def recipe_sections() -> Iterator[str]:
    written: dict[type[BaseModel], str] = {SynthesisConfig: "synthesize"}
    yield keys(Recipe, {name: name for name in Recipe.model_fields if config_of(Recipe.model_fields[name].annotation)})
    for name, field in Recipe.model_fields.items():
        if name == "synthesize":
            yield from synthesize_sections(written)
        elif (config := config_of(field.annotation)) is not None:
            yield from sections(name, config, written)
    yield from sections("sampling", Sampling, written, SAMPLING)
    yield FILTERS
    for name, config in FILTER_CONFIGS.items():
        yield f"#### type: {name}\n\n{paragraph(config.__doc__)}\n\n" + keys(config, {}, without={"type"})


def synthesize_sections(written: dict[type[BaseModel], str]) -> Iterator[str]:
    yield from sections("synthesize", SynthesisConfig, written, "The keys that all methods have, and `method`.")
    common = {name: repr(field) for name, field in SynthesisConfig.model_fields.items()}
    for name, config in METHOD_CONFIGS.items():
        same = {key for key, field in config.model_fields.items() if common.get(key) == repr(field)}
        yield f"### synthesize with method: {name}\n\n{paragraph(config.__doc__)}\n\n"
        yield keys(config, {}, without=same | {"method"})


def sections(
    path: str, config: type[BaseModel], written: dict[type[BaseModel], str], introduction: str | None = None
) -> Iterator[str]:
    """The section of a config model, and those of the models inside it that are not in `written` yet."""
    written[config] = path
    places, new = {}, {}
    for name, field in config.model_fields.items():
        model = config_of(field.annotation)
        if model is not None and model not in FILTER_CONFIGS.values() and not issubclass(model, Sampling):
            if model not in written:
                new[model] = written[model] = SHARED.get(model, f"{path}.{name}")
            places[name] = written[model]
    yield f"### {paragraph(path)}\n\n{introduction or paragraph(config.__doc__)}\n\n"
    yield keys(config, places)
    for model, place in new.items():
        yield from sections(place, model, written)


def keys(config: type[BaseModel], places: dict[str, str], without: frozenset[str] | set[str] = frozenset()) -> str:
    """A line for each field that is not in `without`; `places` are the sections of those that hold a model."""
    fields = config.model_fields.items()
    lines = [key_line(name, field, places.get(name)) for name, field in fields if name not in without]
    return "".join(lines) + "\n" * bool(lines)


def key_line(name: str, field: FieldInfo, place: str | None) -> str:
    limits = [
        f"{word} {getattr(rule, key)}" for rule in field.metadata for key, word in LIMITS.items() if hasattr(rule, key)
    ]
    kind = type_name(field.annotation)
    if place is not None:
        kind = kind.replace("section", f"[section {paragraph(place)}](#{anchor(place)})")
    facts = ", ".join([kind, *limits])
    if field.is_required():
        facts += "; required"
    elif (default := default_text(field)) is not None:
        facts += f"; default {default}"
    description = paragraph(field.description) or first_sentence(config_of(field.annotation))
    return f"- `{name}` ({facts}): {description}.\n"


def first_sentence(config: type[BaseModel] | None) -> str:
    """What a section is, in the words of its config model, for a field without a description."""
    assert config is not None and config.__doc__, "a field has neither a description nor a section with a docstring"
    return re.split(r"(?<! al)\.(?: |$)", paragraph(config.__doc__))[0]


def type_name(annotation: Any) -> str:
    """A type in the words of someone who writes YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return alternatives([f"`{yaml_text(value)}`" for value in arguments])
    if origin in (Union, types.UnionType):
        if all(isinstance(bare(each), type) and issubclass(bare(each), SynthesisConfig) for each in arguments):
            return "section"
        if bare(arguments[0]) in FILTER_CONFIGS.values():
            return "[filters](#filters)"
        return alternatives([type_name(each) for each in arguments])
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if issubclass(annotation, Sampling):
        return "[sampling](#sampling)"
    return "section" if issubclass(annotation, BaseModel) else NAMES[annotation]


def alternatives(names: list[str]) -> str:
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} or {last}" if first else last


def bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def config_of(annotation: Any) -> type[BaseModel] | None:
    """The config model of a field that holds one, an optional one, or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [config_of(each) for each in get_args(annotation) if each is not Ellipsis]
    return next((config for config in found if config is not None), None)


def default_text(field: FieldInfo) -> str | None:
    """None for a section, whose keys have defaults of their own."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Sampling):
        set_here = {
            key: getattr(default, key) for key in type(default).model_fields
            if getattr(default, key) != Sampling.model_fields[key].default
        }  # fmt: skip
        return f"`{yaml_text(set_here)}`"
    if isinstance(default, BaseModel) or default == Path():
        return None
    if isinstance(default, (tuple, list)):
        items = [getattr(item, "type", item) for item in default]
        more = f" and {len(items) - MAX_ITEMS} more" if len(items) > MAX_ITEMS else ""
        return f"`{yaml_text(items[:MAX_ITEMS])}`{more}"
    return f"`{yaml_text(default)}`"


def yaml_text(value: object) -> str:
    """The value on one line. JSON, which is YAML too, if it has line breaks, which YAML would write as such."""
    value = plain(value)
    if "\\n" in (as_json := json.dumps(value, ensure_ascii=False)):
        return as_json
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def plain(value: object) -> object:
    """The value as YAML has it: models as mappings, tuples as lists."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json", exclude_none=True))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def paragraph(text: str | None) -> str:
    """A docstring or description on one line, with `<name>` as Markdown shows it and None as YAML writes it."""
    return " ".join((text or "").split()).replace("<", r"\<").replace("None means", "`null` means")


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    main()
