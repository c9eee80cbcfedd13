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
        counts.append(nodes * int(job.num_cpus / engine.min_cpus + ROUNDING))
    return min(counts, default=None)


def engines_of_evaluation(recipe: Recipe) -> int:
    """Evaluation takes as many of the recipe's engines as its job has room for."""
    room = num_with_room(recipe.engine, recipe.slurm.of("evaluate"))
    return recipe.engine.num_replicas if room is None else min(recipe.engine.num_replicas, room)


def check_engines(recipe: Recipe, done: Collection[str] = ()) -> None:
    """Raise InputError if a job of a stage that is not done has no room for its engines."""
    stages = [stage for stage in recipe.stages if stage not in done]
    if "synthesize" in stages:
        pools = [(engine, engine.min_replicas or engine.num_replicas) for engine in pools_of_synthesis(recipe)]
        refuse_without_room("synthesize", pools, recipe.slurm.of("synthesize"))
    if "evaluate" in stages:
        refuse_without_room("evaluate", [(recipe.engine, 1)], recipe.slurm.of("evaluate"))


def refuse_without_room(stage: str, pools: list[tuple[EngineConfig, int]], job: JobConfig) -> None:
    """Raise InputError if the job has no room for so many engines of each pool at once."""
    rooms = [num_with_room(engine, job) for engine, _ in pools]
    num_gpus = sum(wanted * engine.gpus_per_engine for engine, wanted in pools)
    num_cpus = sum(wanted * engine.min_cpus for engine, wanted in pools)
    has_room = all(room is None or wanted <= room for room, (_, wanted) in zip(rooms, pools, strict=True))
    nodes = job.nodes or 1
    has_room = has_room and (not job.num_gpus or num_gpus <= nodes * job.num_gpus)
    if has_room and (job.num_cpus is None or num_cpus <= nodes * job.num_cpus + ROUNDING):
        return
    has = [f"{job.num_gpus} GPUs"] * bool(job.num_gpus) + [f"{job.num_cpus} CPUs"] * bool(job.num_cpus)
    needs = [f"{num_gpus} GPUs"] * bool(job.num_gpus) + [f"{num_cpus:g} CPUs"]
    raise InputError(
        f"slurm.{stage}: the {sum(wanted for _, wanted in pools)} engines need {' and '.join(needs)}, each engine on "
        f"one node if it can, and the job asks for {nodes} nodes with {' and '.join(has)} each. Set "
        f"slurm.{stage}.gpus_per_node, cpus_per_task or nodes, or lower engine.num_replicas."
    )
