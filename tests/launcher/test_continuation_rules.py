"""The rules by which a chain goes on, without Slurm: which command goes on, which node is left out, what is a hang."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.files import write_json
from cluster.run import fence
from cluster.run.rundir import RunDir, append_jsonl
from launcher.job import continuation
from launcher.job import node_health as ledger
from launcher.job.chain import STANDBY_OF, Chain, submission_environ, successor_argv
from launcher.job.hang import LEAST_SECONDS, HangWatch, Hung
from launcher.job.standing import progress_of
from launcher.slurm_config import SlurmConfig


def test_the_successor_is_submitted_as_the_first_was_but_for_what_it_waits_for() -> None:
    words = ["--nodes=2", "/p/a.sbatch", "r.yaml", "a=b"]
    first = ["sbatch", "--parsable", "--hold", "--dependency=afterany:1:2", "-x", "n9", *words]
    argv = successor_argv(first, "afterany:7", ["n3", "n9"])
    assert argv == ["sbatch", "--parsable", "--dependency=afterany:7", "--exclude=n9,n3", *words]
    assert successor_argv(argv, "afterany:8", [])[2:4] == ["--dependency=afterany:8", "--exclude=n9,n3"]


def test_a_job_inherits_nothing_of_the_job_that_submits_it() -> None:
    environ = {"HF_TOKEN": "x", "SLURM_CONF": "/c", "SLURM_JOB_ID": "7", "SBATCH_X": "1", fence.TOKEN_VARIABLE: "3"}
    assert submission_environ(environ, "7") == {"HF_TOKEN": "x", "SLURM_CONF": "/c", STANDBY_OF: "7"}


def write_jobs(run: RunDir, *jobs: tuple[str, int, list[int], str]) -> Chain:
    for stage, job_id, parents, reason in jobs:
        row = {"time": 0, "stage": stage, "job_id": job_id, "attempt": 1, "parent_job_ids": parents}
        append_jsonl(run.jobs, row | {"argv": ["sbatch"], "reason": reason})
    return Chain(run)


def test_stages_wait_for_stages_whichever_attempt_is_the_newest(tmp_path: Path) -> None:
    chain = write_jobs(
        RunDir(tmp_path),
        *(("synthesize", 1, [], "submitted"), ("train", 2, [1], "submitted"), ("export", 3, [2], "submitted")),
        *(("evaluate", 4, [3], "submitted"), ("synthesize", 5, [1], "continued"), ("train", 6, [2], "continued")),
    )
    assert chain.children_of("synthesize") == ["train"]
    assert chain.descendants_of("synthesize") == ["train", "export", "evaluate"]
    assert (chain.parents_of("train"), chain.parents_of("synthesize")) == (["synthesize"], [])
    assert [job.job_id for job in chain.of_stage("train")] == ["2", "6"]
    chain.add(chain.jobs[-1])
    assert Chain(RunDir(tmp_path)).jobs == chain.jobs, "ids are written as they were, and read as text"
    chain = write_jobs(RunDir(tmp_path), ("train", 8, [], "submitted"))
    assert [job.job_id for job in chain.of_stage("train")] == ["8"], "submitted again, it counts from there"


@pytest.mark.parametrize("cancelled", [False, True], ids=["dies", "cancelled"])
def test_an_attempt_of_a_cancelled_run_is_followed_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    submitted, asked, run = [], [], RunDir(tmp_path)

    def submit(argv: list[str], standby_of: str) -> str:
        submitted.append(standby_of)
        return str(10 + len(submitted))

    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setenv(fence.TOKEN_VARIABLE, "0")  # so that it is put back
    for name, stand_in in {
        "submit": submit, "ask": asked.append, "is_alive": lambda job_id: True, "expand_host_list": str.split
    }.items():  # fmt: skip
        monkeypatch.setattr(continuation, name, stand_in)
    monkeypatch.setattr(ledger, "to_exclude", lambda *_: [])
    monkeypatch.setattr(ledger, "culprits", lambda *_: ())
    chain = write_jobs(run, ("train", 7, [], "submitted"))
    attempt = continuation.Attempt(run, SlurmConfig(), chain, chain.jobs[-1])

    def stage() -> int:
        if cancelled:
            write_json(run.cancelled, {})
            attempt.standby = None  # as if Slurm had not answered when it was to be submitted
            attempt.keep_standby()
        return 75

    assert attempt.execute(stage, lambda *_: 0) == 75
    assert submitted == ["7"]
    if cancelled:
        again = continuation.Attempt(run, SlurmConfig(), chain, chain.jobs[-1])
        assert again.execute(lambda: 0, lambda *_: 0) == 75, "nor does one begin that was in the queue already"
        assert submitted == ["7"]


def fail(run: RunDir, job: int, hosts: str, failed: str, preflight: str = "") -> None:
    ledger.note(run, str(job), tuple(hosts.split()), tuple(failed.split()), preflight)


def test_a_node_is_suspect_after_three_crashes_in_a_row_and_cleared_by_one_good_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for job in range(2):
        fail(run, job, "a b", "a")
    assert ledger.suspects(run) == []
    fail(run, 2, "a c", "a c")
    assert ledger.suspects(run) == ["a"]
    fail(run, 3, "b c", "b", preflight="/tmp")
    assert ledger.suspects(run) == ["a", "b"], "one preflight is enough"
    fail(run, 4, "a b", "")
    assert ledger.suspects(run) == []
    fail(run, 5, "a", "a", preflight="port")
    assert ledger.suspects(run) == ["a"]
    later = ledger.FORGET_SECONDS + 10
    assert ledger.suspects(run, now=ledger._rows(run)[-1]["time"] + later) == [], "a day later nobody remembers"


@given(st.sets(st.sampled_from("abcdef")), st.lists(st.sampled_from("abcdefgh"), unique=True), st.integers(1, 6))
def test_what_is_left_is_always_enough_for_the_job(usable: set[str], bad: list[str], num_nodes: int) -> None:
    excluded = ledger.within(bad, usable, num_nodes)
    assert len(usable - set(excluded)) >= min(num_nodes, len(usable))
    assert [host for host in bad if host in excluded] == excluded, "the worst first"


def test_the_nodes_that_a_crash_began_on(tmp_path: Path) -> None:
    run, hosts = RunDir(tmp_path), ("a", "b", "c")
    folder = tmp_path / "attempt-7-0"
    folder.mkdir()

    def leave(**codes: int) -> tuple[str, ...]:
        for path in folder.iterdir():
            path.unlink()
        for number, (host, code) in enumerate(codes.items()):
            write_json(folder / f"node-{number}.exit.json", {"host": host, "exit_code": code})
        return ledger.culprits(run, "7", hosts)

    assert leave() == hosts
    assert leave(a=143, c=1) == ("b",), "it left no word"
    assert leave(a=143, b=1, c=143) == ("b",), "the others were ended for it"
    assert leave(a=137, b=137, c=137) == hosts


def test_an_attempt_that_died_with_its_node_is_noted_by_the_next(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    fence.claim(tmp_path, "train", "7", ("a",))
    fence.claim(tmp_path, "train", "8", ("b",))
    fail(run, 8, "b", "")
    for _ in range(2):
        ledger.catch_up(run)
    assert [(row["job_id"], row["failed"]) for row in ledger._rows(run)] == [("8", []), ("7", ["a"])]


def test_progress_is_what_is_on_the_disk(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert [progress_of(stage, run) for stage in ("synthesize", "train", "export", "evaluate")] == [0, 0, 0, 0]
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "00000.log").write_bytes(b"12345")
    assert progress_of("synthesize", run) == 5


class Clock:
    """Passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def grow(run: RunDir) -> None:
    append_jsonl(run.metrics, {"step": 1})


def test_no_file_is_no_sign_of_health(tmp_path: Path) -> None:
    clock = Clock()
    watch = HangWatch(RunDir(tmp_path), "train", SlurmConfig(start_timeout_seconds=100), clock)
    clock.now = 99
    watch()
    clock.now = 101
    with pytest.raises(Hung, match=r"train has not begun a step for 101 s \(slurm.start_timeout_seconds, here 100 s"):
        watch()


def test_the_deadline_grows_with_the_longest_step_and_rows_of_an_earlier_attempt_do_not_count(tmp_path: Path) -> None:
    run, clock = RunDir(tmp_path), Clock()
    grow(run)
    watch = HangWatch(run, "train", SlurmConfig(), clock)
    assert watch.limit_seconds == 3600, "nothing of this attempt is there yet"
    gaps = [800, 200, 150]  # start-up, and two steps
    for end in itertools.accumulate(gaps):
        clock.now = end
        grow(run)
        watch()
    assert watch.limit_seconds == 2000 > LEAST_SECONDS
    clock.now += 1999
    watch()
    clock.now += 2
    with pytest.raises(Hung, match="made no step for 2001 s"):
        watch()
