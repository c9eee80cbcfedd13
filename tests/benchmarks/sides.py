"""The sides of the synthesis benchmark: the same requests through raw vLLM, our pool, our whole stage, and a peer.

Each is measured in a process of its own, after a warm-up, so that no engine's start counts.
"""

import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from cluster.config import ModelConfig
from cluster.engine_config import EngineConfig, GenerationRequest, Sampling

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(path=str(ROOT / "models" / "world-base"))
ENGINE = EngineConfig(enforce_eager=True, max_num_seqs=256, cpus_per_engine=1)
LENGTHS = {"equal (64)": [64], "mixed (8-160)": [8, 16, 32, 64, 160]}
TAIL = 0.95  # share of the rows after which the tail begins


def requests_of(lengths: Sequence[int], count: int) -> list[GenerationRequest]:
    """Prompts of the model's own seeds, several in each so that most completions reach `max_tokens`."""
    own = Path(MODEL.path) / "tunesmith" / "seed_tasks.jsonl"
    seeds = [json.loads(line)["instruction"] for line in own.open()]
    requests = []
    for number in range(count):
        shown = [seeds[(number + shift) % len(seeds)] for shift in range(8)]
        listed = "\n".join(f"{place}. {text}" for place, text in enumerate(shown, 1))
        prompt = f"Come up with a series of tasks:\n{listed}\n9."
        sampling = Sampling(temperature=1.0, max_tokens=lengths[number % len(lengths)], seed=number)
        requests.append(GenerationRequest(str(number), prompt, sampling))
    return requests


def cpu_seconds() -> float:
    """User and system time of this process and all below it so far."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in family)


class Passes:
    """Tokens per second, CPU seconds and share of the tail, of passes over the requests; the first is a warm-up."""

    def __init__(self) -> None:
        self._rates: list[float] = []
        self._cpu: list[float] = []
        self._tails: list[float] = []

    @contextlib.contextmanager
    def measured(self) -> Iterator[list[tuple[float, int]]]:
        """Time a block that appends (moment, tokens) of each finished row; rows of unknown moment come in one."""
        rows: list[tuple[float, int]] = []
        cpu, started = cpu_seconds(), time.perf_counter()
        yield rows
        ended = time.perf_counter()
        self._rates.append(sum(tokens for _, tokens in rows) / (ended - started))
        self._cpu.append(cpu_seconds() - cpu)
        if len(rows) > 1:
            moments = sorted(moment for moment, _ in rows)
            self._tails.append((ended - moments[int(TAIL * len(moments))]) / (ended - started))

    def result(self) -> dict[str, list[float]]:
        return {"rates": self._rates[1:], "cpu_seconds": self._cpu[1:], "tails": self._tails[1:]}


def measure_raw(requests: list[GenerationRequest], num_passes: int) -> dict[str, list[float]]:
    """`vllm.LLM.generate` on all requests at once."""
    from cluster.engine import set_environment, vllm_sampling

    set_environment(ENGINE, MODEL, num_gpus=0)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from vllm import LLM

    llm = LLM(
        MODEL.path,
        enforce_eager=True,
        max_num_seqs=ENGINE.max_num_seqs,
        generation_config="vllm",
        enable_chunked_prefill=False,  # as our engines on a CPU: with it, seeded requests kill the engine
    )
    prompts, samplings = [r.prompt for r in requests], [vllm_sampling(r.sampling) for r in requests]
    passes = Passes()
    for _ in range(num_passes + 1):
        with passes.measured() as rows:
            done = llm.generate(prompts, samplings, use_tqdm=False)
            rows.append((0.0, sum(len(output.outputs[0].token_ids) for output in done)))
    return passes.result()


def measure_pool(requests: list[GenerationRequest], num_passes: int) -> dict[str, list[float]]:
    """Our pool, and nothing around it."""
    from cluster.pool import EnginePool
    from cluster.ray_cluster import ray_session

    async def measure() -> dict[str, list[float]]:
        passes = Passes()
        async with EnginePool.start(ENGINE, MODEL) as pool:

            async def one(request: GenerationRequest) -> tuple[float, int]:
                completion = await pool.generate(request)
                return time.perf_counter(), completion.num_completion_tokens

            for _ in range(num_passes + 1):
                with passes.measured() as rows:
                    rows += await asyncio.gather(*map(one, requests))
        return passes.result()

    with tempfile.TemporaryDirectory() as folder, ray_session(Path(folder)):
        return asyncio.run(measure())


def measure_stage(requests: list[GenerationRequest], num_passes: int) -> dict[str, list[float]]:
    """Our whole stage: driver, request log, filters (novelty among them), Arrow shards and checkpoints."""
    from cluster.pool import EnginePool
    from cluster.ray_cluster import ray_session
    from tests.benchmarks.given_requests import synthesize

    async def measure(folder: Path) -> dict[str, list[float]]:
        passes = Passes()
        async with EnginePool.start(ENGINE, MODEL) as pool:
            for number in range(num_passes + 1):
                with passes.measured() as rows:
                    rows += await synthesize(requests, pool, MODEL, folder / str(number))
        return passes.result()

    with tempfile.TemporaryDirectory() as folder, ray_session(Path(folder)):
        return asyncio.run(measure(Path(folder)))


def measure_ray_data(requests: list[GenerationRequest], num_passes: int) -> dict[str, list[float]]:
    """`ray.data.llm`; see ray_data.py for what its clock leaves out."""
    from cluster.ray_cluster import ray_session
    from tests.benchmarks.ray_data import rate_of_ray_data

    with tempfile.TemporaryDirectory() as folder, ray_session(Path(folder)):
        rates = [rate_of_ray_data(requests, ENGINE, MODEL) for _ in range(num_passes)]
    return {"rates": rates, "cpu_seconds": [], "tails": []}


SIDES = {"raw": measure_raw, "pool": measure_pool, "stage": measure_stage, "ray.data.llm": measure_ray_data}
