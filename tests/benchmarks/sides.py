"""The sides of the synthesis benchmark: the same requests through raw vLLM, our pool and our whole stage.

Both engines are up before anything is timed, raw vLLM's and the pool's, and one of them is idle at any time.
"""

import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from cluster.config import ModelConfig
from cluster.engines.config import EngineConfig, GenerationRequest, Sampling
from cluster.engines.pool import EnginePool
from cluster.ray.cluster import ray_session
from english.model import get_model
from tests.benchmarks.given_requests import synthesize

ROOT = Path(__file__).parents[2]
LENGTHS = {"equal (64)": [64], "mixed (8-160)": [8, 16, 32, 64, 160]}
RAW = {"raw": True, "raw, its own processes": False}  # whether it is one process, as our engines are
TAIL = 0.95  # share of the rows after which the tail begins


@dataclass(frozen=True)
class Work:
    """A model, the engine that serves it, and raw vLLM's arguments in the place of the engine's."""

    model: ModelConfig
    engine: EngineConfig
    raw: dict[str, object]


def work_of(model: str) -> Work:
    """The toy world's base model in an engine of one CPU, as in the demo; or the English model as it comes."""
    if model == "english":
        # Raw vLLM's best on CPUs, of compiled and eager, and of float32 and bfloat16: "auto" is the stored bfloat16.
        return Work(ModelConfig(path=str(get_model())), EngineConfig(), {"dtype": "auto", "enforce_eager": True})
    # With one CPU scheduler and model share a process, and neither waits for the other in a loop.
    engine = EngineConfig(dtype="float32", enforce_eager=True, max_num_seqs=256, cpus_per_engine=1)
    raw = {"dtype": "float32", "enforce_eager": True}
    return Work(ModelConfig(path=str(ROOT / "models" / "world-base")), engine, raw)


def requests_of(model: ModelConfig, lengths: Sequence[int], count: int, draw: int) -> list[GenerationRequest]:
    """Prompts as Self-Instruct's: the model's seeds, eight in each, so that most completions reach `max_tokens`.

    draw: every number gives other prompts and seeds. The same ones again would be no work that anyone has: vLLM would
    find each prompt computed, and, where it also batches them as before, each matrix multiplication compiled.
    """
    own = Path(model.path) / "tunesmith" / "seed_tasks.jsonl"
    packaged = ROOT / "generation" / "seeds" / "seed_tasks.jsonl"
    seeds = [json.loads(line)["instruction"] for line in (own if own.exists() else packaged).open()]
    rng = random.Random(draw)
    requests = []
    for number in range(count):
        listed = "\n".join(f"{place}. {text}" for place, text in enumerate(rng.sample(seeds, 8), 1))
        prompt = f"Come up with a series of tasks:\n{listed}\n9."
        max_tokens = lengths[number % len(lengths)]
        sampling = Sampling(temperature=1.0, max_tokens=max_tokens, seed=rng.getrandbits(32))
        requests.append(GenerationRequest(str(number), prompt, sampling))
    return requests


def cpu_seconds() -> float:
    """User and system time of this process and all below it so far."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in family)


Rows = list[tuple[float, int]]  # (moment, tokens) of each finished row; rows of unknown moment come in one
Side = Callable[[list[GenerationRequest]], Awaitable[Rows]]


@dataclass(frozen=True)
class Pass:
    """One pass of one side over the requests."""

    tokens_per_second: float
    cpu_seconds: float  # of this process and all below it
    tail: float | None  # share of the pass that its last rows took


async def measured(side: Side, requests: list[GenerationRequest]) -> Pass:
    cpu, started = cpu_seconds(), time.perf_counter()
    rows = await side(requests)
    ended = time.perf_counter()
    moments = sorted(moment for moment, _ in rows)
    tail = (ended - moments[int(TAIL * len(moments))]) / (ended - started) if len(rows) > 1 else None
    return Pass(sum(tokens for _, tokens in rows) / (ended - started), cpu_seconds() - cpu, tail)


@contextlib.contextmanager
def raw_side(work: Work, is_one_process: bool) -> Iterator[Side]:
    """`vllm.LLM.generate` on all requests at once, with the settings of our engines, in a process of its own.

    is_one_process: the model computes where `generate` is called, which vLLM does not do of itself; otherwise its
    processes and threads are as it comes. In a process of ours the driver of our stage would live in a heap of vLLM's
    objects, which no driver does.
    """
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()

    async def generate(requests: list[GenerationRequest]) -> Rows:
        ours.send(requests)
        return [(0.0, await asyncio.to_thread(ours.recv))]

    with tempfile.TemporaryDirectory() as scratch:
        process = context.Process(target=_serve_raw, args=(its, work, is_one_process, scratch))
        process.start()
        its.close()
        try:
            ours.recv()  # it is up, or has died and this raises EOFError
            yield generate
        finally:
            ours.close()
            process.join()


def _serve_raw(pipe: Connection, work: Work, is_one_process: bool, scratch: str) -> None:
    """Answer every list of requests in the pipe with the number of tokens made of it, until the pipe is closed."""
    os.environ["TMPDIR"] = tempfile.tempdir = scratch  # vLLM leaves its sockets
    from cluster.engines.engine import set_environment, vllm_sampling

    set_environment(work.engine, work.model, num_gpus=0)
    if not is_one_process:
        for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"):
            os.environ.pop(name, None)
    from vllm import LLM

    llm = LLM(
        work.model.path,
        max_num_seqs=work.engine.max_num_seqs,
        generation_config="vllm",
        enable_chunked_prefill=False,  # as our engines on a CPU: with it, seeded requests kill the engine
        **work.raw,
    )
    pipe.send(True)
    for requests in iter(lambda: _received(pipe), None):
        sampling = [vllm_sampling(request.sampling) for request in requests]
        done = llm.generate([request.prompt for request in requests], sampling, use_tqdm=False)
        pipe.send(sum(len(output.outputs[0].token_ids) for output in done))
    llm.llm_engine.engine_core.shutdown()  # its processes would keep this one from ending


def _received(pipe: Connection) -> list[GenerationRequest] | None:
    """What comes out of the pipe; None when its other end is closed."""
    with contextlib.suppress(EOFError):
        return pipe.recv()
    return None


def pool_side(pool: EnginePool) -> Side:
    """Our pool, and nothing around it."""

    async def one(request: GenerationRequest) -> tuple[float, int]:
        completion = await pool.generate(request)
        return time.perf_counter(), completion.num_completion_tokens

    async def generate(requests: list[GenerationRequest]) -> Rows:
        return await asyncio.gather(*map(one, requests))

    return generate


def stage_side(pool: EnginePool, model: ModelConfig, folder: Path) -> Side:
    """Our whole stage: driver, request log, filters (novelty among them), Arrow shards and checkpoints."""

    async def generate(requests: list[GenerationRequest]) -> Rows:
        return await synthesize(requests, pool, model, Path(tempfile.mkdtemp(dir=folder)))

    return generate


@contextlib.asynccontextmanager
async def sides_of(work: Work, names: Sequence[str]) -> AsyncIterator[dict[str, Side]]:
    """The sides by name, their engines up, and none beside them."""
    every: dict[str, Side] = {}
    async with contextlib.AsyncExitStack() as stack:
        if not RAW.keys() >= set(names):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(ray_session(folder / "ray"))
            pool = await stack.enter_async_context(EnginePool.start(work.engine, work.model))
            every = {"pool": pool_side(pool), "stage": stage_side(pool, work.model, folder)}
        for name in RAW.keys() & set(names):
            every[name] = stack.enter_context(raw_side(work, RAW[name]))
        gc.freeze()  # as the stage does when its engines are up
        yield {name: every[name] for name in names}
