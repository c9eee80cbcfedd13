"""Asks the models each question once: what the request log knows is not generated again."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from cluster.config import ModelConfig
from cluster.engine_config import Completion, GenerationRequest, Sampling
from cluster.engine_config import Prompt as EnginePrompt
from cluster.errors import TunesmithError
from cluster.files import sha256_json
from cluster.pool import EnginePool
from generation.attribution import Attribution
from generation.config import BudgetConfig, Role
from generation.records import Production
from generation.request_log import RequestLog
from generation.templates import Prompt

UNANSWERED = ("prompt_too_long", "engine_died")  # finish reasons of a completion without a text


class BudgetReached(TunesmithError):
    """A request was not made because the budget is spent."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model in a role. name: as the recipe has it; revision: tells its weights and adapter from others'."""

    name: str
    source: ModelConfig
    revision: str
    pool: EnginePool
    form: Literal["plain", "chat"]
    adapter: str | None = None


class Requester:
    """Answers of the models of a run, from the log or from their engines."""

    def __init__(
        self,
        models: Mapping[Role, ServedModel],
        log: RequestLog,
        seed: int,
        budget: BudgetConfig | None = None,
        attribution: Attribution | None = None,
    ) -> None:
        self.num_resumed = 0
        self.num_completion_tokens = 0  # of all answers given, logged ones included
        self._models = models
        self._log = log
        self._seed = seed
        self._budget = budget or BudgetConfig()
        self._attribution = attribution or Attribution()
        self._under_way: dict[str, asyncio.Task[Completion]] = {}
        self._start = time.monotonic()

    def model(self, role: Role) -> ServedModel:
        return self._models[role]

    async def ask(
        self,
        role: Role,
        stage: str,
        prompt: Prompt,
        text: str,
        sampling: Sampling,
        replica: int = 0,
        system: str | None = None,
    ) -> Production:
        """Continue `text`, which `prompt` rendered, or answer it as the user's turn of a chat if the role is asked so.

        `replica` tells apart requests that may have the same text; `system` is put before the user's turn.
        """
        rendered: EnginePrompt = text
        if self._models[role].form == "chat":
            turns = [("system", system)] if system else []
            rendered = [{"role": name, "content": content} for name, content in [*turns, ("user", text)]]
        return await self._ask(role, stage, rendered, (prompt.name, prompt.sha), sampling, replica)

    async def continue_tokens(
        self, role: Role, stage: str, token_ids: list[int], name: str, sampling: Sampling, replica: int
    ) -> Production:
        """Continue a prompt that no template made; `name` stands for it in the rows."""
        return await self._ask(role, stage, token_ids, (name, sha256_json(token_ids)[:16]), sampling, replica)

    async def _ask(
        self,
        role: Role,
        stage: str,
        rendered: EnginePrompt,
        prompt: tuple[str, str],
        sampling: Sampling,
        replica: int,
    ) -> Production:
        """The id is a hash of all that decides the answer; the model goes in by what it holds, so moving its folder
        changes nothing. The sampling seed follows from the id, unless the recipe sets one."""
        model = self._models[role]
        name, sha = prompt
        identity = {
            "stage": stage,
            "prompt": rendered,
            "prompt_sha": sha,
            "model_revision": model.revision,
            "sampling": sampling.model_dump(mode="json"),
            "replica": replica,
            "seed": self._seed,
        }
        request_id = sha256_json(identity)
        if sampling.seed is None:
            sampling = sampling.model_copy(update={"seed": int(request_id[:8], 16) >> 1})
        request = GenerationRequest(request_id, rendered, sampling, model.adapter, group=name)
        completion = await self._complete(request, model.pool)
        return Production(request_id, model.name, model.revision, name, sha, sampling, completion)

    async def _complete(self, request: GenerationRequest, pool: EnginePool) -> Completion:
        """From the log, from the same request if it is under way, or from the engines."""
        request_id = request.request_id
        if request_id not in self._under_way:
            logged = self._log.get(request_id)
            if logged is not None:
                self.num_resumed += 1
                completion = Completion.from_dict(logged)
                self.num_completion_tokens += completion.num_completion_tokens
                return completion
            self._spend()
            task = self._under_way[request_id] = asyncio.create_task(self._generate(request, pool), name=request_id)
            task.add_done_callback(self._forget)
        return await asyncio.shield(self._under_way[request_id])

    async def _generate(self, request: GenerationRequest, pool: EnginePool) -> Completion:
        completion = await pool.generate(request)
        with self._attribution.spent_on("log"):
            self._log.append(request.request_id, asdict(_without_token_ids(completion)))
        self.num_completion_tokens += completion.num_completion_tokens
        return completion

    def _forget(self, task: asyncio.Task[Completion]) -> None:
        del self._under_way[task.get_name()]
        if not task.cancelled():
            task.exception()  # it is its callers' to raise; they may be gone by now

    def _spend(self) -> None:
        """Raise BudgetReached if nothing may be generated any more."""
        tokens, minutes = self._budget.max_completion_tokens, self._budget.max_minutes
        if tokens is not None and self.num_completion_tokens >= tokens:
            raise BudgetReached(f"budget.max_completion_tokens={tokens} reached")
        if minutes is not None and time.monotonic() - self._start >= minutes * 60:
            raise BudgetReached(f"budget.max_minutes={minutes:g} reached")


def _without_token_ids(completion: Completion) -> Completion:
    """What the log keeps: nothing reads the ids again, and they are longer than the text."""
    return replace(completion, samples=tuple(replace(sample, token_ids=()) for sample in completion.samples))
