"""Everything that decides the data of a synthesis, found and checked before an engine starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ModelConfig, flatten
from cluster.data.rows import find_files, is_dataset
from cluster.engines.config import EngineConfig
from cluster.errors import InputError
from cluster.files import sha256_file, sha256_json, write_json
from cluster.model_source import fingerprint_folder
from cluster.run.rundir import RunDir
from generation.config.common import Role, SynthesisConfig
from generation.judge import PROMPTS as JUDGE_PROMPTS
from generation.method import Method
from generation.methods import METHODS
from generation.prompt_checks import check_models, check_prompts, load_tokenizers
from generation.seed_tasks import SeedTask, load_seed_tasks
from generation.serving import RoleModel, resolve_models
from generation.templates import Prompt, load_prompts

PACKAGE = Path(__file__).parent
MODEL_SUBFOLDER = "tunesmith"  # of a model folder that has seeds, prompts and evaluation sets of its own
SEED_FILES = {"instruction_wild": "user_instructions.jsonl"}  # of other methods: seed_tasks.jsonl
WITHOUT_SEEDS = ("magpie",)


@dataclass(frozen=True)
class Inputs:
    """identity: everything that decides the data, as JSON; sha: its hash."""

    config: SynthesisConfig
    method: type[Method]
    seeds: Sequence[SeedTask]
    prompts: dict[str, Prompt]
    models: Mapping[Role, RoleModel]
    seed: int
    identity: dict

    @property
    def sha(self) -> str:
        return sha256_json(self.identity)

    @property
    def num_engines(self) -> int:
        return sum({(each.source, each.engine): each.engine.num_replicas for each in self.models.values()}.values())

    @property
    def model_names(self) -> str:
        return ", ".join(dict.fromkeys(role_model.name for role_model in self.models.values()))


def load_inputs(config: SynthesisConfig, model: ModelConfig, engine: EngineConfig, seed: int) -> Inputs:
    """Find and check seeds, prompts and models. `auto` means those in the writer's folder, or else those packaged."""
    method = METHODS[config.method]
    models = resolve_models(config, method, model, engine)
    first = next(iter(models.values()))
    seeds_path = _seeds_path(config, method, first.source.path)
    seeds = load_seed_tasks(seeds_path) if seeds_path else ()
    prompts = _load_prompts(config, method, first.source.path)
    tokenizers = load_tokenizers(models)
    models = check_models(method, models, tokenizers)
    check_prompts(config, method, models, tokenizers, prompts, seeds, seed)
    identity = {
        "synthesize": config.identity(),
        "seeds": seeds_path and _fingerprint_seeds(seeds_path),
        "prompts": {name: prompt.sha for name, prompt in prompts.items()},
        "models": {
            role: {
                "revision": role_model.revision,
                "form": role_model.form,
                "max_model_len": role_model.engine.max_model_len,
                "dtype": role_model.engine.dtype,
                **({"chat_template_kwargs": kwargs} if (kwargs := role_model.chat_template_kwargs) else {}),
            }
            for role, role_model in models.items()
        },
        "seed": seed,
    }
    return Inputs(config, method, seeds, prompts, models, seed, identity)


def find_asset(model_path: str, name: str, packaged_name: str = "") -> Path:
    """A file or folder that comes with the model, or else with this package, where it may have another name."""
    own = Path(model_path) / MODEL_SUBFOLDER / name
    return own if own.exists() else PACKAGE / (packaged_name or name)


def _seeds_path(config: SynthesisConfig, method: type[Method], model_path: str) -> Path | None:
    if method.NAME in WITHOUT_SEEDS:
        return None
    if config.seeds != "auto":
        return Path(config.seeds).expanduser()
    return find_asset(model_path, "seed_tasks.jsonl", f"seeds/{SEED_FILES.get(method.NAME, 'seed_tasks.jsonl')}")


def _fingerprint_seeds(path: Path) -> str:
    if is_dataset(path):
        return fingerprint_folder(path)
    hashes = [sha256_file(file) for file in find_files(path, "synthesize.seeds")]
    return hashes[0] if len(hashes) == 1 else sha256_json(hashes)


def _load_prompts(config: SynthesisConfig, method: type[Method], model_path: str) -> dict[str, Prompt]:
    folder = Path(config.prompts).expanduser()
    if config.prompts == "auto":
        folder = find_asset(model_path, f"prompts/{method.NAME}")
    prompts = load_prompts(folder, method.PROMPTS)
    if config.judge:
        has_judge = (folder / "judge.jinja").is_file()
        judge = folder if has_judge else find_asset(model_path, "prompts/judge/judge.jinja").parent
        prompts |= {"row_judge": load_prompts(judge, JUDGE_PROMPTS)["judge"]}
    return prompts


def check_inputs(run: RunDir, inputs: Inputs) -> None:
    """Record what the run's data is made from, or check that it is the same as in an earlier attempt.

    Raises InputError naming what has changed.
    """
    path = run.inputs
    if not path.is_file():
        run.data.mkdir(parents=True, exist_ok=True)
        write_json(path, inputs.identity)
        return
    old, new = flatten(json.loads(path.read_text())), flatten(json.loads(json.dumps(inputs.identity)))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        listed = "; ".join(f"{key}: was {old.get(key)}, is {new.get(key)}" for key in changed[:5])
        raise InputError(
            f"{run.data} was made with other settings, seeds, prompts or another model ({listed}). Choose another "
            "folder with `--run-dir`, or remove this one to start again. Requests that are the same stay in the log "
            "and are not generated again."
        )
