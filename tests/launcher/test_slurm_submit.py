"""A chain is submitted as a whole or not at all, and what Slurm would never run is refused before."""

import re
from pathlib import Path

import pytest
import yaml

from cluster.errors import InputError, TunesmithError
from cluster.files import append_jsonl, read_jsonl
from cluster.run.rundir import RunDir
from launcher.slurm.client import Partition, SlurmNoAnswer, SlurmRefused, clean_environment
from launcher.slurm.sbatch import Submission
from launcher.slurm.submit import check_request, check_with_slurm, submit
from launcher.slurm.submitted import cancel_run, read_jobs
from launcher.slurm_config import JobConfig
from launcher.status import read_statuses
from tests.launcher.slurm_chain import FakeSlurm, queue_line, recipe_of, submission_of


def prepared(folder: Path) -> Submission:
    recipe = recipe_of(folder)
    recipe.run_dir.mkdir(exist_ok=True)
    return submission_of(recipe)


def submit_here(chain: Submission, slurm: FakeSlurm) -> dict[str, str]:
    return submit(chain, slurm, lambda argv: None)


def test_nothing_starts_before_all_is_there_and_all_is_written_down(tmp_path: Path) -> None:
    slurm, chain = FakeSlurm(), prepared(tmp_path)
    ids = submit_here(chain, slurm)
    assert ids == {"train": "101", "export": "102", "evaluate": "103"}
    assert [words[0] for words in slurm.said] == ["sbatch", "sbatch", "sbatch", "squeue", "scontrol"]
    assert "--hold" in slurm.said[0] and slurm.said[-1] == ["scontrol", "release", "101"]
    rows = read_jobs(chain.recipe.run)
    assert [list(row.argv) for row in rows] == slurm.said[:3] == [job.argv(ids) for job in chain.jobs]
    assert [row.parent_job_ids for row in rows] == [(), ("101",), ("102",)]
    assert rows[1].log == tmp_path / "run" / "logs" / "export-102.log"
    assert rows[1].log.parent.is_dir()  # or Slurm could not write there
    raw = read_jsonl(tmp_path / "run" / "jobs.jsonl")[0]
    assert list(raw) == ["time", "stage", "job_id", "parent_job_ids", "argv"]


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


@pytest.mark.parametrize("answer", ["a banner", "no answer"])
def test_a_job_whose_id_sbatch_does_not_print_is_found_by_its_name(tmp_path: Path, answer: str) -> None:
    def sbatch(job_id: str) -> str:
        if answer == "no answer":
            raise SlurmNoAnswer("sbatch: Socket timed out on send/recv operation")
        return f"------\n Welcome to cluster 3\n--> Verifying...OK\n{'' if job_id == '102' else job_id}\n"

    slurm = FakeSlurm(sbatch=sbatch)
    assert submit_here(prepared(tmp_path), slurm) == {"train": "101", "export": "102", "evaluate": "103"}
    assert slurm.said[-1] == ["scontrol", "release", "101"]


def test_a_job_that_slurm_took_although_sbatch_failed_is_taken_back(tmp_path: Path) -> None:
    def sbatch(job_id: str) -> str:
        if job_id == "102":
            raise SlurmRefused("sbatch: something is odd")
        return job_id

    slurm = FakeSlurm(sbatch=sbatch)
    with pytest.raises(SlurmRefused, match="something is odd"):
        submit_here(prepared(tmp_path), slurm)
    assert {line.split("|")[1] for line in slurm.queue_lines.values()} == {"CANCELLED"}


def test_an_undone_submission_needs_no_space_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = FakeSlurm()
    submit_here(prepared(tmp_path), slurm)
    cancel_run(run := RunDir(tmp_path / "run"), slurm)
    before = run.jobs.read_bytes()

    def full(path: Path, row: dict) -> None:
        if row["stage"] == "export":
            raise InputError("the disk is full")
        append_jsonl(path, row)

    monkeypatch.setattr("launcher.slurm.submit.append_jsonl", full)
    with pytest.raises(InputError, match="the disk is full"):
        submit_here(prepared(tmp_path), slurm)
    assert run.jobs.read_bytes() == before
    assert {line.split("|")[1] for line in slurm.queue_lines.values()} == {"CANCELLED"}


def test_a_parent_that_slurm_took_without_knowing_it_is_noticed(tmp_path: Path) -> None:
    chain = prepared(tmp_path)
    slurm = FakeSlurm(queue_lines={"102": queue_line("102", name=chain.jobs[1].name)})  # as after one that never was
    with pytest.raises(TunesmithError, match=r"job 102 \(export\), which now is PENDING, waiting for \(null\)"):
        submit_here(chain, slurm)
    assert [words[1] for words in slurm.said if words[0] == "scancel"] == ["103", "102", "101"]


def test_a_run_with_jobs_in_the_queue_is_refused_and_after_a_cancel_goes_on(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    submit_here(prepared(tmp_path), slurm)
    with pytest.raises(InputError, match=r"has jobs in the queue: 101 \(pending\), 102 .*tunesmith cancel"):
        submit_here(prepared(tmp_path), slurm)
    assert cancel_run(RunDir(tmp_path / "run"), slurm) == ["103", "102", "101"]
    run = prepared(tmp_path).recipe.run
    submit_here(prepared(tmp_path), slurm)
    assert len(read_jobs(run)) == 6


@pytest.mark.parametrize("num_silent", [1, 2])
def test_a_squeue_that_prints_nothing_starts_no_second_chain(tmp_path: Path, num_silent: int) -> None:
    slurm = FakeSlurm()
    submit_here(prepared(tmp_path), slurm)
    slurm.num_silent[0] = num_silent
    for _ in range(num_silent):
        with pytest.raises(SlurmNoAnswer, match="squeue printed nothing, although Slurm knows job 101"):
            submit_here(prepared(tmp_path), slurm)
    with pytest.raises(InputError, match="has jobs in the queue"):
        submit_here(prepared(tmp_path), slurm)
    assert len(read_jobs(RunDir(tmp_path / "run"))) == 3


def test_jobs_of_others_that_have_the_ids_of_this_run_are_neither_shown_nor_cancelled(tmp_path: Path) -> None:
    """Slurm counts anew, or another cluster sees the folder."""
    slurm = FakeSlurm()
    submit_here(chain := prepared(tmp_path), slurm)
    run, names = RunDir(tmp_path / "run"), [job.name for job in chain.jobs]
    others = {"101": "thesis", "102": names[1][:-8] + "00000000", "103": names[2]}
    slurm.queue_lines.update({job_id: queue_line(job_id, "RUNNING", name) for job_id, name in others.items()})
    slurm.queue_lines["103"] = re.sub(r"20\d\d-", "2001-", slurm.queue_lines["103"])  # submitted long before
    assert cancel_run(run, slurm) == []
    [status] = read_statuses([run.root], slurm)
    assert [stage.state for stage in status.stages] == ["NOT STARTED", *["CANCELLED"] * 3]


def test_a_full_disk_does_not_keep_jobs_from_being_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = FakeSlurm()
    submit_here(prepared(tmp_path), slurm)

    def full(*_: object, **__: object) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(RunDir, "event", full)
    assert cancel_run(RunDir(tmp_path / "run"), slurm) == ["103", "102", "101"]


def test_a_cancel_that_slurm_does_not_carry_out_changes_nothing(tmp_path: Path) -> None:
    submit_here(chain := prepared(tmp_path), FakeSlurm())
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    slurm = FakeSlurm(queue_lines={"101": queue_line("101", "RUNNING", chain.jobs[0].name)}, refuse=("scancel",))
    with pytest.raises(SlurmRefused):
        cancel_run(RunDir(tmp_path / "run"), slurm)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    chain = prepared(tmp_path)
    run = chain.recipe.run
    other = recipe_of(tmp_path).model_copy(update={"seed": 7})
    other.save(run)
    (run.checkpoints / "step_000001").mkdir(parents=True)
    slurm = FakeSlurm()
    with pytest.raises(InputError, match=r"holds results of another recipe: seed \(was 7, now 0\)"):
        submit_here(chain, slurm)
    assert slurm.said == [] and yaml.safe_load(run.recipe.read_text())["seed"] == 7


PARTITIONS = [
    Partition("gpu", True, 4, "1:00:00", True), Partition("long", False, 2, "infinite", True),
    Partition("old", False, 9, "infinite", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"partition": "gpuu"}, "slurm.partition of train: there is no partition gpuu here. Did you mean `gpu`?"),
        ({"partition": "qqq"}, "there is no partition qqq here."),
        ({"nodes": 5}, "slurm.nodes=5 of train: partition gpu has 4."),
        ({"nodes": 3, "partition": "long"}, "partition long has 2"),
        ({"time": "1:00:01"}, "slurm.time=1:00:01 of train is 3601 s, and partition gpu allows 3600 s"),
        ({"partition": "old"}, "old is down"),
    ],
)
def test_what_no_partition_has_is_refused_by_its_key(wanted: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_request("train", JobConfig(**wanted), PARTITIONS)


@pytest.mark.parametrize("refuse", [(), ("sbatch", "--test-only")])
def test_a_refusal_lists_the_partitions_and_their_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: tuple[str, ...]
) -> None:
    listed = "gpu (default, 4 nodes, at most 1:00:00), long (2 nodes, no time limit), old (down)."
    monkeypatch.setattr(FakeSlurm, "partitions", lambda self: PARTITIONS)
    chain = submission_of(recipe_of(tmp_path, {} if refuse else {"partition": "qqq"}))
    with pytest.raises(InputError, match=re.escape(f"Here are: {listed}")):
        check_with_slurm(chain, FakeSlurm(refuse=refuse))


@pytest.mark.parametrize("wanted", [{}, {"partition": "gpu,long", "time": "2:00:00"}, {"nodes": 4, "time": "60"}])
def test_what_a_partition_has_is_not_refused(wanted: dict) -> None:
    check_request("train", JobConfig(**wanted), PARTITIONS)


def test_a_job_around_us_leaves_nothing_in_the_new_one() -> None:
    around = {
        "SLURM_JOB_ID": "5", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_PARTITION": "x", "SRUN_DEBUG": "3", "RANK": "0",
        "MASTER_ADDR": "n1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TUNESMITH_FENCING_TOKEN": "4", "RANKING": "yes",
        "SQUEUE_PARTITION": "x", "SINFO_FORMAT": "%P", "SCANCEL_STATE": "PENDING", "PMI_RANK": "1", "HOME": "/",
        "SACCT_FORMAT": "jobid", "SCONTROL_ALL": "1", "_SLURM_SPANK_OPTION_pyxis_container_image": "x",
    }  # fmt: skip
    assert clean_environment(around) == {"SLURM_CONF": "/etc/slurm.conf", "RANKING": "yes", "HOME": "/"}


def test_a_silent_slurm_is_no_refusal(tmp_path: Path) -> None:
    from launcher.slurm.client import Slurm

    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\nexec sleep 60\n")
    command.chmod(0o755)
    slurm = Slurm({"PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout_seconds=0.2)
    with pytest.raises(SlurmNoAnswer, match=r"squeue gave no answer in 0.2 s"):
        slurm.queue(["1"])
