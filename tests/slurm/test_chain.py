"""`tunesmith run --on slurm` and the commands about a run, under a real Slurm with a real model."""

import json
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.files import exclusive_lock
from tests.slurm.bed import SlurmBed
from tests.slurm.training import TRAIN, lay_out
from tests.slurm.user import ENV, SECRET, User

pytestmark = pytest.mark.slurm


@pytest.fixture
def user(slurm_cluster: SlurmBed, tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[User]:
    folder = slurm_cluster.shared / request.node.name
    lay_out(folder, tiny_model)
    train = TRAIN | {"tuning": "lora", "num_epochs": 1}
    values = {"name": "tiny", "run_dir": "run", "model": {"path": "model"}, "train": train}
    values |= {"export": {"form": "adapter"}, "slurm": {"train": {"nodes": 2}, "environment": ["MY_SECRET"]}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    user = User(slurm_cluster, folder)
    yield user
    for job in slurm_cluster.squeue():
        slurm_cluster.client("scancel", str(job))


def ranks_of(job_id: str) -> dict[int, dict[str, str]]:
    """The environment of each rank, by its pid on this machine."""
    found = {}
    for process in psutil.process_iter():
        try:
            environ = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if environ.get("SLURM_JOB_ID") == job_id and "LOCAL_RANK" in environ:
            found[process.pid] = environ
    return found


@pytest.mark.timeout(900)
def test_a_chain_is_planned_submitted_watched_and_resumed(slurm_cluster: SlurmBed, user: User) -> None:
    run = user.folder / "run"

    # What the plan shows is what is submitted.
    said = user.tunesmith("plan", "recipe.yaml", "--on", "slurm")
    assert sorted(path.name for path in run.iterdir()) == ["code", "plan.json"]
    planned = json.loads((run / "plan.json").read_text())["jobs"]
    assert [job["stage"] for job in planned] == ["train", "export"]
    assert "2 ranks in the job" in " ".join(said.replace("│", " ").split())
    said = user.tunesmith("run", "recipe.yaml", "--on", "slurm")
    first, second = user.jobs()
    for job, plan in zip((first, second), planned, strict=True):
        assert untagged(job["argv"]) == untagged(word.replace("$train", first["job_id"]) for word in plan["argv"])
        assert f"$ {shlex.join(job['argv'])}\n" in said
    assert (first["parent_job_ids"], second["parent_job_ids"]) == ([], [first["job_id"]])
    assert [job["stage"] for job in (first, second)] == ["train", "export"]

    # From here on the checkout is broken, and the jobs do not notice; the commands are those of the snapshot.
    broken, [snapshot] = user.checkout, (run / "code").iterdir()
    user.checkout = snapshot
    for path in broken.rglob("*.py"):
        path.write_text("raise SystemExit('this is not the code that was submitted')\n")
    shutil.rmtree(broken / "slurm")

    # While it waits and runs.
    assert user.status()["export"] == "WAITING"
    refused = user.tunesmith("run", "recipe.yaml", "--on", "slurm", code=2)
    assert f"has jobs in the queue: {first['job_id']}" in refused and len(user.jobs()) == 2
    environ = next(iter(user.wait("a rank", lambda: ranks_of(first["job_id"])).values()))
    assert environ["MY_SECRET"] == SECRET
    assert user.status()["train"] == "RUNNING"
    shown = [slurm_cluster.client("scontrol", "show", "job", job["job_id"]) for job in (first, second)]

    # `logs -f` ends when the run does, and has both jobs.
    logs = follow(user)
    assert user.status() == {"train": "DONE", "export": "DONE"}, logs
    assert f"==> train, job {first['job_id']}" in logs and "[export] adapter model in" in logs
    assert json.loads((run / "export" / "manifest.json").read_text())["checkpoint"] == "step_000002"

    # The secret is nowhere but in the environment.
    kept = [path for path in user.folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not kept
    assert SECRET not in json.dumps(shown) + said + logs

    # What is done is skipped; what is not is submitted again, and can be cancelled.
    assert "everything is done, so nothing was submitted" in user.tunesmith("resume", "run")
    shutil.rmtree(run / "export")
    said = user.tunesmith("resume", "run")
    assert "train: done already, skipped" in said and "export: is done again" in said
    third = user.jobs()[2]
    assert (third["stage"], third["parent_job_ids"]) == ("export", [])
    user.wait("a job that runs", lambda: user.status()["export"] == "RUNNING")
    said = user.tunesmith("cancel", "run")
    assert f"cancelled {third['job_id']}" in said
    user.wait("its end", lambda: user.status() == {"train": "DONE", "export": "CANCELLED"}, 60)
    assert slurm_cluster.squeue() == {}
    assert user.rows("list", ".")[0][1:3] == ["CANCELLED", "export"]


def untagged(argv: Iterable[str]) -> list[str]:
    """A command without the part of the job's name that each submission has for itself."""
    return [re.sub(r"^(--job-name=.*)-[0-9a-f]{8}$", r"\1", word) for word in argv]


def follow(user: User) -> str:
    """What `logs -f` prints until it ends by itself."""
    where = user.bed.env | ENV | {"PYTHONPATH": str(user.checkout)}
    return user.bed.controller.run(*user.argv("logs", "-f", "run"), cwd=user.folder, env=where, timeout_seconds=400)


def test_a_parent_that_fails_takes_its_children_along(user: User) -> None:
    """It finds the run folder in use."""
    later = "slurm.train.options=[--begin=now+4]"
    assert "submitted train" in user.tunesmith("run", "recipe.yaml", later, "--on", "slurm")
    run = user.folder / "run"
    with exclusive_lock(run / ".lock", "test"):
        user.wait("the end of both", lambda: not {"WAITING", "RUNNING"} & set(user.status().values()))
    rows = {row[0]: row for row in user.rows("status", "run")}
    assert rows["train"][1] == "FAILED" and rows["export"][1] in ("FAILED", "CANCELLED")
    assert "is in use by another process" in user.tunesmith("logs", "run", "--stage", "train")
    assert not (run / "export").exists()
    assert user.rows("list", ".")[0][1:3] == ["FAILED", "train"]


def test_scancel_of_everything_ends_the_run_and_resume_goes_on(user: User) -> None:
    """Nothing comes back by itself, and nothing of the run is left in the queue."""
    user.tunesmith("run", "recipe.yaml", "train.num_epochs=50", "--on", "slurm")
    user.wait("a step", lambda: "step" in user.rows("status", "run")[0][-1])
    user.bed.client("scancel", "-u", "root")
    user.wait("an empty queue", lambda: user.bed.squeue() == {}, 60)
    time.sleep(8)  # longer than a requeued job waits on this bed
    assert user.bed.squeue() == {}
    assert user.status() == {"train": "CANCELLED", "export": "CANCELLED"}
    assert "goes on from step_" in user.tunesmith("resume", "run")
    user.tunesmith("cancel", "run")


@pytest.mark.parametrize("answer", ["no answer", pytest.param("refused", marks=pytest.mark.long)])
def test_a_cancel_that_slurm_does_not_carry_out_leaves_the_run_as_it_is(user: User, answer: str) -> None:
    """It goes on, also after a crash."""
    user.tunesmith("run", "recipe.yaml", "train.num_epochs=50", "--on", "slurm")
    job = user.jobs()[0]["job_id"]
    user.wait("a step", lambda: "step" in user.rows("status", "run")[0][-1])
    ranks = list(ranks_of(job))
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # else the training may be done before its rank is killed
    programs = user.folder / "programs"
    programs.mkdir()
    words = "Unable to contact slurm controller (connect failure)" if answer == "no answer" else "Access denied"
    (programs / "scancel").write_text(f"#!/bin/sh\necho 'scancel: error: {words}' >&2\nexit 1\n")
    (programs / "scancel").chmod(0o755)
    assert words in user.tunesmith("cancel", "run", code=2 - (answer == "no answer"), PATH=f"{programs}:{user.path}")
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    user.wait("the end of both", lambda: set(user.status().values()) == {"DONE"}, 400)
    assert user.rows("status", "run")[0][3] == "2", "attempts"
    assert len(user.jobs()) == 2


def test_bad_input_is_one_refusal_before_anything_is_submitted(user: User) -> None:
    other = user.folder / "other"
    (other / "checkpoints" / "step_000001").mkdir(parents=True)
    values = yaml.safe_load((user.folder / "recipe.yaml").read_text()) | {"seed": 7}
    (other / "recipe.yaml").write_text(yaml.safe_dump(values))
    cases = {
        ("slurm.partition=hgih",): "there is no partition hgih here. Did you mean `high`?",
        ("slurm.train.nodes=4",): "slurm.nodes=4 of train: partition low has 3. Lower slurm.train.nodes.",
        ("slurm.export.gpus_per_node=7",): "Slurm would never run export: sbatch: allocation failure: Requested node",
        ("--run-dir", "other"): "holds results of another recipe: seed (was 7, now 0)",
    }
    for arguments, expected in cases.items():
        said = user.tunesmith("run", "recipe.yaml", *arguments, "--on", "slurm", code=2)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and expected in errors[0], said
        assert "Traceback" not in said
    assert user.bed.squeue() == {} and not list(user.folder.rglob("jobs.jsonl"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_is_a_chain_for_each_value_and_one_table_of_what_came_of_it(user: User) -> None:
    rates = {"001_learning_rate-0.001": 0.001, "002_learning_rate-0.05": 0.05}
    values = yaml.safe_load((user.folder / "recipe.yaml").read_text())
    values |= {"sweep": {"train.learning_rate": list(rates.values())}, "slurm": {"environment": ["MY_SECRET"]}}
    (user.folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    said = user.tunesmith("run", "recipe.yaml", "--on", "slurm")
    assert said.count("$ sbatch") == 4 and said.count("$ scontrol release") == 2
    places = [Path("run", "sweep", name) for name in rates]
    jobs = [job["job_id"] for place in places for job in user.jobs(str(place))]
    assert len(set(jobs)) >= 4 and jobs[:1] == [user.rows("status", "run")[0][4]]
    user.wait("the end of both", lambda: {row[2] for row in user.rows("status", "run")} == {"DONE"}, 400)

    losses = []
    for place, rate in zip(places, rates.values(), strict=True):
        folder = user.folder / place
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["train"]["learning_rate"] == rate
        assert json.loads((folder / "export" / "manifest.json").read_text())["checkpoint"] == "step_000002"
        losses.append(f"{json.loads((folder / 'result-train.json').read_text())['final_loss']:.4f}")
    assert losses[0] != losses[1], "each was trained with its own"
    table = [
        [name, str(rate), "DONE", "-", "-", loss] for (name, rate), loss in zip(rates.items(), losses, strict=True)
    ]
    assert user.rows("status", "run") == table
    assert user.rows("list", ".") == table
    assert user.tunesmith("resume", "run").count("everything is done, so nothing was submitted") == 2
    assert user.bed.squeue() == {}
