"""Synthesis as a Slurm job of several nodes: a real Ray on each, and every part of it killed once."""

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.run.manifest import verify_manifest
from generation.request_log import RequestLog
from tests.fakes import generated_ids, write_script
from tests.generation.harness import read_rows
from tests.slurm.bed import FINAL_STATES, SlurmBed
from tests.slurm.machine import PROJECT
from tests.slurm.test_bed import processes_of

SCRIPTS = PROJECT / "slurm"
NUM_INSTRUCTIONS = 60
ENV = {"TUNESMITH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
TWO_NODES = ["--nodes=2", "--nodelist=n[1-2]", "--cpus-per-task=1", "--mem=1500"]
RAY_SECONDS = 240  # for Ray to come up, or a job to end, on a machine that does other things as well
STALE_TOKEN = "left-by-an-earlier-ray-of-this-user"


class Place:
    """A folder below the shared one with a recipe, and what its jobs do."""

    def __init__(self, bed: SlurmBed, folder: Path) -> None:
        self.bed = bed
        self.folder = folder
        self.run = folder / "run"
        self.model = folder / "model"
        folder.mkdir()
        (folder / "home" / ".ray").mkdir(parents=True)
        (folder / "home" / ".ray" / "auth_token").write_text(STALE_TOKEN)

    def write_recipe(self, **values: object) -> None:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "tiny", "run_dir": "run", **values}))

    def scripted(self, **script: object) -> None:
        """Let scripted engines make the dataset, one a node."""
        write_script(self.model, **script)
        engine = {"backend": "tests.fakes:ScriptedEngine", "num_replicas": 2, "max_num_seqs": 4, "max_restarts": 8}
        synthesize = {"num_instructions": NUM_INSTRUCTIONS, "rows_per_shard": 40}
        self.write_recipe(model={"path": "model"}, engine=engine, synthesize=synthesize)

    def submit(self, *values: str, stage: str = "synthesize", options: list[str] = TWO_NODES) -> int:
        env = {**ENV, "HOME": str(self.folder / "home")}
        script = SCRIPTS / f"{stage}.sbatch"
        return self.bed.sbatch(script, "recipe.yaml", *values, options=options, cwd=self.folder, env=env)

    def wait_for_requests(self, job: int, num: int) -> None:
        """Wait until scripted engines have finished so many requests."""

        def is_there() -> bool:
            assert self.bed.job(job)["JobState"] not in FINAL_STATES, self.bed.output(job)
            return len(generated_ids(self.model)) >= num

        self.bed._wait(f"{num} requests", is_there, RAY_SECONDS, lambda: self.bed.output(job))

    def end(self, job: int, state: str, exit_code: str, timeout_seconds: float = RAY_SECONDS) -> None:
        """Wait for the job's end in this state, and for nothing to be left of it."""
        fields = self.bed.wait_state(job, {state}, timeout_seconds)
        assert fields["ExitCode"] == exit_code, self.bed.output(job)
        self.bed._wait("empty nodes", lambda: not left_behind(self.bed), 60, lambda: str(left_behind(self.bed)))

    def result(self, stage: str = "synthesize") -> dict:
        return json.loads((self.run / f"result-{stage}.json").read_text())

    def logged_ids(self) -> set[str]:
        """Ids in a copy of the request log, so that reading it repairs nothing."""
        copy = self.folder / "copy"
        shutil.copytree(self.run / "requests", copy, dirs_exist_ok=True)
        with RequestLog(copy) as log:
            return log.ids()


@pytest.fixture
def place(slurm_cluster: SlurmBed, request: pytest.FixtureRequest) -> Iterator[Place]:
    folder = slurm_cluster.shared / re.sub(r"\W", "-", request.node.name)
    yield Place(slurm_cluster, folder)
    for job in slurm_cluster.squeue():
        slurm_cluster.client("scancel", str(job))


def running(bed: SlurmBed, node: str, text: str = "") -> dict[int, str]:
    """Pid (on the host) -> command line of a node's processes but for its init and slurmd."""
    machine = bed.nodes[node]
    if not machine.alive:
        return {}
    found = processes_of("\0", {machine.network})
    own = (str(Path("tests/slurm/node_init.py")), "slurmd -N")
    return {pid: line for pid, line in found.items() if text in line and not any(part in line for part in own)}


def tmp_of(bed: SlurmBed, node: str) -> Path:
    return Path(f"/proc/{bed.nodes[node].init_pid}/root/tmp")


def left_behind(bed: SlurmBed) -> list[str]:
    """Processes on any node, and folders of Ray in its /tmp."""
    alive = [node for node, machine in bed.nodes.items() if machine.alive]
    folders = [str(path) for node in alive for path in tmp_of(bed, node).glob("tunesmith-ray-*")]
    return folders + [line for node in alive for line in running(bed, node).values()]


def kill(bed: SlurmBed, node: str, text: str) -> None:
    """kill -9 the node's one process with this text in its command line."""
    (pid,) = running(bed, node, text)
    os.kill(pid, signal.SIGKILL)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_scripts_differ_in_what_they_ask_for_and_in_the_stage() -> None:
    common = set()
    for stage in ("synthesize", "train", "export", "evaluate"):
        text = (SCRIPTS / f"{stage}.sbatch").read_text()
        _, begin, rest = text.partition("# `tunesmith run --on slurm` submits with --requeue")
        assert begin and f"#SBATCH --job-name=tunesmith-{stage}\n" in text
        common.add(rest.replace(f"launcher.job.supervisor {stage} ", "launcher.job.supervisor STAGE "))
        assert ("#SBATCH --no-kill\n" in text) == (stage in ("synthesize", "evaluate"))
    (shared,) = common
    for line in ("#SBATCH --no-requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR2@300", "run_attempt "):
        assert f"\n{line}" in shared


def assert_secrets_are_kept(place: Place, job: int) -> None:
    """The token is where it belongs and nowhere else: no command line, no environment, no log, no other file."""
    tokens = set()
    for node in ("n1", "n2"):
        files = [path for path in tmp_of(place.bed, node).glob("tunesmith-ray-*/**/*") if path.is_file()]
        secret = {path for path in files if path.name == "token"}
        assert secret
        for path in secret:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        tokens |= {path.read_text() for path in secret}
        (token,) = tokens
        assert len(token) == 64
        exposed = [path for path in files if path not in secret and token in path.read_text(errors="replace")]
        for pid in running(place.bed, node):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                process = Path(f"/proc/{pid}")
                visible = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
                exposed += [process] if token.encode() in visible else []
        assert not exposed
    assert not [path for path in place.run.rglob("*") if path.is_file() and token in path.read_text(errors="replace")]
    assert token not in place.bed.output(job)


@pytest.mark.slurm
def test_a_killed_head_ends_the_job_at_once_and_a_killed_worker_does_not(slurm_cluster: SlurmBed, place: Place) -> None:
    place.scripted(latency_ms=600)
    job = place.submit()
    place.wait_for_requests(job, 12)
    assert_secrets_are_kept(place, job)
    kill(slurm_cluster, "n1", "gcs/gcs_server")
    killed_at = time.monotonic()
    slurm_cluster.wait_state(job, {"FAILED"}, 30)  # Ray's driver alone would notice after 60 s
    place.end(job, "FAILED", "1:0")
    reason = "Ray's head has ended, so the job cannot continue. node n1: Ray ended by itself: gcs_server (exit code -9)"
    assert (place.result()["status"], place.result()["message"]) == ("failed", reason), time.monotonic() - killed_at
    assert f"error: {reason}" in slurm_cluster.output(job)
    assert lines_of(place.run / "events.jsonl")[-1]["reason"] == reason
    assert list((place.run / "logs" / "ray" / "n1").glob("gcs_server.*"))
    before, logged = len(generated_ids(place.model)), place.logged_ids()
    assert logged

    job = place.submit()
    place.wait_for_requests(job, before + 12)
    kill(slurm_cluster, "n2", "raylet/raylet")
    place.end(job, "COMPLETED", "0:0")
    output = slurm_cluster.output(job)
    assert "[ray] node n2: Ray ended by itself: raylet (exit code -9); continuing with 1 of 2 nodes" in output
    assert logged.isdisjoint(generated_ids(place.model)[before:])
    result = place.result()
    assert (result["status"], result["num_accepted"], result["is_complete"]) == ("done", NUM_INSTRUCTIONS, True)
    assert result["num_engine_restarts"] >= 1
    assert verify_manifest(place.run / "data" / "synthesized")["rows"] == result["num_rows"]
    rows = Counter(row["id"] for row in read_rows(place.run / "data" / "synthesized"))
    assert max(rows.values()) == 1


@pytest.mark.slurm
def test_a_node_that_ray_cannot_use_ends_the_job_and_is_named(slurm_cluster: SlurmBed, place: Place) -> None:
    place.scripted()
    shm = Path(f"/proc/{slurm_cluster.nodes['n2'].init_pid}/root/dev/shm")
    with open(shm / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(shm).f_bavail * os.statvfs(shm).f_bsize)
    try:
        place.end(place.submit(), "FAILED", "1:0")
    finally:
        (shm / "filler").unlink()
    assert place.result()["message"].startswith("node n2: Ray needs 80 MiB of /dev/shm")


@pytest.mark.long
@pytest.mark.slurm
def test_vllm_engines_on_two_nodes_make_one_dataset(slurm_cluster: SlurmBed, place: Place) -> None:
    """Who writes and who answers have an engine each, and a node has room for one: no row is the work of one node."""
    model = str(PROJECT / "models" / "world-chat")
    engine = {"enforce_eager": True, "max_num_seqs": 8}
    models = {"writer": {"path": model}, "answerer": {"path": model, "engine": {**engine, "max_num_seqs": 4}}}
    synthesize = {"method": "instruction_wild", "num_instructions": 4, "models": models}
    place.write_recipe(model={"path": model}, engine=engine, synthesize=synthesize)
    place.end(place.submit(), "COMPLETED", "0:0", 400)
    result = place.result()
    assert (result["status"], result["num_accepted"]) == ("done", 4)
    assert verify_manifest(place.run / "data" / "synthesized")["rows"] == result["num_rows"] > 0
    numbers = {engine["node"]: engine["num_requests"] for engine in result["engines"]}
    assert set(numbers) == {"10.77.0.11", "10.77.0.12"} and min(numbers.values()) > 0


@pytest.mark.long
@pytest.mark.slurm
def test_vllm_replicas_of_two_nodes_share_the_work_and_save_on_a_request_to_stop(
    slurm_cluster: SlurmBed, place: Place
) -> None:
    model = {"path": str(PROJECT / "models" / "world-chat")}
    engine = {"num_replicas": 2, "enforce_eager": True, "max_num_seqs": 2, "max_model_len": 512}
    place.write_recipe(model=model, engine=engine, synthesize={"method": "magpie", "num_instructions": 100_000})
    job = place.submit()

    def both_answer() -> bool:
        assert slurm_cluster.job(job)["JobState"] not in FINAL_STATES, slurm_cluster.output(job)
        numbers = requests_by_node(place.run)
        return set(numbers) == {"10.77.0.11", "10.77.0.12"} and min(numbers.values()) > 0

    slurm_cluster._wait("answers of both nodes", both_answer, 400, lambda: slurm_cluster.output(job))
    slurm_cluster.client("scancel", "--batch", "--signal=USR2", str(job))  # what --signal=B:USR2@300 does
    place.end(job, "FAILED", "75:0")
    assert place.result()["status"] == "preempted"
    assert len(place.logged_ids()) >= sum(requests_by_node(place.run).values()) > 0


def requests_by_node(run: Path) -> dict[str, int]:
    """Requests that each node's engine has answered, by the latest metrics."""
    latest = lines_of(run / "metrics.jsonl")[-1:]
    return {engine["node"]: engine["num_requests"] for line in latest for engine in line["pools"][0]["engines"]}


@pytest.mark.long
@pytest.mark.slurm
def test_a_request_to_stop_saves_and_the_same_command_continues(slurm_cluster: SlurmBed, place: Place) -> None:
    place.scripted(latency_ms=600)
    logged: set[str] = set()
    for signal_options in (["--batch", "--signal=USR2"], ["--signal=TERM"]):  # the second reaches all steps alone
        before = len(generated_ids(place.model))
        job = place.submit()
        place.wait_for_requests(job, before + 12)
        slurm_cluster.client("scancel", *signal_options, str(job))
        place.end(job, "FAILED", "75:0")
        assert f"error: stopped by SIGTERM; {len(place.logged_ids())} finished" in slurm_cluster.output(job)
        assert place.result()["status"] == "preempted"
        assert logged.isdisjoint(generated_ids(place.model)[before:])
        logged = place.logged_ids()
    before = len(generated_ids(place.model))
    place.end(place.submit(), "COMPLETED", "0:0")
    assert logged.isdisjoint(generated_ids(place.model)[before:])
    assert place.result()["num_accepted"] == NUM_INSTRUCTIONS


@pytest.mark.long
@pytest.mark.slurm
def test_a_lost_node_takes_its_engine_along_and_nothing_else(slurm_cluster: SlurmBed, place: Place) -> None:
    place.scripted(latency_ms=600)
    job = place.submit()
    place.wait_for_requests(job, 12)
    with slurm_cluster.powered_off("n2"):
        place.end(job, "COMPLETED", "0:0")
    assert place.result()["num_accepted"] == NUM_INSTRUCTIONS
    rows = Counter(row["id"] for row in read_rows(place.run / "data" / "synthesized"))
    assert max(rows.values()) == 1


@pytest.mark.long
@pytest.mark.slurm
def test_a_lost_batch_host_ends_the_job(slurm_cluster: SlurmBed, place: Place) -> None:
    """Slurm continues such a job: it may lose nodes, and the first node is no exception."""
    place.scripted(latency_ms=600)
    job = place.submit()
    place.wait_for_requests(job, 12)
    with slurm_cluster.powered_off("n1"):
        slurm_cluster.wait_state(job, {"CANCELLED"}, 240)
    slurm_cluster._wait("empty nodes", lambda: not left_behind(slurm_cluster), 60, str)
    (report,) = place.run.glob("attempt-*/ray-*/node-1.exit.json")
    assert json.loads(report.read_text())["reason"] == "the job's first node n1 is lost, so the job was ended."


@pytest.mark.long
@pytest.mark.slurm
def test_a_lost_batch_host_requeues_a_job_that_slurm_may_requeue(slurm_cluster: SlurmBed, place: Place) -> None:
    """As `tunesmith run --on slurm` submits it. The next start goes on with what is finished."""
    place.scripted(latency_ms=600)
    job = place.submit(options=["--nodes=2", "--cpus-per-task=1", "--mem=1500", "--requeue"])
    place.wait_for_requests(job, 12)
    with slurm_cluster.powered_off(slurm_cluster.job(job)["BatchHost"]):
        place.end(job, "COMPLETED", "0:0", 2 * RAY_SECONDS)
    assert slurm_cluster.job(job)["Restarts"] == "1"
    result = place.result()
    assert (result["status"], result["num_accepted"]) == ("done", NUM_INSTRUCTIONS)
    assert result["resumed_requests"] >= 12


@pytest.mark.long
@pytest.mark.slurm
def test_two_jobs_on_one_node_do_not_meet(slurm_cluster: SlurmBed, place: Place) -> None:
    """The second ends while the first is at work; it must have left the first one's Ray alone."""
    other = Place(slurm_cluster, place.folder / "other")
    place.scripted(latency_ms=3000)
    other.scripted()
    options = ["--nodes=1", "--nodelist=n1", "--cpus-per-task=2", "--mem=1500"]
    first = place.submit("synthesize.num_instructions=100000", options=options)
    place.wait_for_requests(first, 1)
    second = other.submit(options=options)
    slurm_cluster.wait_state(second, {"COMPLETED"}, RAY_SECONDS)
    assert (other.result()["num_accepted"], other.result()["num_engine_restarts"]) == (NUM_INSTRUCTIONS, 0)
    place.wait_for_requests(first, len(generated_ids(place.model)) + 8)
    slurm_cluster.client("scancel", "--batch", "--signal=USR2", str(first))
    place.end(first, "FAILED", "75:0")
    assert "engine_restarted" not in (place.run / "events.jsonl").read_text()


@pytest.mark.long
@pytest.mark.slurm
def test_a_full_tmp_ends_the_job_and_the_node_is_named(slurm_cluster: SlurmBed, place: Place) -> None:
    place.scripted()
    slurm_cluster.nodes["n2"].fill_tmp()
    try:
        place.end(place.submit(), "FAILED", "1:0")
    finally:
        (tmp_of(slurm_cluster, "n2") / "filler").unlink()
    assert place.result()["message"].startswith("node n2: /tmp on n2: No space left on device.")


@pytest.mark.long
@pytest.mark.slurm
def test_a_trained_run_is_exported_and_evaluated(slurm_cluster: SlurmBed, place: Place, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, place.model)
    row = {"messages": [{"role": "user", "content": "Say fig"}, {"role": "assistant", "content": "fig"}]}
    (place.folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    task = {"id": "1", "task": "say", "group": "all", "instruction": "Say fig", "input": "", "references": ["fig"]}
    (place.folder / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    train = {"data": ["rows.jsonl"], "precision": "fp32", "packing": False, "max_seq_len": 64, "num_epochs": 1}
    train |= {"micro_batch_size": 1, "global_batch_size": 4, "zero_stage": 0}
    place.write_recipe(model={"path": "model"}, train=train, evaluate={"sets": ["tasks.jsonl"]})
    one_node = ["--nodes=1", "--nodelist=n1", "--cpus-per-task=1", "--mem=1500"]
    for stage in ("train", "export", "evaluate"):
        place.end(place.submit(stage=stage, options=one_node), "COMPLETED", "0:0", 400)
        assert place.result(stage)["status"] == "done"
    assert "tuned" in place.result("evaluate")["models"]


@pytest.mark.long
@pytest.mark.slurm
def test_a_killed_supervisor_takes_everything_along(slurm_cluster: SlurmBed, place: Place) -> None:
    place.scripted(latency_ms=600)
    job = place.submit()
    place.wait_for_requests(job, 12)
    kill(slurm_cluster, "n1", "-m launcher.job.supervisor")
    slurm_cluster.wait_state(job, {"FAILED"}, RAY_SECONDS)
    nodes = ("n1", "n2")
    slurm_cluster._wait("no process", lambda: not any(running(slurm_cluster, node) for node in nodes), 60, str)
    for node in nodes:  # the folders were left, and the next Ray there removes them
        program = [sys.executable, "-c", "from cluster.ray.folder import *\nwith private_folder('x'): pass"]
        slurm_cluster.nodes[node].run(*program, cwd=PROJECT, env=slurm_cluster.env)
    assert left_behind(slurm_cluster) == []
    assert not (place.run / "result-synthesize.json").exists()
