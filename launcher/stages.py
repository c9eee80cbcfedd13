"""Run one stage of a recipe on this machine, or all of them in order. Stages that are done are skipped."""

import os
from pathlib import Path

from cluster.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_RETRY, InputError, Preempted, TunesmithError
from cluster.log import stage_logger
from cluster.processes.signals import StopRequest
from cluster.run.fence import run_lock, verify
from cluster.run.rundir import RunDir
from cluster.system import require_system
from launcher.recipe import Recipe


def run_stage(stage: str, recipe: Recipe) -> None:
    """Run one stage to its end, under the run folder's lock. Raises Preempted if it was stopped by a signal."""
    run = recipe.run.create()
    with run_lock(run.lock):
        verify(run.root)
        recipe.save(run)
        try:
            RUNNERS[stage](recipe, run)
        except KeyboardInterrupt:
            raise Preempted(f"{stage} was stopped. The same command continues from what is saved.") from None


def run_all(recipe: Recipe) -> None:
    """Run every stage of a recipe on this machine, and print the results."""
    from rich.console import Console

    from launcher.summary import print_summary
    from trainer.checkpoint.state import is_trained

    if "train" in recipe.stages and not is_trained(recipe.run):
        check_data(recipe)
        check_model(recipe)  # before data is made for it
    for number, stage in enumerate(recipe.stages, 1):
        stage_logger(stage).info(f"stage {number} of {len(recipe.stages)}")
        run_stage(stage, recipe)
    print_summary(recipe, Console())


def synthesize(recipe: Recipe, run: RunDir) -> None:
    with StopRequest(interrupts=True):  # from the imports on, which take seconds; the stage has its own later
        from generation import synthesize as stage

        require_system(engines=True)
        stage.run(recipe.synthesize, recipe.model, recipe.engine, run, recipe.seed)


def train(recipe: Recipe, run: RunDir) -> None:
    """Train on this machine: start torchrun, pass stop signals on to its ranks, and wait for its end."""
    from launcher.torchrun import run_torchrun
    from trainer.checkpoint.state import is_trained

    if is_trained(run):
        stage_logger("train").info(f"done already: {run.checkpoints}")
        return
    require_system(engines=False)
    if recipe.train.tuning == "qlora":
        from trainer.model.load import require_four_bits

        require_four_bits()
    check_data(recipe)
    check_model(recipe)
    num_ranks = recipe.train.num_processes
    options = ["--standalone", f"--nproc-per-node={num_ranks}"]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    verify(run.root)
    run.result("train").unlink(missing_ok=True)
    with StopRequest(interrupts=True) as stop:
        command = ["-m", "trainer.train", str(run.root.resolve())]
        code = run_torchrun(options, command, stop, {"OMP_NUM_THREADS": threads})
    if code == EXIT_RETRY:
        raise Preempted(
            f"training was stopped; its last step is saved in {run.checkpoints}. The same command continues it."
        )
    if code != EXIT_DONE:
        result = run.read_result("train") or {}
        message = result.get("message") or f"training ended with exit code {code}. The output of its ranks is above."
        raise (InputError if code == EXIT_BAD_INPUT else TunesmithError)(message)


def check_inputs(recipe: Recipe) -> None:
    """Raise InputError if the recipe's data cannot be read, or its model is nowhere. Loads no model."""
    from cluster.model_source import find_config, model_revision
    from trainer.checkpoint.state import is_trained

    if "train" in recipe.stages and recipe.train.data and not is_trained(recipe.run):
        check_data(recipe)
    organization, slash, _ = recipe.model.path.rpartition("/")
    if find_config(recipe.model) is None and slash and Path(organization).is_dir():  # so it may be meant as a folder
        model_revision(recipe.model)


def check_model(recipe: Recipe) -> None:
    """Raise InputError for a model, tokenizer or chat template that cannot be trained as the recipe says."""
    from cluster.model_source import locate_model, model_revision
    from trainer.model.tokenizer import check_tokenizer
    from trainer.resolve import check_shape

    model = locate_model(recipe.model)
    model_revision(model)
    check_tokenizer(model, recipe.train)
    check_shape(model, recipe.train)


def check_data(recipe: Recipe) -> None:
    """Raise InputError for a file of examples that cannot be read or fits no format."""
    from trainer.config.data import DataSource
    from trainer.data.sources import check_source

    for source in recipe.train.data:
        check_source(source, recipe.train.objective)
    if recipe.train.validation and recipe.train.validation.path:
        held_out = DataSource(path=recipe.train.validation.path)
        check_source(held_out, recipe.train.objective, "train.validation.path")


def export(recipe: Recipe, run: RunDir) -> None:
    from trainer.runtime import quieten_libraries, set_accelerator_env

    set_accelerator_env()
    quieten_libraries()
    from trainer import export as stage

    job = stage.ExportJob(run, recipe.name, recipe.model, recipe.train, recipe.export)
    result = stage.run(job)
    stage_logger("export").info(
        f"{result['form']} model in {result['folder']}, {result['weights_bytes'] / 1e6:,.1f} MB"
    )


def evaluate(recipe: Recipe, run: RunDir) -> None:
    from trainer.runtime import quieten_libraries, set_accelerator_env

    set_accelerator_env()
    quieten_libraries()
    from generation.inputs import find_asset
    from trainer import evaluate as stage

    require_system(engines=True)
    sets = tuple(Path(path) for path in recipe.evaluate.sets)
    sets = sets or (find_asset(recipe.model.path, "eval.jsonl", "seeds/eval_tasks.jsonl"),)
    plain_prompt = find_asset(recipe.model.path, "prompts/self_instruct/answer.jinja")
    stage.run(
        stage.EvaluateJob(
            run,
            recipe.model,
            recipe.engine,
            recipe.evaluate,
            sets,
            plain_prompt,
            recipe.train.chat_template,
            recipe.train.chat_template_kwargs,
        )
    )


RUNNERS = {"synthesize": synthesize, "train": train, "export": export, "evaluate": evaluate}
