"""Asks the models each question once: what the request log knows is not generated again."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from cluster.config import ModelConfig
from cluster.engines.config import Completion, GenerationRequest, Sampling
from cluster.engines.config import Prompt as EnginePrompt
from cluster.engines.pool import EnginePool
from cluster.errors import TunesmithError
from cluster.files import sha256_json
from generation.config import BudgetConfig, Role
from generation.records import GenerationResult
from generation.request_log import RequestLog
from generation.state import Counts, Timers
from generation.templates import Prompt

UNANSWERED = ("prompt_too_long", "engine_died")  # finish reasons of a completion without a text


class BudgetReached(TunesmithError):
    """A request was not made because the budget is spent. name: the limit, as the recipe has it."""

    def __init__(self, name: str, limit: float) -> None:
        super().__init__(f"budget.{name}={limit if isinstance(limit, int) else format(limit, 'g')} reached")
        self.name = name


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model in a role. name: as the recipe has it; revision: tells its weights and adapter from others'."""

    name: str
    source: ModelConfig
    revision: str
    pool: EnginePool
    form: Literal["completion", "chat"]
    adapter: str | None = None


class Requester:
    """Answers of the models of a run, from the log or from their engines."""

    def __init__(
        self,
        models: Mapping[Role, ServedModel],
        log: RequestLog,
        seed: int,
        budget: BudgetConfig | None = None,
        timers: Timers | None = None,
        spent: Counts | None = None,
    ) -> None:
        """spent: on the requests of what is committed already; they are not asked again, and count for the budget."""
        spent = spent or Counts()
        self.num_resumed = 0
        self.num_generated = 0  # requests that engines answered
        self.num_answered = spent.num_requests  # logged ones included
        self.num_completion_tokens = spent.num_completion_tokens  # of these
        self._models = models
        self._log = log
        self._seed = seed
        self._budget = budget or BudgetConfig()
        self._timers = timers or Timers()
        self._under_way: dict[str, asyncio.Task[Completion]] = {}
        self._gate = asyncio.Lock()  # one request waits for the budget, those after it for the gate
        self._start = time.monotonic()

    def model(self, role: Role) -> ServedModel:
        return self._models[role]

    def pools(self) -> list[EnginePool]:
        """Every pool once."""
        return list({id(model.pool): model.pool for model in self._models.values()}.values())

    def names(self) -> dict[Role, str]:
        """The model of each role."""
        return {role: model.name for role, model in self._models.items()}

    async def ask(
        self,
        role: Role,
        stage: str,
        prompt: Prompt,
        text: str,
        sampling: Sampling,
        replica: int = 0,
        system: str | None = None,
    ) -> GenerationResult:
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
    ) -> GenerationResult:
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
    ) -> GenerationResult:
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
        return GenerationResult(request_id, model.name, model.revision, name, sha, sampling, completion)

    async def _complete(self, request: GenerationRequest, pool: EnginePool) -> Completion:
        """From the log, from the same request if it is under way, or from the engines."""
        request_id = request.request_id
        if not self._is_known(request_id):
            async with self._gate:
                await self._wait_for_budget(request.sampling)
                if not self._is_known(request_id):  # it may have been asked meanwhile
                    task = asyncio.create_task(self._generate(request, pool), name=request_id)
                    task.add_done_callback(self._forget)
                    self._under_way[request_id] = task
        if request_id in self._under_way:
            return await asyncio.shield(self._under_way[request_id])
        completion = Completion.from_dict(self._log.get(request_id))
        self.num_resumed += 1
        self._count(completion)
        return completion

    def _is_known(self, request_id: str) -> bool:
        return request_id in self._under_way or request_id in self._log

    async def _generate(self, request: GenerationRequest, pool: EnginePool) -> Completion:
        completion = await pool.generate(request)
        with self._timers.measure("log"):
            self._log.append(request.request_id, asdict(_without_token_ids(completion)))
        self.num_generated += 1
        self._count(completion)
        return completion

    def _count(self, completion: Completion) -> None:
        self.num_answered += 1
        self.num_completion_tokens += completion.num_completion_tokens

    def _forget(self, task: asyncio.Task[Completion]) -> None:
        del self._under_way[task.get_name()]
        if not task.cancelled():
            task.exception()  # it is its callers' to raise; they may be gone by now

    # -- the budget

    async def _wait_for_budget(self, sampling: Sampling) -> None:
        """Wait while what is under way is likely to spend the rest. Raises BudgetReached once it is spent.

        Requests under way are finished, so if nobody waited, all of them would come on top of the budget.
        """
        while True:
            self._refuse_if_spent()
            if not self._under_way or self._is_room_left(sampling):
                return
            await asyncio.wait(self._under_way.values(), return_when=asyncio.FIRST_COMPLETED)

    def _refuse_if_spent(self) -> None:
        tokens, minutes = self._budget.max_completion_tokens, self._budget.max_minutes
        if tokens is not None and self.num_completion_tokens >= tokens:
            raise BudgetReached("max_completion_tokens", tokens)
        if minutes is not None and self._seconds() >= minutes * 60:
            raise BudgetReached("max_minutes", minutes)

    def _is_room_left(self, sampling: Sampling) -> bool:
        """Whether something is left for one more request, if those under way go like those before them."""
        tokens, minutes = self._budget.max_completion_tokens, self._budget.max_minutes
        num = len(self._under_way)
        if tokens is not None:
            longest = sampling.max_tokens * sampling.n
            each = self.num_completion_tokens / self.num_answered if self.num_answered else longest
            if self.num_completion_tokens + num * each >= tokens:
                return False
        if minutes is not None and self.num_generated:
            return self._seconds() * (1 + num / self.num_generated) < minutes * 60
        return True

    def _seconds(self) -> float:
        return time.monotonic() - self._start


def _without_token_ids(completion: Completion) -> Completion:
    """What the log keeps: nothing reads the ids again, and they are longer than the text."""
    return replace(completion, samples=tuple(replace(sample, token_ids=()) for sample in completion.samples))
