"""Somebody who types our commands on the bed's controller."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher.slurm.snapshot import code_files
from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT

SECRET = "canary-5d0c7e93b1"
ENV = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MY_SECRET": SECRET, "COLUMNS": "200", "PYTHONSAFEPATH": "1"}


class User:
    """Somebody who types commands on the controller, in a folder of their own, with a checkout of their own."""

    def __init__(self, bed: SlurmBed, folder: Path) -> None:
        self.bed, self.folder, self.checkout = bed, folder, folder / "checkout"
        for file in code_files(PROJECT):
            (self.checkout / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / file, self.checkout / file)

    @property
    def path(self) -> str:
        return self.bed.env["PATH"]

    def argv(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "launcher.cli", *map(str, words)]

    def tunesmith(self, *words: object, code: int = 0, **env: str) -> str:
        """Run a command that has to end with `code`; returns what it prints."""
        where = ENV | {"PYTHONPATH": str(self.checkout)} | env
        try:
            output, ended = self.bed.client(*self.argv(*words), cwd=self.folder, env=where), 0
        except subprocess.CalledProcessError as error:
            output, ended = error.stdout + error.stderr, error.returncode
        assert ended == code, output
        return output

    def status(self, run: str = "run") -> dict[str, str]:
        """The state of each stage."""
        return {words[0]: words[1] for words in self.rows("status", run)}

    def rows(self, *words: object) -> list[list[str]]:
        lines = self.tunesmith(*words).splitlines()
        return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]

    def jobs(self, run: str = "run") -> list[dict]:
        return [json.loads(line) for line in (self.folder / run / "jobs.jsonl").read_text().splitlines()]

    def wait(self, what: str, check: Callable[[], object], timeout_seconds: float = 240) -> object:
        deadline = time.monotonic() + timeout_seconds
        while not (found := check()):
            assert time.monotonic() < deadline, f"{what}: {self.status()}\n{self.logs()}\n{self.bed.log()}"
            time.sleep(0.3)
        return found

    def logs(self) -> str:
        """What jobs have printed so far."""
        paths = sorted(self.folder.rglob("logs/*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in paths)
