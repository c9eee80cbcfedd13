"""What a recipe would do: its stages, and the memory that training takes."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.errors import InputError
from cluster.model_source import find_config, locate_model
from launcher.recipe import Recipe
from trainer.config.train import TrainConfig
from trainer.memory import check_heads, choose_stage, estimate, format_bytes, read_facts, usable_bytes


def describe_stages(
    recipe: Recipe, place: str = " on this machine", num_engines: int | None = None
) -> list[tuple[str, str, str]]:
    """(stage, description, path of its result) for each stage. `num_engines` evaluate; None means all engines."""
    run = recipe.run
    models = "base and tuned model" if recipe.evaluate.compare_base else "tuned model"
    engines = _count(num_engines or recipe.engine.num_replicas, "vLLM engine")
    uploaded = f", uploaded to {recipe.export.to}" if recipe.export.to else ""
    rows = [
        ("synthesize", _synthesis(recipe), str(run.synthesized)),
        ("train", f"{_training(recipe.train, place)}; {_duration(recipe)}", str(run.checkpoints)),
        ("export", f"{recipe.export.form} model as safetensors{uploaded}", str(run.export)),
        ("evaluate", f"{models} on held-out tasks: exact match, ROUGE-L; {engines}", str(run.evaluation)),
    ]
    return [row for row in rows if row[0] in recipe.stages]


def _synthesis(recipe: Recipe) -> str:
    """The method, the number of instructions, and the engines."""
    config = recipe.synthesize
    names = {"self_instruct": "Self-Instruct", "instruction_wild": "InstructionWild", "evol_instruct": "Evol-Instruct"}
    name = names.get(config.method, config.method.replace("_", " ").capitalize())
    goal = "the given instructions"
    if hasattr(config, "num_instructions"):
        goal = f"{config.num_instructions:,} new instructions"
    writer = config.models.writer
    engine = writer.engine or recipe.engine
    return f"{name}: {goal}; {writer.path or recipe.model.path} on {_count(engine.num_replicas, 'vLLM engine')}"


def _training(train: TrainConfig, place: str) -> str:
    """How the model is tuned, and the arithmetic of its batches."""
    ranks, parts = train.num_processes, train.sequence_parallel_size
    sharing = f" in groups of {parts} that share rows" if parts > 1 else ""
    return (
        f"{train.tuning} tuning, ZeRO-{train.zero_stage}, {train.precision}, {_count(ranks, 'rank')}{place}{sharing}; "
        f"{_batch(train)}"
    )


def _duration(recipe: Recipe) -> str:
    """How long training takes: in steps if the recipe tells the number of examples, else in epochs."""
    train, num_instructions = recipe.train, getattr(recipe.synthesize, "num_instructions", None)
    if train.max_steps:
        return f"{train.max_steps:,} steps"
    epochs = _count(train.num_epochs, "epoch")
    if train.batch_unit == "rows" or train.data or num_instructions is None:
        return epochs
    num_steps = -(-num_instructions // train.global_batch_size) * train.num_epochs
    return f"{epochs}, {num_steps:,} steps if every instruction becomes one example"


def _batch(train: TrainConfig) -> str:
    """The batch of one optimizer step."""
    size, parts = train.global_batch_size, train.sequence_parallel_size
    groups = max(1, train.num_processes // parts)
    sharers = _count(groups, "group" if parts > 1 else "rank")
    max_tokens = f"up to {size * train.max_seq_len:,} tokens a step"
    if train.batch_unit == "examples":
        rows = "packed into as few rows as possible" if train.packing else "one in each row"
        return (
            f"{size} examples a step, {rows}; {train.micro_batch_size} rows per micro batch x {sharers}; {max_tokens}"
        )
    accumulated = size // (train.micro_batch_size * groups)
    batches = f"{train.micro_batch_size} per micro batch x {accumulated} accumulated x {sharers}"
    return f"{size} rows a step = {batches}; {max_tokens}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_plan(recipe: Recipe, path: Path, console: Console, command: str = "") -> None:
    """Print the plan. Raises InputError, after the tables, for what training would refuse at its start.

    `command` runs the recipe with the same overrides; empty means without overrides.
    """
    from launcher.stages import check_inputs

    table = Table(title=f"{recipe.name}: {path}", title_justify="left", show_lines=True)
    for heading in ("stage", "what", "result"):
        table.add_column(heading, overflow="fold")
    for row in describe_stages(recipe):
        table.add_row(*row)
    console.print(table)
    print_memory(recipe, console, lambda: usable_bytes(recipe.train, recipe.train.num_processes))
    check_inputs(recipe)
    command = command or command_line(path)
    console.print(f"Nothing was started. To run it: {command}", markup=False, highlight=False, soft_wrap=True)


def command_line(path: Path, overrides: Sequence[str] = (), run_dir: Path | None = None, *options: str) -> str:
    """The command that runs what a plan with these arguments has shown, for a shell."""
    place = [] if run_dir is None else ["--run-dir", str(run_dir)]
    return shlex.join(["tunesmith", "run", str(path), *overrides, *place, *options])


def print_memory(recipe: Recipe, console: Console, read_usable: Callable[[], int | None]) -> None:
    """Print the memory of training on each rank for every ZeRO stage. Raises InputError if the recipe's does not fit.

    Of the model only config.json has to be on this machine. `read_usable` returns the bytes that a rank may use. None
    means that they are not known, so nothing is refused. It may load torch, so it is called only if the table needs it.
    """
    train = recipe.train
    if find_config(recipe.model) is None:
        console.print(
            f"Memory: unknown, because config.json of {recipe.model.path} is not on this machine.", markup=False
        )
        return
    from trainer.model.shape import check_positions, shape_of

    model = locate_model(recipe.model)
    lm = shape_of(model)
    check_positions(lm, train)
    facts = read_facts(model, train, lm)
    check_heads(facts, train)
    usable = read_usable()
    chosen, refusal = None, None
    try:
        chosen = None if usable is None else choose_stage(facts, train, train.num_processes, usable)
    except InputError as error:
        refusal = error  # raised after the table, which shows by how much it does not fit
    available = "usable memory unknown" if usable is None else f"{format_bytes(usable)} usable"
    title = f"expected memory of each of {train.num_processes} ranks; {available}"
    table = Table(title=title, title_justify="left")
    offloads = {train.zero.offload_optimizer, train.zero.offload_parameters} != {"none"}
    for heading in ("ZeRO", "weights", "gradients", "AdamW", "working", "total", *["on host"] * offloads, ""):
        table.add_column(heading, justify="right")
    for stage in train.stages:
        found = estimate(facts, train, stage, train.num_processes)
        parts = [found.weights, found.gradients, found.optimizer, found.working, found.total, *[found.host] * offloads]
        result = "chosen" if chosen is not None and chosen.stage == stage else "fits"
        if usable is None or found.total > usable:
            result = "" if usable is None else "too much"
        table.add_row(str(stage), *map(format_bytes, parts), result)
    console.print(table)
    if refusal is not None:
        raise refusal
    console.print(
        f"{facts.num_trained:,} of {facts.num_parameters:,} parameters are trained. Working memory is for buckets, "
        "activations and logits, if every row is full and every token has a label.",
        markup=False, highlight=False,
    )  # fmt: skip
