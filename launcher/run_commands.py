"""The commands that need Slurm or ask it: run and plan `--on slurm`, status, logs, wait, cancel, resume, list.

Nothing heavy is imported here, so that `--help` answers at once. Each command imports what it needs.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.run.rundir import RunDir

if TYPE_CHECKING:
    from launcher.recipe import Recipe
    from launcher.status import RunStatus

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="a run or sweep folder, such as runs/demo", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Add the commands about runs to the command line."""
    for command in (status, logs, wait, cancel, resume):
        app.command()(command)
    app.command("list")(list_runs)


def status(
    run: RunFolder,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code",
            help="end with what the run came to: 0 done, 1 failed, 2 bad input, 3 not ended yet, 75 `resume` continues",
        ),
    ] = False,
) -> None:
    """Show the state of a run or a sweep, stage by stage. Asks squeue if the run has Slurm jobs."""
    from launcher.outcome import exit_code_of
    from launcher.print_status import print_status
    from launcher.slurm.client import Slurm
    from launcher.slurm.live import describe_live_jobs
    from launcher.status import read_statuses
    from launcher.sweep import read_index

    if members := read_index(run):
        existing = [(folder, values) for folder, values in members if RunDir(folder).recipe.is_file()]
        states = _print_runs(existing)
        if missing := len(members) - len(existing):
            typer.echo(f"{missing} of the sweep's {len(members)} runs were not started.")
    else:
        slurm = Slurm()
        states = read_statuses([run], slurm)
        print_status(states[0], Console())
        for line in describe_live_jobs(states[0], slurm):
            typer.echo(line)
    if exit_code:
        raise typer.Exit(exit_code_of(run, states))


def wait(run: RunFolder) -> None:
    """Wait until a run or a sweep has ended. Exit codes: 0 done, 1 failed, 2 bad input, 75 `resume` continues it."""
    from launcher.outcome import wait_for_end
    from launcher.slurm.client import Slurm

    code = wait_for_end(run, Slurm())
    status(run)
    raise typer.Exit(code)


def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="folder that holds the run folders")] = Path(
        "runs"
    ),
) -> None:
    """List the runs in a folder, with their states."""
    from launcher.status import find_runs, is_readable

    _print_runs(find_runs(folder))
    if hidden := [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not is_readable(path)]:
        typer.echo(f"{len(hidden)} folders may not be read and are left out: {', '.join(hidden)}")


def _print_runs(found: list[tuple[Path, dict[str, object]]]) -> list["RunStatus"]:
    """Print and return the states of runs: (folder, values of a sweep)."""
    from launcher.print_status import print_runs
    from launcher.slurm.client import Slurm
    from launcher.status import read_statuses

    states = read_statuses([folder for folder, _ in found], Slurm())
    print_runs([(state, values) for state, (_, values) in zip(states, found, strict=True)], Console())
    return states


def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, such as runs/demo", show_default=False)],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="keep printing until the run has ended")] = False,
    stage: Annotated[
        str | None, typer.Option("--stage", help="only this stage: synthesize, train, export or evaluate")
    ] = None,
) -> None:
    """Show the output of a run's Slurm jobs, in all their attempts. With -f, the exit codes are those of `wait`."""
    from launcher.outcome import wait_for_end
    from launcher.slurm.client import Slurm
    from launcher.slurm.logs import print_logs
    from launcher.status import may_still_run, read_run

    slurm = Slurm()
    _, folder = read_run(run)
    print_logs(folder, stage, follow, lambda: may_still_run(run, stage, slurm), typer.echo)
    if follow:
        raise typer.Exit(wait_for_end(run, slurm, stage))


def cancel(run: RunFolder) -> None:
    """Cancel all Slurm jobs of a run or a sweep. What is saved is kept."""
    from launcher.slurm.client import Slurm
    from launcher.slurm.submitted import cancel_run
    from launcher.status import read_run
    from launcher.sweep import folders_of

    slurm = Slurm()
    for folder in reversed(folders_of(run)):  # the end of a run may let a later one of its sweep start
        cancelled = cancel_run(read_run(folder)[1], slurm)
        typer.echo(f"{folder}: " + (f"cancelled {', '.join(cancelled)}" if cancelled else "no jobs in the queue"))
    typer.echo(f"To continue: tunesmith resume {run}")


def resume(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="values that may change on resume, such as slurm.time=600"),
    ] = None,
) -> None:
    """Continue a run or a sweep where it began: on Slurm or on this machine. Finished stages are skipped."""
    from launcher.changes import changed_recipe
    from launcher.slurm.submitted import read_jobs
    from launcher.status import read_run
    from launcher.sweep import folders_of, read_index

    members = read_index(run)
    swept = {"name"} | {key for _, values in members for key in values} if members else set()
    found = [changed_recipe(*read_run(folder), overrides or [], swept) for folder in folders_of(run)]
    to_submit = []
    for recipe in found:
        place = recipe.run
        jobs = read_jobs(place)
        if not jobs:
            from launcher.stages import run_all

            run_all(recipe)
            continue
        if jobs[-1].is_by_hand:
            typer.echo(f"{place.root}: sbatch was called by hand. The new jobs ask for what the recipe's `slurm` says.")
        to_submit.append((recipe, Path(jobs[-1].option("chdir")), place.code))
    if to_submit:
        _submit_all(to_submit)


def run_on_slurm(path: Path, overrides: list[str], recipe: "Recipe") -> None:
    """Submit a recipe, or each run of its sweep, as a chain of jobs."""
    from launcher.stages import check_data
    from launcher.sweep import members_of, save_index
    from trainer.checkpoint.state import is_trained

    members = members_of(path, overrides, recipe)
    for _, member in members:
        if "train" in member.stages and not is_trained(member.run):
            check_data(member)
    if recipe.sweep:
        save_index(recipe.run, members)
    _submit_all([(member, Path.cwd(), recipe.run.code) for _, member in members])
    typer.echo(f"\nNext: tunesmith status {recipe.run_dir}    # or: logs -f, cancel, resume")


def _submit_all(runs: list[tuple["Recipe", Path, Path]]) -> None:
    """Check all recipes, then submit them one by one. Each comes with the folder of its jobs and that of its code."""
    import shlex

    from launcher.done import resume_point
    from launcher.slurm.client import Slurm
    from launcher.slurm.submit import check_with_slurm, prepare, refuse_live_jobs, submit
    from launcher.slurm.submitted import read_jobs

    slurm = Slurm()
    submissions = [prepare(recipe, folder, Path(os.path.abspath(code))) for recipe, folder, code in runs]
    for submission in submissions:
        refuse_live_jobs(submission.recipe, slurm)
        check_with_slurm(submission, slurm)
    last_jobs: list[str] = []  # of the runs so far
    for submission in submissions:
        run, limit = submission.recipe.run, submission.recipe.slurm.max_runs_at_once
        for stage in sorted(submission.skip):
            typer.echo(f"{stage}: done already, skipped")
        earlier = {job.stage for job in read_jobs(run)}
        for job in submission.jobs:
            if job.stage in earlier:
                typer.echo(f"{job.stage}: {resume_point(job.stage, run)}")
        if not submission.jobs:
            typer.echo(f"{run.root}: everything is done, so nothing was submitted")
            continue
        after_run = last_jobs[-limit] if limit and len(last_jobs) >= limit else None
        ids = submit(submission, slurm, lambda argv: typer.echo(f"$ {shlex.join(argv)}"), after_run)
        last_jobs.append(ids[submission.jobs[-1].stage])
        typer.echo(f"$ scontrol release {ids[submission.jobs[0].stage]}")
        listed = ", ".join(f"{stage} {job_id}" for stage, job_id in ids.items())
        typer.echo(f"{run.root}: submitted {listed}")


def plan_on_slurm(path: Path, overrides: list[str], recipe: "Recipe", command: str) -> None:
    """Show the jobs of a recipe. Writes plan.json and a copy of the code into the run folder."""
    from launcher.slurm.client import NoSlurm, Slurm
    from launcher.slurm.plan import print_slurm_plan
    from launcher.slurm.submit import check_with_slurm, prepare
    from launcher.stages import check_inputs
    from launcher.sweep import members_of

    code = RunDir(Path(os.path.abspath(recipe.run_dir))).code
    slurm = Slurm()
    for _, member in members_of(path, overrides, recipe):
        submission = prepare(member, Path.cwd(), code)
        print_slurm_plan(submission, path, command, Console())
        check_inputs(member)
        try:
            check_with_slurm(submission, slurm)
        except NoSlurm:
            typer.echo("This machine has no Slurm, so it is not checked whether Slurm would accept these jobs.")
