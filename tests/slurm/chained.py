"""A run on the bed whose jobs follow each other: submitted as the launcher does, and looked at from outside."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT

POLL_SECONDS = 0.2
# An sbatch script that runs a stage without torch; see scripted_supervisor.py.
SCRIPTED = f"""#SBATCH --open-mode=append
project={PROJECT}
shown=$(scontrol show job "$SLURM_JOB_ID")
export TUNESMITH_PYTHON={sys.executable}
source {PROJECT}/slurm/attempt.sh
run_attempt tests.slurm.scripted_supervisor "$1" "$PWD/$2" run_dir=$PWD/run "${{@:3}}" """


@dataclass
class ChainedRun:
    """A run in `folder`, which has a recipe.yaml; its stages are run by `script`, an sbatch script."""

    bed: SlurmBed
    folder: Path
    script: Path
    env: dict[str, str]
    is_for_any_stage: bool = True  # the script's first argument is the stage

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def submit(self, stage: str, *options: str, after: tuple[str, ...] = (), words: tuple[str, ...] = ()) -> int:
        """Submit a stage as the launcher does; the job is held until it is written down."""
        parents = [self.job(parent) for parent in after]
        dependency = [f"--dependency=afterok:{':'.join(map(str, parents))}"] if parents else []
        options = ("--requeue", "--kill-on-invalid-dep=yes", *dependency, *options)
        stages = [stage] if self.is_for_any_stage else []
        argv = ["sbatch", "--parsable", *options, str(self.script), *stages, "recipe.yaml", *words]
        job = int(self.bed.client(argv[0], "--hold", *argv[1:], cwd=self.folder, env=self.env))
        self.run.mkdir(exist_ok=True)
        line = {"time": time.time(), "stage": stage, "job_id": str(job), "parent_job_ids": list(map(str, parents))}
        with open(self.run / "jobs.jsonl", "a") as file:
            file.write(json.dumps(line | {"argv": argv}) + "\n")
        self.bed.client("scontrol", "release", str(job))
        return job

    def jobs(self) -> list[dict]:
        return read_lines(self.run / "jobs.jsonl")

    def job(self, stage: str) -> int:
        """The newest job of a stage."""
        return [int(row["job_id"]) for row in self.jobs() if row["stage"] == stage][-1]

    def events(self, *names: str) -> list[dict]:
        """What the attempts decided, those of these names or all."""
        rows = [row for row in read_lines(self.run / "events.jsonl") if "attempt" in row]  # others are of the stages
        return [row for row in rows if not names or row["event"] in names]

    def metrics(self) -> list[dict]:
        return [row for row in read_lines(self.run / "metrics.jsonl") if row["stage"] == "train"]

    def result(self, stage: str) -> dict:
        path = self.run / f"result-{stage}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def output(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("slurm-*.out")))

    def wait(self, what: str, check: Callable[[], Any], timeout_seconds: float) -> Any:
        """Wait until `check` gives something."""
        deadline = time.monotonic() + timeout_seconds
        while not (found := check()):
            if time.monotonic() > deadline:
                events = "\n".join(map(str, self.events()))
                raise AssertionError(f"not in {timeout_seconds} s: {what}\n{events}\n{self.output()}\n{self.bed.log()}")
            time.sleep(POLL_SECONDS)
        return found

    def wait_event(self, name: str, timeout_seconds: float, count: int = 1) -> list[dict]:
        """Wait for so many events of this name. Fails at once if the chain stops without them."""

        def happened() -> list[dict] | None:
            is_over = self.events("gave up")  # first: then earlier events are there below
            found = self.events(name)
            if len(found) < count and is_over:
                raise AssertionError(f"no event {name}, and the job gave up: {is_over}\n{self.output()}")
            return found if len(found) >= count else None

        return self.wait(f"event {name}", happened, timeout_seconds)

    def wait_step(self, step: int, timeout_seconds: float) -> None:
        self.wait(f"step {step}", lambda: any(row["step"] >= step for row in self.metrics()), timeout_seconds)

    def wait_quiet(self, timeout_seconds: float) -> None:
        """Wait until no job of the run waits or runs."""
        ids = lambda: {int(row["job_id"]) for row in self.jobs()}  # noqa: E731
        self.wait("no job left", lambda: not ids() & self.bed.squeue().keys(), timeout_seconds)

    def processes_on(self, host: str) -> list[int]:
        """Those of them on one node."""
        network, found = self.bed.nodes[host].network, []
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/ns/net") == network:
                    found.append(pid)
        return found

    def processes(self) -> dict[int, str]:
        """Processes anywhere on the bed that work in this run's folder or name it, by their pid on the host."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                place = os.readlink(process / "cwd")
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is not of our making
                continue
            mine = str(self.folder) in command or place.startswith(str(self.folder))
            if command and mine and int(process.name) != os.getpid():
                found[int(process.name)] = command
        return found


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of JSON lines; one that is being written is not there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_recipe(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"name": "chained", "run_dir": "run", "model": {"path": "model"}} | values
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def make_scripted(bed: SlurmBed, name: str, script: dict[str, object], **slurm: object) -> ChainedRun:
    """A run whose training follows `script`, not submitted yet; `slurm` goes into its recipe."""
    folder = bed.shared / name
    write_recipe(folder, slurm=slurm, train={"data": ["rows.jsonl"]})
    (folder / "run").mkdir()
    (folder / "run" / "script.json").write_text(json.dumps(script))
    return ChainedRun(bed, folder, bed.write_script(f"{name}.sh", SCRIPTED), {})
