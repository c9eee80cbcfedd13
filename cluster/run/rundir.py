"""The run folder: one place that says where everything of a run lies, and the event log beside it.

run = RunDir(Path("runs/demo"))
run.event("synthesize", "started", num_engines=1)
"""

import errno
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.files import explain_full_disk

STAGES = ("synthesize", "train", "export", "evaluate")


@dataclass(frozen=True)
class RunDir:
    """Paths inside a run folder. Making one touches nothing; `create` makes the folder."""

    root: Path

    def create(self) -> "RunDir":
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def result(self, stage: str) -> Path:
        return self.root / f"result-{stage}.json"

    def event(self, stage: str, event: str, **fields: object) -> None:
        """Append one line to `events.jsonl`."""
        append_jsonl(self.events, {"time": round(time.time(), 3), "stage": stage, "event": event, **fields})


def append_jsonl(path: Path, row: dict) -> None:
    """Append one JSON line in a single write, so that lines of several processes never mix."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with explain_full_disk(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
