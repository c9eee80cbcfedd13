"""Sends requests to the models. A request whose answer is in the request log is not generated again."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cluster.config import ModelConfig
from cluster.engines.config import Completion, GenerationRequest, Sampling
from cluster.engines.config import Prompt as EnginePrompt
from cluster.engines.pool import EnginePool, RequestRefused
from cluster.errors import TunesmithError
from cluster.files import sha256_json
from generation.config.common import BudgetConfig, Role
from generation.filters.reasoning import split_reasoning
from generation.records import GenerationResult
from generation.request_log import RequestLog
from generation.state import Counts, Timers
from generation.templates import Prompt


class BudgetReached(TunesmithError):
    """A request was not sent because the budget is spent. name: the limit, as the recipe names it."""

    def __init__(self, name: str, limit: float) -> None:
        super().__init__(f"budget.{name}={limit if isinstance(limit, int) else format(limit, 'g')} reached")
        self.name = name


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model in a role. name: as in the recipe; revision: identifies the weights and the adapter.

    reasoning_mark: with which the chat template begins the assistant's turn; empty if it begins with no reasoning.
    """

    name: str
    source: ModelConfig
    revision: str
    pool: EnginePool
    form: Literal["completion", "chat"]
    adapter: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_mark: str = ""


class Requester:
    """Gets the answers of a run's models, from the log or from their engines.

    The log has the models' texts as they are. In the answers, the reasoning is apart from the text.
    """

    def __init__(
        self,
        models: Mapping[Role, ServedModel],
        log: RequestLog,
        seed: int,
        budget: BudgetConfig | None = None,
        timers: Timers | None = None,
        spent: Counts | None = None,
    ) -> None:
        """spent: the requests of data that is committed. They count for the budget and are not sent again."""
        spent = spent or Counts()
        self.num_resumed = 0  # answered by the log
        self.num_generated = 0  # answered by engines
        self.num_answered = spent.num_requests
        self.num_completion_tokens = spent.num_completion_tokens  # of num_answered
        self._models = models
        self._log = log
        self._seed = seed
        self._budget = budget or BudgetConfig()
        self._timers = timers or Timers()
        self._in_flight: dict[str, asyncio.Task[Completion]] = {}
        self._budget_lock = asyncio.Lock()  # the next request waits for the budget, all others for the lock
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
        """Send `text`, which `prompt` rendered, as the role's form says: to be continued, or as the user's turn.

        replica: distinguishes requests that may have the same text. system: the turn before the user's.
        """
        rendered: EnginePrompt = text
        if self._models[role].form == "chat":
            turns = [("system", system)] if system else []
            rendered = [{"role": name, "content": content} for name, content in [*turns, ("user", text)]]
        return await self._request(role, stage, rendered, prompt.name, prompt.sha, sampling, replica)

    async def continue_tokens(
        self, role: Role, stage: str, token_ids: list[int], name: str, sampling: Sampling, replica: int
    ) -> GenerationResult:
        """Continue a prompt that no template rendered. name: stands for the template in the rows."""
        return await self._request(role, stage, token_ids, name, sha256_json(token_ids)[:16], sampling, replica)

    async def _request(
        self,
        role: Role,
        stage: str,
        rendered: EnginePrompt,
        prompt_name: str,
        prompt_sha: str,
        sampling: Sampling,
        replica: int,
    ) -> GenerationResult:
        """Answer from the log, from the same request if it is in flight, or else from the engines."""
        model = self._models[role]
        is_chat = isinstance(rendered[0], dict) if rendered else False
        kwargs = model.chat_template_kwargs if is_chat else {}
        identity = {
            "stage": stage,
            "prompt": rendered,
            "prompt_sha": prompt_sha,
            "model_revision": model.revision,  # a hash of the weights: moving the model's folder changes nothing
            "sampling": sampling.model_dump(mode="json"),
            "replica": replica,
            "seed": self._seed,
        }
        if kwargs:
            identity["chat_template_kwargs"] = kwargs
        request_id = sha256_json(identity)
        if sampling.seed is None:
            sampling = sampling.model_copy(update={"seed": int(request_id[:8], 16) >> 1})
        if not self._is_known(request_id):
            async with self._budget_lock:
                await self._wait_for_budget(sampling)
                if not self._is_known(request_id):  # another caller may have sent it meanwhile
                    request = GenerationRequest(request_id, rendered, sampling, model.adapter, prompt_name, kwargs)
                    task = asyncio.create_task(self._generate(request, model.pool), name=request_id)
                    task.add_done_callback(self._forget)
                    self._in_flight[request_id] = task
        if request_id in self._in_flight:
            completion = await asyncio.shield(self._in_flight[request_id])
        else:
            completion = Completion.from_dict(self._log.get(request_id))
            self.num_resumed += 1
            self._count(completion)
        if not sampling.structured:  # else the form leaves no room for reasoning
            completion = without_reasoning(completion, model.reasoning_mark if is_chat else "")
        return GenerationResult(request_id, model.name, model.revision, prompt_name, prompt_sha, sampling, completion)

    def _is_known(self, request_id: str) -> bool:
        return request_id in self._in_flight or request_id in self._log

    async def _generate(self, request: GenerationRequest, pool: EnginePool) -> Completion:
        try:
            completion = await pool.generate(request)
        except RequestRefused as refused:  # it would be refused again, and the others are not to wait for it
            completion = Completion.failed(request, "refused", refused.error)
        samples = tuple(replace(sample, token_ids=()) for sample in completion.samples)  # longer than the text
        with self._timers.measure("log"):
            self._log.append(request.request_id, asdict(replace(completion, samples=samples)))
        self.num_generated += 1
        self._count(completion)
        return completion

    def _count(self, completion: Completion) -> None:
        self.num_answered += 1
        self.num_completion_tokens += completion.num_completion_tokens

    def _forget(self, task: asyncio.Task[Completion]) -> None:
        del self._in_flight[task.get_name()]
        if not task.cancelled():
            task.exception()  # mark it as retrieved: the callers raise it, if they have not been cancelled

    # -- the budget

    async def _wait_for_budget(self, sampling: Sampling) -> None:
        """Wait while the requests in flight are likely to spend the rest. Raises BudgetReached once it is spent.

        Requests in flight are always finished. Without the wait, all of them would exceed the budget.
        """
        while True:
            self._raise_if_spent()
            if not self._in_flight or self._has_budget_left(sampling):
                return
            await asyncio.wait(self._in_flight.values(), return_when=asyncio.FIRST_COMPLETED)

    def _raise_if_spent(self) -> None:
        max_tokens, max_minutes = self._budget.max_completion_tokens, self._budget.max_minutes
        if max_tokens is not None and self.num_completion_tokens >= max_tokens:
            raise BudgetReached("max_completion_tokens", max_tokens)
        if max_minutes is not None and self._seconds() >= max_minutes * 60:
            raise BudgetReached("max_minutes", max_minutes)

    def _has_budget_left(self, sampling: Sampling) -> bool:
        """Whether there is room for one more request, if those in flight take what the ones before took on average."""
        max_tokens, max_minutes = self._budget.max_completion_tokens, self._budget.max_minutes
        num_in_flight = len(self._in_flight)
        if max_tokens is not None:
            longest = sampling.max_tokens * sampling.n
            each = self.num_completion_tokens / self.num_answered if self.num_answered else longest
            if self.num_completion_tokens + num_in_flight * each >= max_tokens:
                return False
        if max_minutes is not None and self.num_generated:
            return self._seconds() * (1 + num_in_flight / self.num_generated) < max_minutes * 60
        return True

    def _seconds(self) -> float:
        return time.monotonic() - self._start


def without_reasoning(completion: Completion, mark: str) -> Completion:
    """The completion with each sample's reasoning apart. mark: begins every text, but stands in the prompt."""
    samples = []
    for sample in completion.samples:
        text = sample.text if sample.text.lstrip().startswith(mark) else mark + sample.text  # some repeat it
        answer, reasoning = split_reasoning(text)
        is_split = reasoning or answer != text
        samples.append(replace(sample, text=answer, reasoning_content=reasoning) if is_split else sample)
    return replace(completion, samples=tuple(samples))
