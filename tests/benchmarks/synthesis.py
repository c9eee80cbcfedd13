"""Output tokens per second of the engine pool against raw `vllm.LLM.generate`: `make bench`.

Same model, prompts and sampling; each side runs in a process of its own, takes turns with the other, and times whole
passes over the prompts after a warm-up, so that engine start counts for neither.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def rates_of_pool(requests: list[GenerationRequest], num_passes: int) -> list[float]:
    from cluster.pool import EnginePool
    from cluster.ray_cluster import ray_session

    async def measure() -> list[float]:
        async with EnginePool.start(engine_config(), ModelConfig(path=str(MODEL))) as pool:
            rates = []
            for _ in range(num_passes + 1):
                started = time.perf_counter()
                done = await asyncio.gather(*(pool.generate(request) for request in requests))
                rates.append(sum(c.num_completion_tokens for c in done) / (time.perf_counter() - started))
            return rates[1:]

    with tempfile.TemporaryDirectory() as folder, ray_session(Path(folder)):
        return asyncio.run(measure())


def rates_of_raw(requests: list[GenerationRequest], num_passes: int) -> list[float]:
    from cluster.engine import set_environment, vllm_sampling

    config = engine_config()
    set_environment(config, ModelConfig(path=str(MODEL)), num_gpus=0)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from vllm import LLM

    llm = LLM(str(MODEL), enforce_eager=True, max_num_seqs=config.max_num_seqs, generation_config="vllm")
    prompts, samplings = [r.prompt for r in requests], [vllm_sampling(r.sampling) for r in requests]
    rates = []
    for _ in range(num_passes + 1):
        started = time.perf_counter()
        done = llm.generate(prompts, samplings, use_tqdm=False)
        rates.append(sum(len(d.outputs[0].token_ids) for d in done) / (time.perf_counter() - started))
    return rates[1:]


SIDES = {"pool": rates_of_pool, "raw": rates_of_raw}


def in_own_process(side: str, lengths: str, arguments: argparse.Namespace) -> list[float]:
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
        rates = SIDES[arguments.side](requests_of(LENGTHS[arguments.lengths], arguments.requests), arguments.passes)
        print(json.dumps(rates))
        return
    table = Table(title="Output tokens per second, median (min-max)", title_justify="left")
    for column in ("output lengths", "raw vLLM", "pool", "pool / raw"):
        table.add_column(column, justify="left" if column == "output lengths" else "right")
    for lengths in LENGTHS:
        rates: dict[str, list[float]] = {"raw": [], "pool": []}
        for turn in range(arguments.turns):
            for side, found in rates.items():
                print(f"{lengths}: turn {turn + 1}, {side}", file=sys.stderr, flush=True)
                found += in_own_process(side, lengths, arguments)
        medians = {side: statistics.median(found) for side, found in rates.items()}
        cells = [f"{medians[side]:,.0f} ({min(rates[side]):,.0f}-{max(rates[side]):,.0f})" for side in ("raw", "pool")]
        table.add_row(lengths, *cells, f"{medians['pool'] / medians['raw']:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
