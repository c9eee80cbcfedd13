"""The files and folders at the top of a run folder, its event log, and the results of its stages.

run = RunDir(Path("runs/demo"))
run.event("synthesize", "started", num_engines=1)
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.files import append_jsonl

STAGES = ("synthesize", "train", "export", "evaluate")


def _path(name: str) -> property:
    return property(lambda run: run.root / name)


@dataclass(frozen=True)
class RunDir:
    """Paths inside a run folder. An instance reads and writes nothing by itself; `create` makes the folder."""

    root: Path

    recipe = _path("recipe.yaml")  # resolved: every value written out
    plan = _path("plan.json")
    events = _path("events.jsonl")
    metrics = _path("metrics.jsonl")
    logs = _path("logs")
    ray_logs = _path("logs/ray")

    data = _path("data")
    synthesized = _path("data/synthesized")
    rejected = _path("data/rejected")
    instructions = _path("data/instructions")
    progress = _path("data/progress.json")  # the last checkpoint of a synthesis
    inputs = _path("data/inputs.json")  # what the data is made from
    requests = _path("requests")  # the log of finished requests

    tokens = _path("tokens")  # datasets as token ids
    checkpoints = _path("checkpoints")
    zero = _path("zero.json")  # the ZeRO stage that `auto` chose, and why
    profile = _path("profile")
    tensorboard = _path("tensorboard")
    export = _path("export")
    evaluation = _path("evaluation")  # the answers of each evaluated model

    sweep = _path("sweep")  # the run folders of a sweep
    sweep_index = _path("sweep.json")
    jobs = _path("jobs.jsonl")  # one line for each submitted job
    nodes = _path("nodes.jsonl")  # the health of nodes
    code = _path("code")  # copies of the source code that jobs run
    container = _path("container.json")
    claims = _path("claims")  # one file for each fencing token

    lock = _path(".lock")
    synthesis_lock = _path(".lock-synthesize")  # also held by a synthesis that runs without the launcher
    submission_lock = _path(".lock-submit")

    def create(self) -> "RunDir":
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    def attempt_dir(self, job_id: str, restart_count: int) -> Path:
        """Where the nodes of one attempt of one job leave files for each other."""
        return self.root / f"attempt-{job_id}-{restart_count}"

    def job_log(self, stage: str) -> Path:
        """The output of a Slurm job in all its attempts. Slurm replaces `%j` with the job id."""
        return self.logs / f"{stage}-%j.log"

    def answers(self, model: str) -> Path:
        """The answers of one evaluated model."""
        return self.evaluation / f"{model}.json"

    def result(self, stage: str) -> Path:
        return self.root / f"result-{stage}.json"

    def read_result(self, stage: str) -> dict | None:
        """The result of the stage's last attempt. None means that none has ended yet."""
        file = self.result(stage)
        return json.loads(file.read_text()) if file.is_file() else None

    def event(self, stage: str, event: str, **fields: object) -> None:
        """Append one line to `events.jsonl`."""
        append_jsonl(self.events, {"time": round(time.time(), 3), "stage": stage, "event": event, **fields})
