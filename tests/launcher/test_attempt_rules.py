"""The rules by which a run goes on, without Slurm: who is requeued, which node is left out, what is a hang."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError, TunesmithError
from cluster.files import append_jsonl, read_jsonl, write_json
from cluster.run import fence
from cluster.run.rundir import RunDir
from launcher.done import progress_of
from launcher.job import node_health, requeue
from launcher.job.attempt import Attempt
from launcher.job.hang import MIN_LIMIT_SECONDS, HangWatch, Hung, StepWatch
from launcher.slurm.client import Slurm, SlurmNoAnswer, SlurmRefused
from launcher.slurm.snapshot import CODE_VARIABLE, RUNNING_CODE, check_code_of_step, take_snapshot
from launcher.slurm.submitted import SubmittedJob
from launcher.slurm_config import SlurmConfig
from tests.launcher.slurm_chain import recipe_of

RUNNING = "JobId=7 JobState=RUNNING Reason=None Restarts=0 NodeList=n1"
DATA = {"precision": "fp32", "data": ["rows.jsonl"]}
JOB = SubmittedJob(0.0, "train", "7", (), ("sbatch", "--exclude=n8", "--output=/logs/%j", "train.sbatch"))


@dataclass(frozen=True)
class JobSlurm(Slurm):
    """Answers `scontrol show job` with these lines, one after another, the last one again and again."""

    shown: list[str] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)
    refuse: tuple[str, ...] = ()
    no_answer: tuple[str, ...] = ()

    def call(self, argv: Sequence[str]) -> str:
        if "show" in argv:
            answer = self.shown.pop(0) if len(self.shown) > 1 else self.shown[0]
            if answer == "no answer":
                raise SlurmNoAnswer("scontrol gave no answer")
            return answer
        self.commands.append(list(argv))
        if argv[1] in self.refuse:
            raise SlurmRefused(f"{argv[0]}: refused")
        if argv[1] in self.no_answer:
            raise SlurmNoAnswer(f"{argv[0]} gave no answer")
        return ""


@pytest.fixture(autouse=True)
def job_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv(fence.TOKEN_VARIABLE, "0")  # so that it is put back
    monkeypatch.setattr(requeue, "RETRY_SECONDS", 0)


def events(run: RunDir) -> list[str]:
    return [row["event"] for row in read_jsonl(run.events)] if run.events.exists() else []


CHANGE = ["scontrol", "update", "JobId=7", "StartTime=now+15", "ExcNodeList=n8"]


@pytest.mark.parametrize(
    "shown",
    [[RUNNING], ["no answer", RUNNING], [RUNNING.replace("RUNNING Reason=None", "COMPLETING Reason=TimeLimit")]],
)
def test_a_job_that_still_runs_is_requeued_and_starts_soon(tmp_path: Path, shown: list[str]) -> None:
    slurm = JobSlurm(shown=shown)
    requeue.requeue(RunDir(tmp_path), JOB, slurm)
    assert slurm.commands == [["scontrol", "requeue", "7"], CHANGE]
    assert events(RunDir(tmp_path)) == ["requeued"]


def test_a_job_whose_requeueing_was_not_answered_is_requeued_once(tmp_path: Path) -> None:
    slurm = JobSlurm(shown=[RUNNING, "JobId=7 JobState=COMPLETING Reason=None Restarts=1"], no_answer=("requeue",))
    requeue.requeue(RunDir(tmp_path), JOB, slurm)
    assert slurm.commands == [["scontrol", "requeue", "7"], CHANGE]


def test_a_job_that_slurm_has_requeued_itself_is_not_requeued_again(tmp_path: Path) -> None:
    slurm = JobSlurm(shown=["JobId=7 JobState=COMPLETING Reason=None Restarts=1"])
    requeue.requeue(RunDir(tmp_path), JOB, slurm)
    assert slurm.commands == [CHANGE]


def test_a_cancelled_job_stays_cancelled(tmp_path: Path) -> None:
    slurm, run = JobSlurm(shown=["JobId=7 JobState=COMPLETING Reason=None Restarts=0"]), RunDir(tmp_path)
    write_json(run.result("train"), {"status": "preempted", "step": 3})
    requeue.requeue(run, JOB, slurm)
    assert slurm.commands == [] and events(run) == ["cancelled"]
    assert run.read_result("train") == {"status": "preempted", "step": 3, "cancelled": True}


def test_a_refusal_is_in_the_result_and_a_job_that_cannot_be_changed_is_requeued_all_the_same(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(SlurmRefused):
        requeue.requeue(run, JOB, JobSlurm(shown=[RUNNING], refuse=("requeue",)))
    assert events(run) == ["not requeued"]
    assert run.read_result("train") == {"status": "failed", "message": "scontrol: refused"}
    requeue.requeue(run, JOB, JobSlurm(shown=[RUNNING], refuse=("update",)))
    assert events(run)[1:] == ["requeued", "requeued job not changed"]


def test_a_node_that_is_cut_off_stops_asking_when_another_attempt_owns_the_run(tmp_path: Path) -> None:
    fence.claim(tmp_path, "train", "7", ("n1",))
    fence.claim(tmp_path, "train", "7", ("n2",), restart_count=1)
    with pytest.raises(fence.Superseded):
        requeue.requeue(RunDir(tmp_path), JOB, JobSlurm(shown=["no answer"]))


def test_nodes_that_failed_too_often_are_excluded_besides_those_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_health, "to_exclude", lambda *_: ["n1"])
    slurm = JobSlurm(shown=[RUNNING])
    requeue.requeue(RunDir(tmp_path), JOB, slurm)
    assert slurm.commands[1][-1] == "ExcNodeList=n8,n1"


def attempt(tmp_path: Path, *parents: SubmittedJob) -> Attempt:
    recipe = recipe_of(tmp_path, {"max_attempts_without_progress": 2}, train=DATA)
    return Attempt(recipe.run.create(), recipe, JOB, list(parents), ("n1",))


def test_an_attempt_that_fails_is_followed_by_another_until_none_makes_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = []
    for count, code in enumerate((137, 75)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
        codes.append(attempt(tmp_path).execute(lambda code=code: code, lambda *_: 0))
    assert codes == [75, 1]
    run = RunDir(tmp_path / "run")
    assert events(run) == ["attempt started", "crashed", "attempt started", "gave up"]
    assert "NO PROGRESS: 2 attempts in a row" in run.read_result("train")["message"]
    assert attempt(tmp_path).execute(lambda: 0, lambda *_: 0) == 1, "nor does one begin that Slurm has requeued"


def test_attempts_that_another_job_has_ended_do_not_count(tmp_path: Path) -> None:
    for restart_count in range(4):
        fence.claim(tmp_path / "run", "train", "7", restart_count=restart_count)
        fence.claim(tmp_path / "run", "train", "8")
    assert not attempt(tmp_path)._is_without_progress()
    for restart_count in range(2):
        fence.claim(tmp_path / "run", "train", "7", restart_count=restart_count)
    assert attempt(tmp_path)._is_without_progress()


def test_an_attempt_that_another_job_has_ended_is_not_requeued(tmp_path: Path) -> None:
    fence.claim(tmp_path, "train", "7")
    fence.claim(tmp_path, "train", "8")
    slurm = JobSlurm(shown=[RUNNING])
    with pytest.raises(fence.Superseded):
        requeue.requeue(RunDir(tmp_path), JOB, slurm)
    assert slurm.commands == []


def test_a_job_runs_only_the_code_that_was_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = take_snapshot(tmp_path / "run" / "code")
    script = str(snapshot / "slurm" / "train.sbatch")
    job = dataclasses.replace(JOB, argv=("sbatch", "--output=/logs/%j", script, "recipe.yaml"))
    own = attempt(tmp_path)
    own.job = job
    assert own.execute(lambda: 75, lambda *_: 0) == 75, "the same code, at another place"
    monkeypatch.setattr("launcher.job.attempt.code_hash", lambda: "0" * 16)
    assert own.execute(lambda: 75, lambda *_: 0) == 2
    assert f"submitted is {snapshot}, and the job runs that in" in own.run.read_result("train")["message"]
    (snapshot / "trainer" / "train.py").write_text("edited")
    assert take_snapshot(tmp_path / "run" / "code") == snapshot
    assert (snapshot / "trainer" / "train.py").read_text() != "edited", "it is made anew"


def test_a_step_that_python_takes_from_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    check_code_of_step()
    monkeypatch.setenv(CODE_VARIABLE, str(RUNNING_CODE))
    check_code_of_step()
    monkeypatch.setenv(CODE_VARIABLE, "/run/code/1")
    with pytest.raises(InputError, match="the job runs the code in /run/code/1, and this part of it that in"):
        check_code_of_step()


def test_bad_input_and_a_parent_that_is_not_done_end_the_job(tmp_path: Path) -> None:
    parent = SubmittedJob(0.0, "synthesize", "6", (), ("sbatch", "--output=/logs/synthesize-%j.log"))
    assert attempt(tmp_path).execute(lambda: 2, lambda *_: 0) == 2
    assert attempt(tmp_path, parent).execute(lambda: 0, lambda *_: 0) == 2
    run = RunDir(tmp_path / "run")
    assert "train began although synthesize is not done" in run.read_result("train")["message"]
    assert "/logs/synthesize-6.log" in run.read_result("train")["message"]


def test_an_error_of_the_file_system_is_a_crash_of_the_attempt(tmp_path: Path) -> None:
    def broken() -> int:
        raise OSError(116, "Stale file handle")

    assert attempt(tmp_path).execute(broken, lambda *_: 0) == 75
    assert "Stale file handle" in read_jsonl(tmp_path / "run" / "events.jsonl")[-1]["reason"]


def fail(run: RunDir, token: int, hosts: str, failed: str, preflight: str = "") -> None:
    node_health.note(run, token, tuple(hosts.split()), tuple(failed.split()), preflight)


def test_a_node_is_excluded_after_three_crashes_in_a_row_and_cleared_by_one_good_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for job in range(2):
        fail(run, job, "a b", "a")
    assert node_health.often_failed(run) == []
    fail(run, 2, "a c", "a c")
    assert node_health.often_failed(run) == ["a"]
    fail(run, 3, "b c", "b", preflight="/tmp")
    assert node_health.often_failed(run) == ["a", "b"], "one preflight is enough"
    fail(run, 4, "a b", "")
    assert node_health.often_failed(run) == []
    fail(run, 5, "a", "a", preflight="port")
    assert node_health.often_failed(run) == ["a"]
    later = node_health.FORGET_SECONDS + 10
    assert node_health.often_failed(run, now=node_health._rows(run)[-1]["time"] + later) == [], "it counts for a day"


@given(st.sets(st.sampled_from("abcdef")), st.lists(st.sampled_from("abcdefgh"), unique=True), st.integers(1, 6))
def test_what_is_left_is_always_enough_for_the_job(usable: set[str], bad: list[str], num_nodes: int) -> None:
    excluded = node_health.leave_enough(bad, usable, num_nodes)
    assert len(usable - set(excluded)) >= min(num_nodes, len(usable))
    assert [host for host in bad if host in excluded] == excluded, "the worst first"


def test_the_nodes_that_a_crash_began_on(tmp_path: Path) -> None:
    hosts, folder = ("a", "b", "c"), tmp_path / "attempt-7-0"
    folder.mkdir()

    def leave(**codes: int) -> tuple[str, ...]:
        for path in folder.iterdir():
            path.unlink()
        for number, (host, code) in enumerate(codes.items()):
            write_json(folder / f"node-{number}.exit.json", {"host": host, "exit_code": code})
        return node_health.failed_nodes(folder, hosts)

    assert leave() == hosts
    assert leave(a=143, c=1) == ("b",), "it left no exit report"
    assert leave(a=143, b=1, c=143) == ("b",), "the others were ended for it"
    assert leave(a=137, b=137, c=137) == hosts


def test_an_attempt_that_died_with_its_node_is_noted_by_the_next(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    fence.claim(tmp_path, "train", "7", ("a",))
    fence.claim(tmp_path, "train", "7", ("b",), restart_count=1)
    fail(run, 2, "b", "")
    for _ in range(2):
        node_health.catch_up(run)
    assert [(row["fencing_token"], row["failed"]) for row in node_health._rows(run)] == [(2, []), (1, ["a"])]


def test_progress_is_what_is_on_the_disk(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert [progress_of(stage, run) for stage in ("synthesize", "train", "export", "evaluate")] == [0, 0, 0, 0]
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "00000.log").write_bytes(b"12345")
    assert progress_of("synthesize", run) == 5


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pass_time(watch: HangWatch | StepWatch, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        watch.check()


def grow(run: RunDir) -> None:
    append_jsonl(run.metrics, {"step": 1})


def test_no_file_is_no_sign_of_health(tmp_path: Path) -> None:
    clock = Clock()
    watch = HangWatch(RunDir(tmp_path), "train", SlurmConfig(start_timeout_seconds=100), clock)
    pass_time(watch, clock, 99)
    clock.now = 101
    with pytest.raises(Hung, match=r"train has not begun a step for 101 s \(slurm.start_timeout_seconds, here 100 s"):
        watch.check()


def test_the_deadline_grows_with_the_longest_step_and_rows_of_an_earlier_attempt_do_not_count(tmp_path: Path) -> None:
    run, clock = RunDir(tmp_path), Clock()
    grow(run)
    watch = HangWatch(run, "train", SlurmConfig(), clock)
    assert watch.limit_seconds == 3600, "nothing of this attempt is there yet"
    gaps = [800, 200, 150]  # start-up, and two steps
    for gap in gaps:
        pass_time(watch, clock, gap - 1)
        clock.now += 1
        grow(run)
        watch.check()
    assert watch.limit_seconds == 2000 > MIN_LIMIT_SECONDS
    pass_time(watch, clock, 1999)
    clock.now += 2
    with pytest.raises(Hung, match="made no step for 2001 s"):
        watch.check()


def test_a_step_that_goes_on_after_the_end_of_a_node_is_lost(tmp_path: Path) -> None:
    clock = Clock()
    watch = StepWatch(tmp_path, clock)
    pass_time(watch, clock, 1000)
    write_json(tmp_path / "node-1.exit.json", {"exit_code": 0})
    pass_time(watch, clock, 100)
    clock.now += 1000  # suspended
    with pytest.raises(TunesmithError, match="a node ended 120 s ago, and srun goes on"):
        pass_time(watch, clock, 30)


def test_the_time_in_which_the_watch_was_suspended_does_not_count(tmp_path: Path) -> None:
    run, clock = RunDir(tmp_path), Clock()
    watch = HangWatch(run, "train", SlurmConfig(hang_timeout_seconds=30), clock)
    for _ in range(3):
        pass_time(watch, clock, 2)
        grow(run)
    clock.now += 10_000
    watch.check()
    pass_time(watch, clock, 18)  # ten seconds of the gap count
    with pytest.raises(Hung, match="made no step for 31 s"):
        pass_time(watch, clock, 20)
