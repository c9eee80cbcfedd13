"""Output tokens per second of the engine pool against raw `vllm.LLM.generate`: `make bench`.

Same model, prompts and sampling; each side runs in a process of its own, takes turns with the other, and times whole
passes over the prompts after a warm-up, so that engine start counts for neither. Beside the rates it gives the CPU
time of a pass, of this process and all below it: where others use the machine too, that says more than the clock.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from cluster.config import ModelConfig
from cluster.engine_config import EngineConfig, GenerationRequest, Sampling

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "world-base"
LENGTHS = {"equal (64)": [64], "mixed (8-160)": [8, 16, 32, 64, 160]}


def requests_of(lengths: list[int], count: int) -> list[GenerationRequest]:
    """Prompts of the model's own seeds, several in each so that most completions reach `max_tokens`."""
    seeds = [json.loads(line)["instruction"] for line in (MODEL / "tunesmith" / "seed_tasks.jsonl").open()]
    requests = []
    for number in range(count):
        shown = [seeds[(number + shift) % len(seeds)] for shift in range(8)]
        listed = "\n".join(f"{place}. {text}" for place, text in enumerate(shown, 1))
        prompt = f"Come up with a series of tasks:\n{listed}\n9."
        sampling = Sampling(temperature=1.0, max_tokens=lengths[number % len(lengths)], seed=number)
        requests.append(GenerationRequest(str(number), prompt, sampling))
    return requests


def engine_config() -> EngineConfig:
    return EngineConfig(enforce_eager=True, max_num_seqs=256, cpus_per_engine=1)


def cpu_seconds() -> float:
    """User and system time of this process and all below it so far."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in family)


class Passes:
    """Rates and CPU seconds of passes over the requests; the first is a warm-up."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def measured(self) -> Iterator[list[int]]:
        """Time a block that appends the number of tokens it made to the list."""
        num_tokens: list[int] = []
        cpu, started = cpu_seconds(), time.perf_counter()
        yield num_tokens
        self._found.append((sum(num_tokens) / (time.perf_counter() - started), cpu_seconds() - cpu))

    def result(self) -> dict[str, list[float]]:
        rates, cpu = zip(*self._found[1:], strict=True)
        return {"rates": rates, "cpu_seconds": cpu}


def measure_pool(requests: list[GenerationRequest], num_passes: int) -> dict[str, list[float]]:
    from cluster.pool import EnginePool
    from cluster.ray_cluster import ray_session

    async def measure() -> dict[str, list[float]]:
        passes = Passes()
        async with EnginePool.start(engine_config(), ModelConfig(path=str(MODEL))) as pool:
            for _ in range(num_passes + 1):
                with passes.measured() as num_tokens:
                    done = await asyncio.gather(*(pool.generate(request) for request in requests))
                    num_tokens += (completion.num_completion_tokens for completion in done)
        return passes.result()

    with tempfile.TemporaryDirectory() as folder, ray_session(Path(folder)):
        return asyncio.run(measure())


def measure_raw(requests: list[GenerationRequest], num_passes: int) -> dict[str, list[float]]:
    from cluster.engine import set_environment, vllm_sampling

    config = engine_config()
    set_environment(config, ModelConfig(path=str(MODEL)), num_gpus=0)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from vllm import LLM

    llm = LLM(str(MODEL), enforce_eager=True, max_num_seqs=config.max_num_seqs, generation_config="vllm")
    prompts, samplings = [r.prompt for r in requests], [vllm_sampling(r.sampling) for r in requests]
    passes = Passes()
    for _ in range(num_passes + 1):
        with passes.measured() as num_tokens:
            done = llm.generate(prompts, samplings, use_tqdm=False)
            num_tokens += (len(output.outputs[0].token_ids) for output in done)
    return passes.result()


SIDES = {"pool": measure_pool, "raw": measure_raw}


def in_own_process(side: str, lengths: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "tests.benchmarks.synthesis", "--side", side, "--lengths", lengths]
    command += ["--requests", str(arguments.requests), "--passes", str(arguments.passes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--passes", type=int, default=3, help="timed passes of each process")
    parser.add_argument("--turns", type=int, default=2, help="processes of each side")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--lengths", choices=LENGTHS, default=None)
    arguments = parser.parse_args()
    if arguments.side:
        requests = requests_of(LENGTHS[arguments.lengths], arguments.requests)
        print(json.dumps(SIDES[arguments.side](requests, arguments.passes)))
        return
    title = "Output tokens per second, median (min-max), and CPU seconds of a pass, median"
    table = Table(title=title, title_justify="left")
    for column in ("output lengths", "raw vLLM", "pool", "pool / raw", "CPU raw", "CPU pool", "CPU raw / pool"):
        table.add_column(column, justify="left" if column == "output lengths" else "right")
    for lengths in [arguments.lengths] if arguments.lengths else LENGTHS:
        rates: dict[str, list[float]] = {"raw": [], "pool": []}
        cpu: dict[str, list[float]] = {"raw": [], "pool": []}
        for turn in range(arguments.turns):
            for side in rates:
                print(f"{lengths}: turn {turn + 1}, {side}", file=sys.stderr, flush=True)
                found = in_own_process(side, lengths, arguments)
                rates[side] += found["rates"]
                cpu[side] += found["cpu_seconds"]
        table.add_row(lengths, *cells_of(rates, cpu))
    Console(width=120).print(table)
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")


def cells_of(rates: dict[str, list[float]], cpu: dict[str, list[float]]) -> list[str]:
    """The cells of a row behind its name: medians and ratios of both sides."""
    medians = {side: statistics.median(found) for side, found in rates.items()}
    cpu_medians = {side: statistics.median(found) for side, found in cpu.items()}
    return [
        *(f"{medians[side]:,.0f} ({min(found):,.0f}-{max(found):,.0f})" for side, found in rates.items()),
        f"{medians['pool'] / medians['raw']:.3f}",
        *(f"{seconds:.1f}" for seconds in cpu_medians.values()),
        f"{cpu_medians['raw'] / cpu_medians['pool']:.3f}",
    ]


if __name__ == "__main__":
    main()
