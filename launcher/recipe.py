"""One recipe, one run: YAML validated against the config models of the packages, with `key.sub=value` overrides.

recipe = load(Path("recipes/demo/self_instruct.yaml"), ["train.learning_rate=1e-3"])
"""

import difflib
from pathlib import Path
from typing import get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from cluster.config import ModelConfig, StrictModel, flatten
from cluster.engines.config import EngineConfig
from cluster.errors import InputError
from cluster.files import write_atomic
from cluster.run.rundir import RunDir
from generation.config.common import SynthesisConfig
from generation.config.filters import FILTER_CONFIGS
from generation.config.methods import DEFAULT_METHOD, METHOD_CONFIGS, SelfInstructConfig, SynthesizeConfig
from launcher.secrets import refuse_literal_tokens
from launcher.slurm_config import SlurmConfig
from trainer.config.evaluate import EvaluateConfig
from trainer.config.export import ExportConfig
from trainer.config.train import TrainConfig
from trainer.config.tuning import form_refusal


class Recipe(StrictModel):
    """All settings of a run. Sections are named by the stages of the command line."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run, in its folder, its jobs and its model card",
    )
    seed: int = Field(0, ge=0, description="seed of everything random in the run")
    run_dir: Path = Field(Path(), validate_default=False, description="folder of the run. The default is runs/<name>")
    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    synthesize: SynthesizeConfig = Field(SelfInstructConfig(), description="how the dataset is generated")
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    slurm: SlurmConfig = SlurmConfig()
    sweep: dict[str, tuple[bool | int | float | str | None, ...]] = Field(
        {}, description="dotted keys, each with the values to try: one run for each combination"
    )

    @field_validator("sweep", mode="before")
    @classmethod
    def _sweep_keys_are_dotted(cls, value: object) -> object:
        return flatten(value) if isinstance(value, dict) and value else value

    @field_validator("sweep")
    @classmethod
    def _sweeps_make_runs(cls, sweep: dict) -> dict:
        for key, values in sweep.items():
            if key.split(".")[0] in ("name", "run_dir", "sweep"):
                raise ValueError(f"{key} is set by the sweep itself. Leave it out")
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{key} needs at least one value, and no value twice")
        return sweep

    @model_validator(mode="after")
    def _export_is_possible(self) -> "Recipe":
        if (reason := form_refusal(self.train.tuning, self.export.form)) is not None:
            raise ValueError(reason)
        if self.export.checkpoint == "best" and not self.train.checkpoint.keep_best:
            raise ValueError(
                "export.checkpoint=best, but train.checkpoint.keep_best=0 keeps only the newest checkpoints. "
                "Set train.checkpoint.keep_best=1"
            )
        return self

    @property
    def run(self) -> RunDir:
        return RunDir(self.run_dir)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that `tunesmith run` runs, in this order."""
        stages = ["train", "export"]
        if not self.train.data:
            stages.insert(0, "synthesize")
        if self.train.objective == "chat" and self.export.form == "merged":
            stages.append("evaluate")
        return tuple(stages)

    def save(self, run: RunDir) -> None:
        """Write the resolved recipe into the run folder. Raises InputError if the folder is not one for this recipe."""
        self.check_run_folder(run)
        resolved = self.model_dump(mode="json")
        write_atomic(run.recipe, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))

    def check_run_folder(self, run: RunDir) -> None:
        """Raise InputError if the folder holds results of another recipe or another version of tunesmith."""
        if self.sweep:
            raise InputError(
                f"{self.name} is a sweep over {', '.join(self.sweep)}, which is several runs. "
                "Start them with `tunesmith run`."
            )
        refuse_older_layout(run)
        if run.recipe.is_file():
            refuse_changes(yaml.safe_load(run.recipe.read_text()), self.model_dump(mode="json"), run)


def load(path: Path, overrides: list[str]) -> Recipe:
    """Read and validate a recipe. Raises InputError naming the key, its line, and the nearest right key."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such recipe. See recipes/ for examples.")
    text, written = read_mapping(path)
    for override in overrides:
        if "=" not in override:
            raise InputError(f"{override!r} is not of the form key.sub=value.")
    try:
        values = merge(written, overrides)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(
            f"{path} with {' '.join(overrides) or 'no overrides'}: {str(error).splitlines()[0]}"
        ) from error
    refuse_literal_tokens(values)
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise InputError(explain(error, path, text, written, overrides)) from error
    run_dir = Path("runs") / recipe.name if recipe.run_dir == Path() else recipe.run_dir.expanduser()
    return recipe.model_copy(update={"run_dir": run_dir})


def merge(written: dict, overrides: list[str]) -> dict:
    """The values of a recipe's file, replaced by those of the overrides, with all `${...}` resolved."""
    merged = OmegaConf.merge(OmegaConf.create(written), OmegaConf.from_dotlist(overrides))
    return OmegaConf.to_container(merged, resolve=True)


def read_resolved(path: Path) -> Recipe:
    """The recipe that `save` wrote into a run folder. Nothing is left to merge, so reading it is quick."""
    try:
        return Recipe(**getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_text()).get_single_data())
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not a resolved recipe of this version of tunesmith ({reason}). Start the run again."
        ) from error


def read_mapping(path: Path) -> tuple[str, dict]:
    """Text and content of a YAML file. Raises InputError if it is no mapping with names as keys, each once."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if text.strip() else {}
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark is not None and (mark.get_snippet() or "").lstrip(" ").startswith("\t"):
            raise InputError(f"{path}:{mark.line + 1}: a tab. Indent with spaces.") from error
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    refuse_repeated_keys(path, yaml.compose(text))
    if not isinstance(content, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values, found {type(content).__name__}.")
    for key in content:
        if not isinstance(key, str):
            raise InputError(f"{path}: YAML reads the key {key!r} as {type(key).__name__}. Keys are names: quote it.")
    return text, content


def refuse_repeated_keys(path: Path, node: yaml.Node | None) -> None:
    """Raise InputError if a key occurs twice in a mapping. YAML would take its last value."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            refuse_repeated_keys(path, item)
    lines: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value in lines:
            raise InputError(
                f"{path}:{line}: the key `{key.value}` is already in line {lines[key.value]}. Remove one of them."
            )
        lines[str(key.value)] = line
        refuse_repeated_keys(path, value)


def explain(error: ValidationError, path: Path, text: str, written: dict, overrides: list[str]) -> str:
    """Every error of pydantic as one line: the place, the message, and the nearest right key for an unknown one."""
    lines = []
    faults_of_file = find_faults(written)
    for fault in error.errors():
        keys = [str(part) for part in fault["loc"] if not str(part).startswith("function-")]
        method = DEFAULT_METHOD
        if keys[:1] == ["synthesize"] and keys[1:2] and keys[1] in METHOD_CONFIGS:
            method = keys.pop(1)  # pydantic names the member of the union
        dotted = ".".join(keys)
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = f"unknown key; {nearest(keys[-1], known_keys(keys[:-1], method))}"
            if len(keys) == 1 and (dotted_key := find_key(keys[0], method)) is not None:
                message = f"unknown key; did you mean `{dotted_key}`?"
        elif fault["type"] == "model_type" and dotted == "model":
            message = f"a section of keys. Write `model: {{path: {fault['input']}}}`, or `model.path={fault['input']}`"
        elif fault["type"] == "union_tag_invalid":
            tag, known = fault["ctx"]["tag"], fault["ctx"]["expected_tags"].replace("'", "").split(", ")
            message = f"unknown {'method' if keys == ['synthesize'] else 'type'} {tag}; {nearest(tag, known)}"
        is_set = any(f"{dotted}.".startswith(f"{override.split('=')[0]}.") for override in overrides)
        if is_set or (fault["loc"], fault["msg"]) not in faults_of_file:
            place = "command line"
        else:
            place = f"{path}:{line_of(keys, text)}" if keys else str(path)
        lines.append(f"{place}: {dotted}: {message}" if keys else f"{place}: {message}")
    return "\n".join(lines)


def nearest(name: str, known: list[str]) -> str:
    """What to write in place of an unknown name."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"


def find_faults(written: dict) -> set[tuple[tuple, str]]:
    """(keys, message) of all that is wrong with a recipe's file by itself. Any other error is from the overrides."""
    try:
        Recipe(**merge(written, []))
    except ValidationError as error:
        return {(fault["loc"], fault["msg"]) for fault in error.errors()}
    except OmegaConfBaseException:  # it needs an override to resolve
        pass
    return set()


def line_of(keys: list[str], text: str) -> int:
    """The line of a recipe's file that has a key, or the section nearest to it."""
    node, line = yaml.compose(text), 1
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            break
        found = [(k, v) for k, v in node.value if k.value == key]
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line


def known_keys(keys: list[str], method: str) -> list[str]:
    """The valid keys of the section at `keys`. Those of `synthesize` depend on the method."""
    model: type[BaseModel] = Recipe
    for key in keys:
        if key in FILTER_CONFIGS:  # inside a list of filters, after the index
            model = FILTER_CONFIGS[key]
        elif key == "synthesize":
            model = METHOD_CONFIGS[method]
        elif key in model.model_fields:
            annotation = model.model_fields[key].annotation
            choices = [annotation, *get_args(annotation)]  # of `Section | None` too
            sections = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
            if not sections and not key.endswith("_filters"):
                return []
            model = sections[0] if sections else model
    return list(model.model_fields)


def find_key(name: str, method: str) -> str | None:
    """The first dotted key of a section that ends with `name`, such as `train.max_steps` for `max_steps`."""
    return next((f"{section}.{name}" for section in Recipe.model_fields if name in known_keys([section], method)), None)


def refuse_older_layout(run: RunDir) -> None:
    """Raise InputError if a run folder was written by a version of tunesmith that named its files otherwise."""
    for pattern in ("verdict-*.json", "generations", "gen-*"):
        if (found := next(run.root.glob(pattern), None)) is not None:
            raise InputError(
                f"{run.root}: {found.name} was written by an older version of tunesmith, which this version cannot "
                "continue. Choose another folder with `--run-dir`, or remove this one."
            )


def refuse_changes(old: dict, new: dict, run: RunDir) -> None:
    """Raise InputError if two resolved recipes differ in a setting that results in the run folder depend on."""
    shaped, free = [], ["train.validation.every_steps", "train.validation.max_examples"]
    free += [f"train.{name}" for name in TrainConfig.MAY_CHANGE_ON_RESUME - {"data", "validation"}]
    if any(run.data.glob("*")):
        shaped += ["seed", "model", "synthesize"]
        free += [f"synthesize.{name}" for name in SynthesisConfig.MAY_CHANGE_ON_RESUME - {"budget"}]
    if any(run.checkpoints.glob("step_*")):
        shaped += ["seed", "model", "train"]
    if new["train"]["data"] or "train" not in shaped:  # else more rows would change what is being trained on
        free.append("synthesize.budget")
    was, now = flatten(old), flatten(new)
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    clashes = [key for key in changed if is_below(key, shaped) and not is_below(key, free)]
    if clashes:
        listed = ", ".join(f"{key} (was {was.get(key)}, now {now.get(key)})" for key in clashes[:5])
        raise InputError(
            f"{run.root} holds results of another recipe: {listed}. "
            "Choose another folder with `--run-dir`, or remove this one."
        )


def is_below(key: str, sections: list[str]) -> bool:
    """Whether a dotted key is one of these sections or inside one of them."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)
