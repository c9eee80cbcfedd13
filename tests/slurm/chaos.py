"""Random faults for a while: `python -m tests.slurm.chaos --seed 7 --minutes 30`, or `make chaos SEED=7 MINUTES=30`.

Each round runs one chain of jobs on a real Slurm, strikes it with one to three faults at random moments, and looks at
what is left: the same weights or data, byte for byte, as without a fault; every request once; a result that is true;
nothing that an attempt wrote after another had taken over; and no process. Ends at the first violation, with 1.
The seed decides workloads, faults, moments and victims; how the machine interleaves them, it cannot.
"""

import argparse
import random
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import TunesmithError
from cluster.files import sha256_file
from cluster.run import fence
from cluster.run.manifest import verify_manifest
from cluster.run.rundir import RunDir
from generation.request_log import RequestLog
from launcher.done import is_done
from launcher.recipe import load
from tests.fakes import write_script
from tests.generation.harness import read_rows
from tests.slurm.bed import SlurmBed
from tests.slurm.chained import SCRIPTED, ChainedRun, make_scripted, write_recipe
from tests.slurm.faults import FAULTS, Strike
from tests.slurm.training import make_training, weights
from tests.tiny_model import make_tiny_model

END_SECONDS = 900
LATE_SECONDS = 1.5  # rows that were on their way when another attempt took over: see cluster/run/fence.py
POLICY = {"max_attempts_without_progress": 8, "preflight": False}


class Violation(Exception):
    """Something that must hold did not."""


@dataclass(frozen=True)
class Workload:
    """A chain of one stage: how to make it, when it is far enough to be struck, and what it leaves in the end."""

    stage: str
    num_nodes: int
    make: Callable[[SlurmBed, str], ChainedRun]
    has_begun: Callable[[ChainedRun], bool]
    result: Callable[[ChainedRun], dict[str, str]]
    max_wait_seconds: float  # from there to the first fault


def scripted_training(bed: SlurmBed, name: str) -> ChainedRun:
    return make_scripted(bed, name, {"steps": 40, "step_seconds": 0.3}, **POLICY)


def synthesis(bed: SlurmBed, name: str) -> ChainedRun:
    folder = bed.shared / name
    write_recipe(folder, slurm=POLICY)
    write_script(bed.shared / "scripted-model", latency_ms=300)  # one for all: its path is in every row
    return ChainedRun(bed, folder, bed.write_script("scripted.sh", SCRIPTED), {"RAY_DEDUP_LOGS": "0"})


def real_training(bed: SlurmBed, name: str) -> ChainedRun:
    return make_training(bed, bed.shared / "tiny-model", name, **POLICY)


def scripted_weights(run: ChainedRun) -> dict[str, str]:
    (last,) = sorted((run.run / "checkpoints").glob("step_*"))[-1:]
    return {"weights.txt": (last / "weights.txt").read_text()}


def dataset(run: ChainedRun) -> dict[str, str]:
    """Hash of every shard, after a check of what no hash shows: every id once, every finished request once."""
    found = {}
    for name in ("synthesized", "rejected", "instructions"):
        folder = run.run / "data" / name
        verify_manifest(folder)
        twice = [row for row, count in Counter(row["id"] for row in read_rows(folder)).items() if count > 1]
        if twice:
            raise Violation(f"{folder}: there more than once: {twice[:3]}")
        found |= {f"{name}/{path.name}": sha256_file(path) for path in sorted(folder.glob("data-*.arrow"))}
    with RequestLog(run.run / "requests") as log:
        if len(log) != len(log.ids()):
            raise Violation(f"{run.run}/requests: {len(log)} records of {len(log.ids())} requests")
    return found


WORKLOADS = {
    "scripted training": Workload(
        "train", 2, scripted_training, lambda run: bool(run.metrics()), scripted_weights, max_wait_seconds=8
    ),
    "synthesis": Workload(
        "synthesize", 1, synthesis, lambda run: any((run.run / "requests").glob("*.log")), dataset, max_wait_seconds=15
    ),
    "training": Workload(
        "train", 2, real_training, lambda run: len(run.metrics()) > 20, weights, max_wait_seconds=10
    ),
}  # fmt: skip


def run_to_end(workload: Workload, run: ChainedRun, faults: list[str], rng: random.Random) -> list[str]:
    """Run a chain, struck by `faults` one after another; returns what each of them hit."""
    run.submit(workload.stage, f"--nodes={workload.num_nodes}")
    hits = []
    for fault in faults:
        run.wait("to be under way", lambda: workload.has_begun(run) and run.events("attempt started"), END_SECONDS)
        time.sleep(rng.uniform(0, workload.max_wait_seconds))
        if run.events("done", "gave up"):
            hits.append("over already")
            continue
        hits.append(FAULTS[fault](Strike(run, workload.stage, rng)))
    run.wait("the end", lambda: run.events("done", "gave up"), END_SECONDS)
    try:
        run.wait_quiet(120)
    except AssertionError:
        if "kill the controller" not in faults or run.processes():
            raise
        hits.append(end_ghosts(run))
    return hits


def end_ghosts(run: ChainedRun) -> str:
    """A slurmctld that is killed forgets the last seconds: that a job has begun, and so that it is over."""
    ghosts = {int(job["job_id"]) for job in run.jobs()} & run.bed.squeue().keys()
    for job in ghosts:
        run.bed.client("scancel", str(job))
    run.wait_quiet(60)
    return f"Slurm still listed {ghosts}, of which nothing ran"


def check(workload: Workload, run: ChainedRun, expected: dict[str, str]) -> None:
    """Raise Violation if anything is not as it would be without a fault."""
    if given_up := run.events("gave up"):
        raise Violation(f"the job gave up: {given_up[-1]['reason']}")
    if not is_done(workload.stage, load(run.folder / "recipe.yaml", []), RunDir(run.run)):
        raise Violation(f"{workload.stage} reports that it is done, and is not")
    if (result := run.result(workload.stage)) and result.get("status") in ("failed", "preempted"):
        raise Violation(f"the result of a stage that is done: {result}")
    if (found := workload.result(run)) != expected:
        raise Violation(f"the result differs: {found} instead of {expected}")
    deadline = time.monotonic() + 60
    while (left := run.processes()) and time.monotonic() < deadline:
        time.sleep(0.5)
    if left:
        raise Violation(f"still running: {left}")
    claimed = {claim.token: claim.time for claim in fence.claims(run.run)}
    for row in run.metrics():
        successor = claimed.get((row.get("fencing_token") or 0) + 1)
        if successor is not None and row["time"] > successor + LATE_SECONDS:
            raise Violation(f"written by an attempt after another took over at {successor}: {row}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: by the clock; it is printed")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--keep", type=Path, help="where the folder of a run that went wrong is copied")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    rng = random.Random(arguments.seed)
    words = argv if "--seed" in argv else ["--seed", str(arguments.seed), *argv]
    again = f"python -m tests.slurm.chaos {shlex.join(words)}"
    print(f"chaos: seed {arguments.seed}; to repeat: {again}", flush=True)
    end, number, num_faults = time.monotonic() + 60 * arguments.minutes, 0, Counter()
    with SlurmBed(num_nodes=3) as bed:
        if "training" in arguments.workloads:
            make_tiny_model(bed.shared / "tiny-model")
        expected: dict[str, dict[str, str]] = {}
        for name in arguments.workloads:
            run = WORKLOADS[name].make(bed, f"undisturbed-{name.replace(' ', '-')}")
            run_to_end(WORKLOADS[name], run, [], rng)
            expected[name] = WORKLOADS[name].result(run)
            print(f"undisturbed {name}: {len(expected[name])} files", flush=True)
        while time.monotonic() < end:
            number += 1
            name = rng.choice(arguments.workloads)
            faults = rng.choices(arguments.faults, k=rng.randint(1, 3))
            dice = random.Random(rng.random())  # so that a round's course does not decide the next round
            print(f"round {number}: {name}, {' + '.join(faults)}", flush=True)
            bed.resume_drained()
            began = time.monotonic()
            run = WORKLOADS[name].make(bed, f"round-{number}")
            try:
                hits = run_to_end(WORKLOADS[name], run, faults, dice)
                check(WORKLOADS[name], run, expected[name])
            except (Violation, AssertionError, TunesmithError) as error:
                print(f"  VIOLATED: {error}\n{run.output()[-4000:]}\nseed {arguments.seed}; {again}", flush=True)
                if arguments.keep:
                    shutil.copytree(run.folder, arguments.keep / f"round-{number}", dirs_exist_ok=True)
                return 1
            num_faults.update(faults)
            attempts = len(run.events("attempt started"))
            print(f"  held: {attempts} attempts, {time.monotonic() - began:.0f} s; {'; '.join(hits)}", flush=True)
    print(f"chaos: {number} rounds held, seed {arguments.seed}")
    for fault, count in sorted(num_faults.items()):
        print(f"  {count:3d} x {fault}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
