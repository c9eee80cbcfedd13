"""The models of a run: which model has which role, and the engine pools that serve them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from cluster.config import ModelConfig
from cluster.engines.config import EngineConfig
from cluster.engines.placement import share_cpus
from cluster.engines.pool import EnginePool
from cluster.errors import InputError
from cluster.model_source import fingerprint_folder, locate_model, model_revision
from generation.config.common import Role, SynthesisConfig
from generation.method import Method
from generation.requester import ServedModel

POLL_SECONDS = 0.5
ROUNDING = 1e-6  # error of a sum of fractions of a CPU


@dataclass(frozen=True)
class RoleModel:
    """A model in a role, found and checked before an engine starts."""

    name: str  # as in the recipe
    source: ModelConfig  # with an absolute path if it is a folder
    revision: str  # identifies the weights and the adapter
    form: str
    adapter: str | None
    engine: EngineConfig
    recipe_key: str  # of its settings, such as synthesize.models.writer
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_mark: str = ""  # with which the chat template begins the assistant's turn, if it does


def resolve_models(
    config: SynthesisConfig, method: type[Method], model: ModelConfig, engine: EngineConfig
) -> dict[Role, RoleModel]:
    """The model of each role of the method, and of the judge if rows are judged.

    Raises InputError if a model or an adapter does not exist.
    """
    forms = dict(method.forms(config))
    if config.judge:
        forms.setdefault("judge", "chat")
    models: dict[Role, RoleModel] = {}
    for role, form in forms.items():
        chosen = config.models.of(role)
        named = ModelConfig(path=chosen.path, revision=chosen.revision) if chosen.path else model
        source = locate_model(named)
        revision = model_revision(source)
        adapter = None
        recipe_key = f"synthesize.models.{config.models.recipe_role(role)}"
        if chosen.adapter:
            adapter = str(_locate_adapter(recipe_key, chosen.adapter))
            revision += f"+{fingerprint_folder(Path(adapter))}"
        name = f"{named.path}+{chosen.adapter}" if chosen.adapter else named.path
        models[role] = RoleModel(
            name,
            source,
            revision,
            chosen.form or form,
            adapter,
            chosen.engine or engine,
            recipe_key,
            chosen.chat_template_kwargs,
        )
    return models


def _locate_adapter(recipe_key: str, path: str) -> Path:
    folder = Path(path).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{recipe_key}.adapter: {folder.absolute()} has no adapter_config.json, so it is not a PEFT "
            "adapter. Set the folder that `tunesmith export` wrote with export.form=adapter."
        )
    return folder.resolve()


@contextlib.asynccontextmanager
async def serving(models: Mapping[Role, RoleModel]) -> AsyncIterator[dict[Role, ServedModel]]:
    """Start one pool for each pair of model and engine settings. Roles with the same pair share it.

    Raises InputError if the cluster is too small for all pools at once, and what `EnginePool.start` raises.
    """
    adapters: dict[tuple[ModelConfig, EngineConfig], set[str]] = {}
    for role_model in models.values():
        adapters.setdefault((role_model.source, role_model.engine), set()).update(filter(None, [role_model.adapter]))
    if len(adapters) > 1:  # a single pool checks it itself
        await _wait_for_resources([engine for _, engine in adapters])
    engines = share_cpus([(engine, source) for source, engine in adapters])
    async with contextlib.AsyncExitStack() as stack:
        pools = {
            key: await stack.enter_async_context(EnginePool.start(engine, key[0], tuple(sorted(folders))))
            for engine, (key, folders) in zip(engines, adapters.items(), strict=True)
        }
        yield {
            role: ServedModel(
                each.name,
                each.source,
                each.revision,
                pools[each.source, each.engine],
                each.form,
                each.adapter,
                each.chat_template_kwargs,
                each.reasoning_mark,
            )
            for role, each in models.items()
        }


async def _wait_for_resources(engines: Sequence[EngineConfig]) -> None:
    """Wait until the cluster is large enough for all these pools at once. Otherwise each would wait for the others.

    Raises InputError if the cluster is too small. If a pool sets min_replicas, nodes may still join, so the error comes
    only after its start_timeout_seconds.
    """
    deadline = time.monotonic() + max((each.start_timeout_seconds for each in engines if each.min_replicas), default=0)
    while shortage := _shortage(engines, ray.cluster_resources()):
        if time.monotonic() >= deadline:
            raise InputError(
                f"the {len(engines)} models of this run are served at once: {shortage}. Use one model for more roles, "
                "or lower num_replicas or cpus_per_engine in `engine` or synthesize.models.<role>.engine."
            )
        await asyncio.sleep(POLL_SECONDS)


def _shortage(engines: Sequence[EngineConfig], have: Mapping[str, float]) -> str:
    """What these pools need and a cluster with these resources lacks; empty if it is large enough."""
    replicas = [each.min_replicas or each.num_replicas for each in engines]
    needs = {
        "GPU": sum(n * each.gpus_per_engine for n, each in zip(replicas, engines, strict=True)) if "GPU" in have else 0,
        "CPU": sum(n * each.min_cpus for n, each in zip(replicas, engines, strict=True)),
    }
    shortages = [
        f"their engines need {need:g} {name}s, and the Ray cluster has {have.get(name, 0):g}"
        for name, need in needs.items()
        if need > have.get(name, 0) + ROUNDING
    ]
    return "; ".join(shortages)
