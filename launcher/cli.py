"""The command line: `tunesmith run | synthesize | train | export | evaluate | plan RECIPE [key.sub=value ...]`.

`tunesmith inspect tokens RECIPE_OR_RUN` shows the rows that training sees, and `tunesmith show RUN` what models wrote.
The commands about a run that was started, such as `tunesmith status RUN`, are in launcher/run_commands.py.

Nothing heavy is imported here, so that `--help` answers at once. Each stage imports what it needs.
"""

import faulthandler
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.errors import EXIT_BAD_INPUT, InputError, TunesmithError
from cluster.files import describe_os_error
from cluster.processes.signals import StopRequest
from cluster.run.rundir import RunDir
from launcher import run_commands

app = typer.Typer(
    help="Instruction tuning, end to end: a model writes and answers instructions, and is tuned on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="a YAML file, such as those in recipes/", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="values that replace those of the recipe, such as train.num_epochs=1"
    ),
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="folder of the run; default: the recipe's run_dir, else runs/<name>")
]


class Place(StrEnum):
    """Where a recipe runs."""

    here = "here"
    slurm = "slurm"


OnOption = Annotated[
    Place, typer.Option("--on", help="`here`: on this machine. `slurm`: as Slurm jobs, one for each stage")
]


def load_recipe(path: Path, overrides: list[str] | None, run_dir: Path | None):
    from launcher.recipe import load

    values = list(overrides or [])
    if run_dir is not None:
        values.append(f"run_dir={run_dir}")
    return load(path, values)


@app.command()
def run(
    recipe: RecipePath, overrides: Overrides = None, run_dir: RunDirOption = None, on: OnOption = Place.here
) -> None:
    """Run all stages of a recipe. Finished stages are skipped, so the same command continues a run that stopped."""
    with StopRequest(interrupts=True):  # nothing is begun yet
        from launcher.stages import run_all
        from launcher.sweep import members_of, save_index

        resolved = load_recipe(recipe, overrides, run_dir)
    if on == Place.slurm:
        run_commands.run_on_slurm(recipe, overrides or [], resolved)
        return
    members = members_of(recipe, overrides or [], resolved)
    if resolved.sweep:
        save_index(resolved.run, members)
    for _, member in members:
        run_all(member)


@app.command()
def synthesize(recipe: RecipePath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Generate a dataset: the model writes instructions and answers them."""
    _one_stage("synthesize", recipe, overrides, run_dir)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Tune the model on a dataset with DeepSpeed. Continues from the newest checkpoint if there is one."""
    _one_stage("train", recipe, overrides, run_dir)


@app.command()
def export(recipe: RecipePath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Write a checkpoint as a model folder in Hugging Face format."""
    _one_stage("export", recipe, overrides, run_dir)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Measure the base and the exported model on held-out tasks."""
    _one_stage("evaluate", recipe, overrides, run_dir)


@app.command()
def plan(
    recipe: RecipePath, overrides: Overrides = None, run_dir: RunDirOption = None, on: OnOption = Place.here
) -> None:
    """Show what a recipe would do, and start nothing. `--on slurm` writes plan.json and a copy of the code."""
    from launcher.plan import command_line, print_plan

    resolved = load_recipe(recipe, overrides, run_dir)
    if on == Place.slurm:
        command = command_line(recipe, overrides or [], run_dir, "--on", "slurm")
        run_commands.plan_on_slurm(recipe, overrides or [], resolved, command)
    else:
        print_plan(resolved, recipe, Console(), command_line(recipe, overrides or [], run_dir))


inspect = typer.Typer(help="Look at training data.", no_args_is_help=True)
app.add_typer(inspect, name="inspect")


@inspect.command("tokens")
def inspect_tokens(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="a YAML file, or a run folder")],
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="number of rows to show, in the order of training")] = 3,
) -> None:
    """Show the rows that training sees: trained text in color, the rest dim, with end tokens and document borders."""
    if recipe.is_dir():
        recipe, run_dir = RunDir(recipe).recipe, run_dir or recipe
    resolved = load_recipe(recipe, overrides, run_dir)
    from trainer.runtime import quieten_libraries, set_accelerator_env

    set_accelerator_env()
    quieten_libraries()
    from launcher.inspect_tokens import print_rows

    print_rows(resolved, rows, Console())


@app.command()
def show(
    run: run_commands.RunFolder,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="number of rows, and of questions")] = 10,
) -> None:
    """Show rows that the models wrote, and answers to held-out questions before and after tuning."""
    from launcher.show import print_samples

    print_samples(run, number, Console())


run_commands.add_to(app)


def _one_stage(stage: str, recipe: Path, overrides: list[str] | None, run_dir: Path | None) -> None:
    with StopRequest(interrupts=True):  # nothing is begun yet
        from launcher.slurm.snapshot import check_code_of_step
        from launcher.stages import run_stage

        check_code_of_step()
        resolved = load_recipe(recipe, overrides, run_dir)
    run_stage(stage, resolved)


def refuse_keys_as_options(arguments: list[str]) -> None:
    """Raise InputError if a recipe's key is written like an option: `--train.max_steps=2`."""
    for argument in arguments:
        if re.match(r"--\w+\.[\w.]+(=|$)", argument):
            key, _, value = argument[2:].partition("=")
            raise InputError(f"{argument}: keys of a recipe are no options. Write {key}={value or 'VALUE'}.")


def main() -> None:
    """Entry point: errors meant for the user are one line each, and decide the exit code."""
    faulthandler.enable(sys.__stderr__)  # a crash of a library shows where it was
    try:
        refuse_keys_as_options(sys.argv[1:])
        app()
    except TunesmithError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if (message := describe_os_error(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
