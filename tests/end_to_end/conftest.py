"""The demo, run once for all tests of this folder, and killed on its way.

In long runs it is the whole demo, killed three times; else one of fewer instructions, killed once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
CANARY = "hf_canary0123456789"
SMALLER = ("synthesize.num_instructions=300",)


@dataclass(frozen=True)
class Attempt:
    exit_code: int
    output: str
    num_logged_before: int  # bytes of the request log when it started
    children: tuple[psutil.Process, ...] = ()  # of the command when the signal was sent


@dataclass(frozen=True)
class Demo:
    run_dir: Path
    overrides: tuple[str, ...]
    attempts: list[Attempt]

    @property
    def output(self) -> str:
        return self.attempts[-1].output


def attempt(
    run_dir: Path,
    overrides: tuple[str, ...],
    until: Callable[[], bool] | None = None,
    signum: int = signal.SIGKILL,
) -> Attempt:
    """Run the demo to its end by `make demo`; or by its command, and send `signum` to that once `until` is true."""
    log = run_dir / "requests" / "00000.log"
    logged = log.stat().st_size if log.is_file() else 0
    output = run_dir.parent / "output.txt"
    arguments = [*overrides, "--run-dir", str(run_dir)]
    command = ["make", "--no-print-directory", "demo", f"ARGS={' '.join(arguments)}"]
    if until is not None:
        command = [sys.executable, "-m", "launcher.cli", "run", "recipes/demo/self_instruct.yaml", *arguments]
    environment = {**os.environ, "HF_TOKEN": CANARY, "PYTHONUNBUFFERED": "1"}
    with open(output, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
            # Whoever runs the tests in the background has SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        children: tuple[psutil.Process, ...] = ()
        while process.poll() is None:
            if until is not None and until():
                children = tuple(psutil.Process(process.pid).children(recursive=True))
                process.send_signal(signum)
                break
            time.sleep(0.2)
        code = process.wait(timeout=900)
    return Attempt(code, output.read_text(), logged, children)


@pytest.fixture(scope="session")
def demo(request, tmp_path_factory) -> Demo:
    """Killed while it synthesizes, then run to its end.

    Where a long test was selected, killed while it trains as well, and stopped with Ctrl-C while it evaluates.
    """
    is_long = any(item.get_closest_marker("long") for item in request.session.items)
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    log, metrics = run_dir / "requests" / "00000.log", run_dir / "metrics.jsonl"
    predictions = run_dir / "evaluation" / "base.json"
    overrides = () if is_long else SMALLER
    attempts = [attempt(run_dir, overrides, lambda: log.is_file() and log.stat().st_size > 100_000)]
    if is_long:
        attempts += [
            attempt(run_dir, overrides, lambda: metrics.is_file() and '"step": 30,' in metrics.read_text()),
            attempt(run_dir, overrides, lambda: predictions.is_file(), signal.SIGINT),
        ]
    attempts += [attempt(run_dir, overrides)]
    orphans = [child for attempt in attempts for child in attempt.children]
    _, alive = psutil.wait_procs(orphans, timeout=120)  # Ray's own agents take a minute to notice
    assert not alive, f"outlived the command: {[process.cmdline()[:4] for process in alive]}"
    return Demo(run_dir, overrides, attempts)
