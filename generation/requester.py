"""Asks the engines each question once: what the request log knows is not generated again."""

from dataclasses import asdict

from cluster.engine_config import Completion, GenerationRequest, Sampling
from cluster.files import sha256_json
from cluster.pool import EnginePool
from generation.records import Production
from generation.request_log import RequestLog
from generation.templates import Prompt

UNANSWERED = ("prompt_too_long", "engine_died")  # finish reasons of a completion without a text


class Requester:
    """One model's answers, from the log or from the pool."""

    def __init__(self, pool: EnginePool, log: RequestLog, model: str, model_revision: str, seed: int) -> None:
        self.num_resumed = 0
        self._pool = pool
        self._log = log
        self._model = model
        self._model_revision = model_revision
        self._seed = seed

    async def ask(self, stage: str, prompt: Prompt, text: str, sampling: Sampling, replica: int = 0) -> Production:
        """Complete `text`, which `prompt` rendered. `replica` tells apart requests that may have the same text.

        The id is a hash of all that decides the answer; the model goes in by what it holds, so moving its folder
        changes nothing. The sampling seed follows from the id, unless the recipe sets one.
        """
        identity = {
            "stage": stage,
            "prompt": text,
            "prompt_sha": prompt.sha,
            "model_revision": self._model_revision,
            "sampling": sampling.model_dump(),
            "replica": replica,
            "seed": self._seed,
        }
        request_id = sha256_json(identity)
        seed = int(request_id[:8], 16) >> 1 if sampling.seed is None else sampling.seed
        request = GenerationRequest(request_id, text, Sampling(**{**sampling.model_dump(), "seed": seed}))
        completion = await self._complete(request)
        return Production(
            request_id, self._model, self._model_revision, prompt.name, prompt.sha, request.sampling, completion
        )

    async def _complete(self, request: GenerationRequest) -> Completion:
        logged = self._log.get(request.request_id)
        if logged is not None:
            self.num_resumed += 1
            return Completion.from_dict(logged)
        completion = await self._pool.generate(request)
        self._log.append(request.request_id, asdict(completion))
        return completion
