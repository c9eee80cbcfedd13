"""A method whose answers are the benchmark's requests: the stage around them is the real one."""

import time
from pathlib import Path
from typing import ClassVar

import jinja2

from cluster.config import ModelConfig
from cluster.engines.config import GenerationRequest
from cluster.engines.pool import EnginePool
from cluster.run.rundir import RunDir
from generation.config.filters import EmptyConfig, NoveltyConfig, RefusalConfig, RepetitionConfig
from generation.config.methods import AnswerOnlyConfig
from generation.driver import Driver
from generation.filters.drafts import Draft
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.records import Origin, machine_record
from generation.request_log import RequestLog
from generation.requester import Requester, ServedModel
from generation.sink import DataSink
from generation.state import Timers
from generation.templates import Prompt

# All of a row is judged; a high limit of novelty keeps most rows, so that every later one is compared with them.
FILTERS = (
    EmptyConfig(fields=("output",)),
    RefusalConfig(),
    RepetitionConfig(),
    NoveltyConfig(fields=("output",), max_score=0.95),
)
PROMPT = Prompt("benchmark/given", "0", Path("given.jinja"), jinja2.Template("{{ text }}"))


class GivenRequests:
    """Every proposal is one of the requests."""

    NAME = "given_requests"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {}
    FORMS: ClassVar[dict[str, str]] = {"answerer": "completion"}

    def __init__(self, requests: list[GenerationRequest], inputs: MethodInputs) -> None:
        self.num_wanted = None
        self.max_proposals = len(requests)
        self.exhausted = ""
        self.finished: list[tuple[float, int]] = []  # moment and tokens of each row
        self._requests = requests
        self._inputs = inputs

    def remembered(self):
        return ()

    def seed_rows(self):
        return ()

    async def propose(self, number, visible) -> Proposal:
        return Proposal(str(number), (Draft(str(number)),), seed_ids=(str(number),))

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        number = int(accepted.draft.instruction)
        request = self._requests[number]
        response = await self._inputs.requester.ask(
            "answerer", "answer", PROMPT, request.prompt, request.sampling, replica=number
        )
        completion = response.completion
        self.finished.append((time.perf_counter(), completion.num_completion_tokens))
        row = machine_record(Origin(self.NAME, accepted.id), response, request.prompt, completion.text)
        return InstructionResult((row,), responses=(response,))


async def synthesize(
    requests: list[GenerationRequest], pool: EnginePool, model: ModelConfig, folder: Path
) -> list[tuple[float, int]]:
    """Make a dataset of the requests' answers in `folder`; moment and tokens of each."""
    run = RunDir(folder).create()
    config = AnswerOnlyConfig(row_filters=FILTERS, max_concurrent_proposals=1024, checkpoint_seconds=5)
    with RequestLog(folder / "requests") as log:
        sink, _ = DataSink.open(run, config.rows_per_shard, "benchmark")
        timers = Timers()
        requester = Requester({"answerer": ServedModel("m", model, "r", pool, "completion")}, log, 0, None, timers)
        method = GivenRequests(requests, MethodInputs((), {}, requester, timers, 0))
        await Driver(method, config, sink, None, timers).run(None)
        sink.seal()
    return method.finished
