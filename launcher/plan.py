"""What a recipe would do, without doing it."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from launcher.recipe import Recipe
from trainer.config import TrainConfig


def stages_of(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(stage, what it does, what it leaves) in the order in which `tunesmith run` runs them."""
    run, train = recipe.run, recipe.train
    stages = []
    if not train.data:
        stages.append(
            (
                "synthesize",
                _synthesis(recipe),
                str(run.data / "synthesized"),
            )
        )
    stages += [
        (
            "train",
            f"{train.tuning} tuning, ZeRO-{train.zero_stage}, {train.precision}, {train.num_processes} ranks here; "
            f"{_batch(train)}; " + (f"{train.max_steps} steps" if train.max_steps else f"{train.num_epochs} epochs"),
            str(run.checkpoints),
        ),
        ("export", f"{recipe.export.form} model as safetensors{_to(recipe)}", str(run.export)),
    ]
    if train.objective == "chat" and recipe.export.form == "merged":
        models = "base and tuned model" if recipe.evaluate.compare_base else "tuned model"
        stages.append(("evaluate", f"{models} on held-out tasks: exact match, ROUGE-L", str(run.root / "evaluation")))
    return stages


def _synthesis(recipe: Recipe) -> str:
    """The method, how far it goes, and who serves it."""
    config = recipe.synthesize
    names = {"self_instruct": "Self-Instruct", "instruction_wild": "InstructionWild", "evol_instruct": "Evol-Instruct"}
    name = names.get(config.method, config.method.replace("_", " ").capitalize())
    goal = "the given instructions"
    if hasattr(config, "num_instructions"):
        goal = f"{config.num_instructions:,} new instructions"
    writer = config.models.writer
    engine = writer.engine or recipe.engine
    engines = f"{engine.num_replicas} vLLM engine{'s' if engine.num_replicas > 1 else ''}"
    return f"{name}: {goal}; {writer.path or recipe.model.path} on {engines}"


def _batch(train: TrainConfig) -> str:
    """What one optimizer step holds."""
    size, ranks = train.global_batch_size, train.num_processes
    most = f"up to {size * train.max_seq_len:,} tokens a step"
    if train.batch_unit == "documents":
        rows = "packed into as few rows as they need" if train.packing else "one to a row"
        return f"{size} documents a step, {rows}, {train.micro_batch_size} micro x {ranks} ranks; {most}"
    accumulated = size // (train.micro_batch_size * ranks)
    return f"{size} rows a step = {train.micro_batch_size} micro x {accumulated} accumulated x {ranks} ranks; {most}"


def _to(recipe: Recipe) -> str:
    return f", uploaded to {recipe.export.to}" if recipe.export.to else ""


def print_plan(recipe: Recipe, path: Path, console: Console) -> None:
    table = Table(title=f"{recipe.name}: {path}", title_justify="left", show_lines=True)
    for heading in ("stage", "what", "result"):
        table.add_column(heading, overflow="fold")
    for row in stages_of(recipe):
        table.add_row(*row)
    console.print(table)
    console.print(f"Nothing was started. To run it: tunesmith run {path}", markup=False, highlight=False)
