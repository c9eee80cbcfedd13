"""Runs a method without Ray: driver, filters, log and files are real, the pool is a coroutine."""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import load_from_disk

from cluster.config import ModelConfig
from cluster.engines.config import Completion, GenerationRequest, Sample
from cluster.run.manifest import verify_manifest
from cluster.run.rundir import RunDir
from generation.config.common import Role, SynthesisConfig
from generation.driver import Driver
from generation.filters.drafts import Instance
from generation.judge import PROMPTS as JUDGE_PROMPTS
from generation.judge import Judge
from generation.method import MethodInputs
from generation.methods import METHODS
from generation.request_log import RequestLog
from generation.requester import Requester, ServedModel
from generation.seed_tasks import SeedTask
from generation.state import Timers, from_json
from generation.synthesize import open_sink
from generation.templates import load_prompts
from tests.fakes import continue_prompt

ROOT = Path(__file__).parents[2]
PROMPT_FOLDER = ROOT / "generation" / "prompts"
SEEDS = [
    SeedTask(f"seed-{i}", f"seed {i}", f"Seed instruction number {i} is about {word}.", (Instance("", word),), False)
    for i, word in enumerate("apples boats clouds drums eagles ferns goats hills inks jars".split())  # noqa: SIM905
]


def read_rows(folder: Path) -> list[dict]:
    """All rows of a sealed dataset, in order. Raises InputError if it is unfinished or damaged."""
    verify_manifest(folder)
    return load_from_disk(str(folder)).to_list()


def prompt_text(request: GenerationRequest) -> str:
    """The prompt, or the user's turn of a chat."""
    return request.prompt if isinstance(request.prompt, str) else request.prompt[-1]["content"]


class CoroutinePool:
    """Answers like the scripted engine, or by `answer`, each after a random number of turns of the event loop."""

    def __init__(
        self,
        timing: int = 0,
        max_requests: int | None = None,
        answer: Callable[[GenerationRequest], str | tuple[str, str] | list[str]] | None = None,
    ) -> None:
        """`answer` returns a text, a text and its finish reason, or one text a sample."""
        self.requests: list[GenerationRequest] = []
        self._timing = random.Random(timing)
        self._max_requests = max_requests
        self._answer = answer or self.scripted

    @staticmethod
    def scripted(request: GenerationRequest) -> str:
        return continue_prompt(prompt_text(request), request.sampling.model_dump_json())

    async def generate(self, request: GenerationRequest) -> Completion:
        for _ in range(self._timing.randrange(40)):
            await asyncio.sleep(0)
        if len(self.requests) == self._max_requests:
            raise ConnectionResetError("the process is killed here")
        self.requests.append(request)
        answer = self._answer(request)
        if isinstance(answer, list):
            samples = tuple(Sample(text, "stop", len(text.split())) for text in answer)
        else:
            text, reason = answer if isinstance(answer, tuple) else (answer, "stop")
            samples = (Sample(text, reason, len(text.split())),) * request.sampling.n
        return Completion(request.request_id, samples, 3)


@dataclass(frozen=True)
class Made:
    """The data of a run, and the objects that made it."""

    rows: list[dict]
    rejected: list[dict]
    instructions: list[dict]
    driver: Driver
    requester: Requester

    @property
    def reasons(self) -> set[str]:
        return {row["reason"] for row in self.rejected}

    @property
    def data(self) -> tuple[list[dict], list[dict], list[dict]]:
        return self.rows, self.rejected, self.instructions

    def turns(self) -> list[tuple[str, str]]:
        """User's and assistant's turn of every row."""
        return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in self.rows]


def drive(
    folder: Path,
    pool: CoroutinePool,
    config: SynthesisConfig,
    seed: int = 0,
    seeds: list[SeedTask] = SEEDS,
    source: ModelConfig | None = None,
    models: Mapping[Role, ServedModel] | None = None,
) -> Made:
    """Run a method until it ends or the pool fails. models: the models of some roles, instead of the default one."""
    run = RunDir(folder).create()
    method_type = METHODS[config.method]
    prompts = load_prompts(PROMPT_FOLDER / config.method, method_type.PROMPTS)
    source = source or ModelConfig(path="model")
    with RequestLog(folder / "requests") as log:
        sink, checkpoint = open_sink(run, config, "sha")
        served = {
            role: ServedModel("model", source, "revision", pool, config.models.of(role).form or form)
            for role, form in {"judge": "chat", **method_type.FORMS}.items()
        }
        served |= models or {}
        timers = Timers()
        spent = from_json(checkpoint)[1] if checkpoint else None
        requester = Requester(served, log, seed, config.budget, timers, spent)
        method = method_type(config, MethodInputs(seeds, prompts, requester, timers, seed))
        judge = None
        if config.judge:
            judge = Judge(config.judge, load_prompts(PROMPT_FOLDER / "judge", JUDGE_PROMPTS)["judge"], requester)
        driver = Driver(method, config, sink, judge, timers)
        asyncio.run(driver.run(checkpoint))
        sink.seal()
    columns = [read_rows(run.data / name) for name in ("synthesized", "rejected", "instructions")]
    return Made(*columns, driver, requester)
