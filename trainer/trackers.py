"""Metrics to where people look at them: one function for TensorBoard, Weights & Biases and Trackio."""

import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence

from cluster.run.rundir import RunDir

Report = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def reporting(names: Sequence[str], run: RunDir, settings: dict) -> Iterator[Report]:
    """Give a function that sends the figures of a step to every tracker in `names`.

    A run that goes on, goes on in its tracker too. The keys of the services are found by their own libraries.
    """
    with contextlib.ExitStack() as stack:
        reports = [stack.enter_context(_open(name, run, settings)) for name in names]

        def report(step: int, figures: dict[str, float]) -> None:
            for send in reports:
                send(step, {f"train/{key}": value for key, value in figures.items()})

        yield report


@contextlib.contextmanager
def _open(name: str, run: RunDir, settings: dict) -> Iterator[Report]:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run.tensorboard))
        try:
            yield lambda step, figures: [writer.add_scalar(key, value, step) for key, value in figures.items()]
        finally:
            writer.close()
        return
    library = importlib.import_module(name)  # wandb, and trackio, which has the same functions
    place = run.root.resolve()
    beside = {"id": hashlib.sha256(str(place).encode()).hexdigest()[:16], "dir": str(place)} if name == "wandb" else {}
    library.init(project="tunesmith", name=place.name, config=settings, resume="allow", **beside)
    try:
        yield lambda step, figures: library.log(figures, step=step)
    finally:
        library.finish()
