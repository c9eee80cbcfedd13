"""From `sbatch` to the first step and to the first answer, against the bare minimum; plans and states of 1,000 nodes:
`make bench-launch`.

On a real Slurm of two nodes in namespaces of this machine (needs root). Turn by turn: torchrun under srun as one writes
it by hand; the same script under our supervisor of a node; and a training of ours, from submission to its first step.
The first two run an empty loop after the ranks have met, so that their difference is what our part of the start takes.
Then scripts on one node that let `vllm.LLM` answer one prompt: with our engines' settings (one process computes), so in
an actor of Ray, and as vLLM comes; and our job that synthesizes, to its first answer.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from launcher.print_status import print_status
from launcher.slurm.plan import print_slurm_plan
from launcher.slurm.submit import submit
from launcher.status import read_statuses
from tests.launcher.slurm_chain import FakeSlurm, queue_line, recipe_of, submission_of
from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT
from tests.slurm.training import make_training
from tests.tiny_model import make_tiny_model

NUM_NODES = 2
WAIT_SECONDS = 300
EMPTY_LOOP = """
import time
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 0:
    print("first step at", time.time(), flush=True)
dist.destroy_process_group()
"""

MODEL = PROJECT / "models" / "world-chat"
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, "max_model_len": 512}
AS_IT_COMES = f"""
import os
import time
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # it takes 92 % of the memory otherwise, or fails
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM("{MODEL}", max_model_len=512)
    llm.generate(["Say fig:"], SamplingParams(max_tokens=8), use_tqdm=False)
    print("first step at", time.time(), flush=True)
"""
ONE_ANSWER = f"""
import time
from cluster.config import ModelConfig
from cluster.engines.engine import set_environment
from cluster.engines.config import EngineConfig
if __name__ == "__main__":
    set_environment(EngineConfig(**{ENGINE}), ModelConfig(path="{MODEL}"), num_gpus=0)
    from vllm import LLM, SamplingParams
    llm = LLM("{MODEL}", enable_chunked_prefill=False, **{ENGINE})
    llm.generate(["Say fig:"], SamplingParams(max_tokens=8), use_tqdm=False)
    print("first step at", time.time(), flush=True)
"""
IN_RAY = f"""
import time
import ray
from cluster.config import ModelConfig
from cluster.engines.engine import set_environment
from cluster.engines.config import EngineConfig
class Actor:
    def answer(self):
        set_environment(EngineConfig(**{ENGINE}), ModelConfig(path="{MODEL}"), num_gpus=0)
        from vllm import LLM, SamplingParams
        llm = LLM("{MODEL}", enable_chunked_prefill=False, **{ENGINE})
        llm.generate(["Say fig:"], SamplingParams(max_tokens=8), use_tqdm=False)
if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    ray.get(ray.remote(Actor).options(num_cpus=1).remote().answer.remote())
    print("first step at", time.time(), flush=True)
"""


def by_hand(bed: SlurmBed, script: Path, turn: int) -> Path:
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes {NUM_NODES} --nproc-per-node 1 --rdzv-backend c10d"
    where = f"--rdzv-id {turn} --rdzv-endpoint $(scontrol show hostnames | head -1):29500"
    return bed.write_script("by-hand.sh", f"srun --ntasks-per-node=1 {torchrun} {where} {script}")


def supervised(bed: SlurmBed, script: Path, turn: int) -> Path:
    node = f"{sys.executable} -P -m launcher.job.node exec {bed.shared}/run-{turn} -- {script}"
    return bed.write_script("supervised.sh", f"srun --ntasks-per-node=1 --kill-on-bad-exit=1 {node}")


def seconds_to_first_step(bed: SlurmBed, script: Path) -> float:
    began = time.time()
    options = [f"--nodes={NUM_NODES}", "--ntasks-per-node=1"]
    job = bed.sbatch(script, options=options, env={"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    bed.wait_output(job, "first step at", WAIT_SECONDS)
    bed.wait_state(job, {"COMPLETED"}, WAIT_SECONDS)
    return float(bed.output(job).split("first step at ")[1].split()[0]) - began


def seconds_to_first_trained_step(bed: SlurmBed, model: Path, turn: int) -> float:
    training = make_training(bed, model, f"training-{turn}")
    env = {**training.env, "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", "")}
    env = {name: value for name, value in env.items() if value}
    began = time.time()
    job = bed.sbatch(
        training.script, "recipe.yaml", "train.max_steps=4",
        options=[f"--nodes={NUM_NODES}"], cwd=training.folder, env=env,
    )  # fmt: skip
    bed.wait_state(job, {"COMPLETED"}, WAIT_SECONDS)
    return json.loads((training.run / "metrics.jsonl").read_text().splitlines()[0])["time"] - began


def seconds_to_raw_answer(bed: SlurmBed, script: Path) -> float:
    began = time.time()
    body = f"export PYTHONPATH={PROJECT}\nexec {sys.executable} {script}"
    job = bed.sbatch(bed.write_script("one-answer.sh", body), options=["--nodes=1"])
    bed.wait_state(job, {"COMPLETED"}, WAIT_SECONDS)
    return float(bed.output(job).split("first step at ")[1].split()[0]) - began


def seconds_to_answer(bed: SlurmBed, turn: int) -> float:
    """To the first request in the log."""
    folder = bed.shared / f"answers-{turn}"
    folder.mkdir()
    synthesize = {"method": "answer_only", "max_instructions": 16, "answer_sampling": {"max_tokens": 8}}
    recipe = {"name": "answers", "run_dir": "run", "model": {"path": str(MODEL)}, "engine": ENGINE}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"synthesize": synthesize}))
    script, env = PROJECT / "slurm" / "synthesize.sbatch", {"TUNESMITH_PYTHON": sys.executable}
    began = time.time()
    job = bed.sbatch(script, "recipe.yaml", options=["--nodes=1", "--mem=2000"], cwd=folder, env=env)
    while not any(path.stat().st_size for path in (folder / "run" / "requests").glob("*.log")):
        if time.time() - began > WAIT_SECONDS:
            sys.exit(f"no answer in {WAIT_SECONDS} s:\n{bed.output(job)}")
        time.sleep(0.05)
    answered = time.time() - began
    bed.wait_state(job, {"COMPLETED"}, WAIT_SECONDS)
    return answered


def print_times(title: str, found: dict[str, list[float]]) -> None:
    """Medians of all turns but the first, which warms up; the first label is what the others are compared with."""
    table = Table(title=title, title_justify="left")
    for column in ("what", "median", "least-most", "more than by hand"):
        table.add_column(column, justify="left" if column == "what" else "right")
    bare = statistics.median(next(iter(found.values()))[1:])
    for label, every in found.items():
        some = every[1:]
        middle = statistics.median(some)
        table.add_row(label, f"{middle:.1f}", f"{min(some):.1f}-{max(some):.1f}", f"{middle - bare:+.1f}")
    Console(width=100).print(table)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def of_a_thousand_nodes() -> tuple[float, float]:
    """Seconds to render the plan of a chain on 1,000 nodes, and the state of one, with a queue that answers at once."""
    with tempfile.TemporaryDirectory() as name:
        recipe = recipe_of(
            Path(name), {"nodes": 1000, "gpus_per_node": 8}, train={"precision": "bf16", "global_batch_size": 16_000}
        )
        console, slurm = Console(width=200, file=io.StringIO()), FakeSlurm()
        chain = submission_of(recipe)
        planning = timed(lambda: print_slurm_plan(chain, Path("recipe.yaml"), "", console))
        submit(chain, slurm, lambda argv: None)
        nodes = ",".join(f"node{number:04d}" for number in range(1000))
        for job_id in slurm.queue_lines:
            name = slurm.queue_lines[job_id].split("|")[8]
            slurm.queue_lines[job_id] = queue_line(job_id, "RUNNING", name, f"1-02:03:04|1000|{nodes}|(null)|None")
        return planning, timed(lambda: print_status(read_statuses([recipe.run.root], slurm)[0], console))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {"torchrun under srun, by hand": [], "the same under our supervisor": []}
    scripts = {
        "vllm.LLM in a script, set as our engines are": ONE_ANSWER,
        "the same in an actor of a Ray that the script starts": IN_RAY,
        "the same without Ray, set as vLLM comes": AS_IT_COMES,
    }
    answers: dict[str, list[float]] = {label: [] for label in [*scripts, "sbatch slurm/synthesize.sbatch"]}
    trained = found["sbatch slurm/train.sbatch, first trained step"] = []
    with SlurmBed(num_nodes=NUM_NODES) as bed, tempfile.TemporaryDirectory() as name:
        make_tiny_model(model := Path(name) / "model")
        (script := bed.shared / "loop.py").write_text(EMPTY_LOOP)
        for turn in range(arguments.turns + 1):  # the first, a warm-up, reads from the disk and builds the kernel
            print(f"turn {turn}", file=sys.stderr, flush=True)
            for label, make in zip(list(found)[:2], (by_hand, supervised), strict=True):
                found[label].append(seconds_to_first_step(bed, make(bed, script, turn)))
            trained.append(seconds_to_first_trained_step(bed, model, turn))
            for label, source in scripts.items():
                (one_answer := bed.shared / "one_answer.py").write_text(source)
                answers[label].append(seconds_to_raw_answer(bed, one_answer))
            answers["sbatch slurm/synthesize.sbatch"].append(seconds_to_answer(bed, turn))
    print_times(f"seconds from submission, {NUM_NODES} nodes", found)
    print_times("seconds from submission to the first answer, one node", answers)
    planning, state = of_a_thousand_nodes()
    print(f"1,000 nodes: plan rendered in {planning:.3f} s, status in {state:.3f} s")
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
