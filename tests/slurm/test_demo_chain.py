"""The demo as a chain of Slurm jobs over two nodes: vLLM engines, DeepSpeed ranks, export, evaluation."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.run.fence import claims
from cluster.run.manifest import verify_manifest
from generation.request_log import RequestLog
from tests.generation.harness import read_rows
from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT
from tests.slurm.test_bed import processes_of
from tests.slurm.user import User

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(1500)]

NUM_INSTRUCTIONS = 150
STAGES = ("synthesize", "train", "export", "evaluate")


@pytest.fixture
def user(slurm_cluster: SlurmBed, request: pytest.FixtureRequest) -> Iterator[User]:
    """With the demo's recipe, smaller, and slow enough to be struck: two engines of eight sequences on two nodes."""
    folder = slurm_cluster.shared / re.sub(r"\W", "-", request.node.name)
    folder.mkdir()
    recipe = yaml.safe_load((PROJECT / "recipes/demo/self_instruct.yaml").read_text())
    recipe |= {"run_dir": "run", "model": {"path": str(PROJECT / "models" / "world-base")}}
    recipe["engine"] |= {"num_replicas": 2, "max_num_seqs": 4}
    recipe["synthesize"]["num_instructions"] = NUM_INSTRUCTIONS
    recipe["train"] |= {"num_epochs": 1}
    two_nodes = {"nodes": 2, "cpus_per_task": 2, "memory": "2000M"}
    recipe["slurm"] = {"synthesize": two_nodes, "train": {"nodes": 2}, "evaluate": two_nodes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    yield User(slurm_cluster, folder)
    for job in slurm_cluster.squeue():
        slurm_cluster.client("scancel", str(job))


def num_logged_bytes(run: Path) -> int:
    """Of finished requests. They show that requests come in, and reading the log would repair it."""
    return sum(path.stat().st_size for path in (run / "requests").glob("*.log"))


def result(run: Path, stage: str) -> dict:
    return json.loads((run / f"result-{stage}.json").read_text())


def test_the_demo_ends_well_though_the_batch_host_dies_in_its_synthesis(slurm_cluster: SlurmBed, user: User) -> None:
    run = user.folder / "run"
    user.tunesmith("run", "recipe.yaml", "--on", "slurm")
    assert [job["stage"] for job in user.jobs()] == list(STAGES)
    user.wait("finished requests", lambda: num_logged_bytes(run) > 20_000, 400)
    (first,) = claims(run)
    host = first.hosts[0]
    with slurm_cluster.powered_off(host):
        user.wait("the next attempt", lambda: len(claims(run)) == 2, 300)
    user.wait("the end", lambda: set(user.status().values()) <= {"DONE", "FAILED", "CANCELLED"}, 900)
    assert user.status() == dict.fromkeys(STAGES, "DONE"), user.logs()

    synthesis = result(run, "synthesize")
    assert (synthesis["num_accepted"], synthesis["is_complete"]) == (NUM_INSTRUCTIONS, True)
    assert synthesis["resumed_requests"] > 0, "what the first attempt has finished is not generated again"
    assert len(synthesis["engines"]) == 2
    folder = run / "data" / "synthesized"
    assert verify_manifest(folder)["rows"] == synthesis["num_rows"]
    assert max(Counter(row["id"] for row in read_rows(folder)).values()) == 1
    with RequestLog(run / "requests") as log:
        assert len(log) == len(log.ids())
    assert result(run, "train")["status"] == "done"
    assert set(result(run, "evaluate")["models"]) >= {"base, chat", "tuned"}
    user.wait("an empty queue", lambda: slurm_cluster.squeue() == {}, 60)
    assert processes_of(str(user.folder), set()) == {}
