"""Whether the engines of a recipe fit into the jobs that it asks for, before anything is submitted."""

from collections.abc import Collection

from cluster.engines.config import EngineConfig
from cluster.errors import InputError
from generation.config.common import RolesConfig
from launcher.recipe import Recipe
from launcher.slurm_config import JobConfig

ROUNDING = 1e-6  # error of a quotient of fractions of a CPU


def pools_of_synthesis(recipe: Recipe) -> list[EngineConfig]:
    """The engines of each model of the synthesis. Roles with the same model and the same engines share them."""
    config = recipe.synthesize
    if config.models == RolesConfig():
        return [recipe.engine]
    from generation.methods import METHODS

    roles = {*METHODS[config.method].FORMS, *(["judge"] if config.judge else [])}
    chosen = [config.models.of(role) for role in roles]
    return [engine for *_, engine in {(each.path, each.revision, each.engine or recipe.engine) for each in chosen}]


def num_with_room(engine: EngineConfig, job: JobConfig) -> int | None:
    """How many of these engines a job has room for. None if the recipe does not decide it."""
    nodes, counts = job.nodes or 1, []
    if job.num_gpus:
        counts.append(nodes * job.num_gpus // engine.gpus_per_engine)  # an engine may span nodes
    if job.num_cpus and not (job.num_gpus and engine.gpus_per_engine > 1):
        counts.append(nodes * int(job.num_cpus / engine.cpus_per_engine + ROUNDING))
    return min(counts, default=None)


def engines_of_evaluation(recipe: Recipe) -> int:
    """Evaluation takes as many of the recipe's engines as its job has room for."""
    room = num_with_room(recipe.engine, recipe.slurm.of("evaluate"))
    return recipe.engine.num_replicas if room is None else min(recipe.engine.num_replicas, room)


def check_engines(recipe: Recipe, done: Collection[str] = ()) -> None:
    """Raise InputError if a job of a stage that is not done has no room for its engines."""
    stages = [stage for stage in recipe.stages if stage not in done]
    if "synthesize" in stages:
        pools = pools_of_synthesis(recipe)
        for engine in pools:
            wanted = engine.min_replicas or engine.num_replicas
            refuse_without_room("synthesize", engine, wanted, recipe.slurm.of("synthesize"), shared=len(pools) > 1)
    if "evaluate" in stages:
        refuse_without_room("evaluate", recipe.engine, 1, recipe.slurm.of("evaluate"))


def refuse_without_room(stage: str, engine: EngineConfig, wanted: int, job: JobConfig, shared: bool = False) -> None:
    """Raise InputError if the job has no room for `wanted` of these engines."""
    room = num_with_room(engine, job)
    if room is None or wanted <= room:
        return
    has = f"{job.nodes or 1} nodes x {job.num_gpus} GPUs" if job.num_gpus else f"{job.nodes or 1} nodes"
    has += f" x {job.num_cpus} CPUs" if job.num_cpus else ""
    each = f"{engine.gpus_per_engine} GPUs and " if job.num_gpus else ""
    raise InputError(
        f"slurm.{stage}: the job asks for {has}, which has room for {room} engines with {each}"
        f"{engine.cpus_per_engine:g} CPUs each, and {wanted} are needed. Raise slurm.{stage}.nodes, "
        f"slurm.{stage}.{'gpus_per_node' if job.num_gpus else 'cpus_per_task'}, or lower engine.num_replicas."
    )
