"""A chain is submitted as a whole or not at all, and what Slurm would never run is refused before."""

import re
from pathlib import Path

import pytest
import yaml

from cluster.errors import InputError, TunesmithError
from cluster.files import read_jsonl
from launcher.slurm.cancel import cancel_run
from launcher.slurm.client import Partition, SlurmSilent, scrubbed
from launcher.slurm.jobs import jobs_of
from launcher.slurm.submit import Prepared, check_request, submit
from launcher.slurm.submitted import read_jobs
from launcher.slurm_config import JobConfig
from tests.launcher.slurm_chain import FakeSlurm, chain_of, recipe_of


def prepared(folder: Path) -> Prepared:
    recipe = recipe_of(folder)
    (recipe.run_dir).mkdir(exist_ok=True)
    chain = chain_of(recipe)
    return Prepared(chain, jobs_of(chain))


def submit_here(chain: Prepared, slurm: FakeSlurm) -> dict[str, str]:
    return submit(chain, slurm, lambda argv: None)


def test_nothing_starts_before_all_is_there_and_all_is_written_down(tmp_path: Path) -> None:
    slurm, chain = FakeSlurm(), prepared(tmp_path)
    ids = submit_here(chain, slurm)
    assert ids == {"train": "101", "export": "102", "evaluate": "103"}
    assert [words[0] for words in slurm.said] == ["sbatch", "sbatch", "sbatch", "squeue", "scontrol"]
    assert "--hold" in slurm.said[0] and slurm.said[-1] == ["scontrol", "release", "101"]
    rows = read_jobs(chain.chain.recipe.run)
    assert [list(row.argv) for row in rows] == slurm.said[:3] == [job.argv(ids) for job in chain.jobs]
    assert [row.parent_job_ids for row in rows] == [(), ("101",), ("102",)]
    assert rows[1].log == tmp_path / "run" / "logs" / "attempt-1" / "export-102.log"
    assert rows[1].log.parent.is_dir()  # or Slurm could not write there
    raw = read_jsonl(tmp_path / "run" / "jobs.jsonl")[0]
    assert list(raw) == ["time", "stage", "job_id", "attempt", "parent_job_ids", "argv", "reason"]


@pytest.mark.parametrize(
    ("refuse", "at"), [(("sbatch",), 2), (("sbatch",), 3), (("squeue",), 1), (("scontrol", "release"), 1)]
)
def test_what_fails_on_the_way_takes_everything_back(tmp_path: Path, refuse: tuple[str, ...], at: int) -> None:
    slurm, chain = FakeSlurm(refuse=refuse, refuse_at=at), prepared(tmp_path)
    with pytest.raises(InputError, match="refused"):
        submit_here(chain, slurm)
    submitted = [job_id for job_id, line in slurm.queue_lines.items() if "PENDING" in line]
    assert submitted == []
    cancelled = [words[1] for words in slurm.said if words[0] == "scancel"]
    assert cancelled == sorted(cancelled, reverse=True) and len(cancelled) == (at - 1 if refuse == ("sbatch",) else 3)
    assert not (tmp_path / "run" / "jobs.jsonl").exists()


def test_a_parent_that_slurm_took_without_knowing_it_is_noticed(tmp_path: Path) -> None:
    slurm = FakeSlurm(queue_lines={"102": "102|PENDING|0:00|1||(null)|None"})  # as after a job that never was
    with pytest.raises(TunesmithError, match=r"job 102 \(export\), which now is PENDING, waiting for \(null\)"):
        submit_here(prepared(tmp_path), slurm)
    assert [words[1] for words in slurm.said if words[0] == "scancel"] == ["103", "102", "101"]


def test_a_run_with_jobs_in_the_queue_is_refused_and_after_a_cancel_goes_on(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    submit_here(prepared(tmp_path), slurm)
    with pytest.raises(InputError, match=r"has jobs in the queue: 101 \(pending\), 102 .*tunesmith cancel"):
        submit_here(prepared(tmp_path), slurm)
    assert cancel_run(tmp_path / "run", slurm) == ["103", "102", "101"]
    run = prepared(tmp_path).chain.recipe.run
    assert run.cancelled.is_file()
    submit_here(prepared(tmp_path), slurm)
    assert not run.cancelled.exists() and len(read_jobs(run)) == 6


def test_a_job_that_is_submitted_during_the_cancel_is_cancelled_too(tmp_path: Path, monkeypatch) -> None:
    slurm = FakeSlurm()
    submit_here(prepared(tmp_path), slurm)
    file = tmp_path / "run" / "jobs.jsonl"
    slurm.queue_lines["101"] = "101|RUNNING|0:10|1|n1|(null)|None"

    def one_more(self: FakeSlurm, job_ids: list[str]) -> None:
        for job_id in job_ids:
            self.call(["scancel", job_id])
        if "999" not in slurm.queue_lines:
            slurm.queue_lines["999"] = "999|PENDING|0:00|1||afterany:101(unfulfilled)|Dependency"
            line = file.read_text().splitlines()[0]
            file.write_text(file.read_text() + line.replace('"101"', '"999"') + "\n")

    monkeypatch.setattr(FakeSlurm, "cancel", one_more)
    monkeypatch.setattr("launcher.slurm.cancel.POLL_SECONDS", 0)
    assert cancel_run(tmp_path / "run", slurm) == ["103", "102", "101", "999"]


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    chain = prepared(tmp_path)
    run = chain.chain.recipe.run
    other = recipe_of(tmp_path).model_copy(update={"seed": 7})
    other.save(run)
    (run.checkpoints / "step_000001").mkdir(parents=True)
    slurm = FakeSlurm()
    with pytest.raises(InputError, match=r"holds results of another recipe: seed \(was 7, now 0\)"):
        submit_here(chain, slurm)
    assert slurm.said == [] and yaml.safe_load(run.recipe.read_text())["seed"] == 7


PARTITIONS = [
    Partition("gpu", True, 4, 3600, True), Partition("long", False, 2, None, True),
    Partition("old", False, 9, None, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"partition": "gpuu"}, "slurm.partition of train: there is no partition gpuu here; did you mean `gpu`?"),
        ({"partition": "qqq"}, "there are gpu, long, old."),
        ({"nodes": 5}, "slurm.nodes=5 of train: partition gpu has 4."),
        ({"nodes": 3, "partition": "long"}, "partition long has 2"),
        ({"time": "1:00:01"}, "slurm.time=1:00:01 of train is 3601 s, and partition gpu allows 3600 s"),
        ({"partition": "old"}, "old is down"),
    ],
)
def test_what_no_partition_has_is_refused_by_its_key(asked: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)):
        check_request("train", JobConfig(**asked), PARTITIONS)


@pytest.mark.parametrize("asked", [{}, {"partition": "gpu,long", "time": "2:00:00"}, {"nodes": 4, "time": "60"}])
def test_what_a_partition_has_is_not_refused(asked: dict) -> None:
    check_request("train", JobConfig(**asked), PARTITIONS)


def test_a_job_around_us_leaves_nothing_in_the_new_one() -> None:
    around = {
        "SLURM_JOB_ID": "5", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_PARTITION": "x", "SRUN_DEBUG": "3", "RANK": "0",
        "MASTER_ADDR": "n1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TUNESMITH_FENCING_TOKEN": "4", "RANKING": "yes",
        "HOME": "/",
    }  # fmt: skip
    assert scrubbed(around) == {"SLURM_CONF": "/etc/slurm.conf", "RANKING": "yes", "HOME": "/"}


def test_a_silent_slurm_is_no_refusal(tmp_path: Path) -> None:
    from launcher.slurm.client import Slurm

    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\nexec sleep 60\n")
    command.chmod(0o755)
    slurm = Slurm({"PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout_seconds=0.2)
    with pytest.raises(SlurmSilent, match=r"squeue gave no answer in 0.2 s"):
        slurm.queue(["1"])
