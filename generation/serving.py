"""The models of a run: who plays which role, and the engine pools that serve them."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray

from cluster.config import ModelConfig
from cluster.engine_config import EngineConfig
from cluster.errors import InputError
from cluster.model_source import fingerprint_folder, locate_model, model_revision
from cluster.pool import EnginePool
from generation.config import Role, SynthesisConfig
from generation.method import Method
from generation.requester import ServedModel


@dataclass(frozen=True)
class Player:
    """A model in a role, found and checked, before any engine is started."""

    name: str  # as the recipe has it
    source: ModelConfig  # with an absolute path if it is a folder
    revision: str  # of the weights, adapter included
    form: str
    adapter: str | None
    engine: EngineConfig


def find_players(
    config: SynthesisConfig, method: type[Method], model: ModelConfig, engine: EngineConfig
) -> dict[Role, Player]:
    """The model of each role that the method has, and of the judge if rows are judged.

    Raises InputError for a model or an adapter that is not there.
    """
    forms = dict(method.FORMS)
    if config.judge:
        forms.setdefault("judge", "chat")
    players: dict[Role, Player] = {}
    for role, form in forms.items():
        chosen = config.models.of(role)
        named = ModelConfig(path=chosen.path, revision=chosen.revision) if chosen.path else model
        source = locate_model(named)
        revision = model_revision(source)
        adapter = None
        if chosen.adapter:
            adapter = str(_locate_adapter(role, chosen.adapter))
            revision += f"+{fingerprint_folder(Path(adapter))}"
        name = f"{named.path}+{chosen.adapter}" if chosen.adapter else named.path
        players[role] = Player(name, source, revision, chosen.form or form, adapter, chosen.engine or engine)
    return players


def _locate_adapter(role: Role, path: str) -> Path:
    folder = Path(path).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"synthesize.models.{role}.adapter: {folder.absolute()} holds no adapter_config.json, so it is not a PEFT "
            "adapter. Give the folder that `tunesmith export` made with export.form=adapter."
        )
    return folder.resolve()


@contextlib.asynccontextmanager
async def serving(players: Mapping[Role, Player]) -> AsyncIterator[dict[Role, ServedModel]]:
    """Start one pool for each model and engine setting; roles that agree in both share it."""
    adapters: dict[tuple[ModelConfig, EngineConfig], set[str]] = {}
    for player in players.values():
        adapters.setdefault((player.source, player.engine), set()).update(filter(None, [player.adapter]))
    async with contextlib.AsyncExitStack() as stack:
        pools = {
            key: await stack.enter_async_context(EnginePool.start(key[1], key[0], tuple(sorted(folders))))
            for key, folders in adapters.items()
        }
        yield {
            role: ServedModel(
                player.name, player.source, player.revision, pools[player.source, player.engine], player.form,
                player.adapter,
            )
            for role, player in players.items()
        }  # fmt: skip


def count_gpus(players: Mapping[Role, Player]) -> int:
    """GPUs of all engines together, 0 on a cluster without any. Needs a Ray session."""
    if not ray.cluster_resources().get("GPU", 0):
        return 0
    engines = {(player.source, player.engine): player.engine for player in players.values()}.values()
    return sum(engine.num_replicas * engine.gpus_per_engine for engine in engines)
