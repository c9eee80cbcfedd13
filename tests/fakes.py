"""A scripted engine: a pure function of prompt and sampling, with faults.

It replaces VLLMEngine (`backend="tests.fakes:ScriptedEngine"`). The file `script` (JSON) in the model's folder sets its
behavior, so tests that share one Ray have engines of their own:

    latency_ms         upper bound of the time of a request, which is random
    die_at             numbers of requests, counted over all engines, at which the engine is killed
    poison             a prompt with this text kills the engine
    stall              a prompt with this text gets no token and no answer
    trickle            a prompt with this text gets a token every 50 ms for 3 s before it is answered
    ms_per_token       milliseconds from one token of a request to the next
    slow_ms_per_token  the same for the engine that starts first
    answers            {text in a prompt: its answer}, cut at max_tokens words
    refuse             a prompt with this text is an error
    fail_start         the engine raises this when it starts
"""

import asyncio
import hashlib
import json
import os
import random
import re
import signal
from pathlib import Path

from cluster.config import ModelConfig
from cluster.engines.config import Completion, EngineConfig, EngineReport, GenerationRequest, Prompt, Sample, Sampling

LOG_LINE_BYTES = 65
LIST_END = re.compile(r"\n\d+\.$")
VERBS = ("List", "Describe", "Explain", "Compare", "Rewrite", "Sort", "Count", "Translate", "Classify", "Summarize")
THINGS = (
    *("amber", "basil", "candle", "dune", "ember", "fjord", "glacier", "harbor"),
    *("island", "jasmine", "kettle", "lantern", "meadow", "needle", "orchard", "pebble"),
    *("quartz", "river", "saddle", "timber", "umbrella", "valley", "walnut", "yarn"),
    *("zephyr", "anchor", "bridge", "copper", "drum", "engine", "feather", "garden"),
)


def write_script(model_folder: Path, **script: object) -> ModelConfig:
    """Make a model folder for ScriptedEngine, or change its script."""
    model_folder.mkdir(parents=True, exist_ok=True)
    (model_folder / "config.json").write_text('{"model_type": "scripted"}')
    (model_folder / "script").write_text(json.dumps(script))
    return ModelConfig(path=str(model_folder))


def scripted(**fields: object) -> EngineConfig:
    """A config of scripted engines, several of which fit on any machine."""
    return EngineConfig(**{"backend": "tests.fakes:ScriptedEngine", "cpus_per_engine": 0.1, **fields})


def generated_ids(model_folder: Path) -> list[str]:
    """Ids of all requests that the engines of this model finished, in order."""
    log = model_folder / "generated"
    return log.read_text().split() if log.exists() else []


class ScriptedEngine:
    def __init__(self, config: EngineConfig, model: ModelConfig, num_gpus: int, adapters: tuple[str, ...] = ()) -> None:
        self._folder = Path(model.path)
        self._script = json.loads((self._folder / "script").read_text())
        if "fail_start" in self._script:
            raise ValueError(self._script["fail_start"])
        self._max_model_len = config.max_model_len or 100_000
        self._clock = random.Random()
        self._num_tokens = 0
        self._running: set[str] = set()
        ms_per_token = self._script.get("ms_per_token", 0)
        if self._is_first():
            ms_per_token = self._script.get("slow_ms_per_token", ms_per_token)
        self._seconds_per_token = ms_per_token / 1000

    def report(self) -> EngineReport:
        return EngineReport(num_tokens=self._num_tokens, num_running=len(self._running))

    async def generate(self, request: GenerationRequest) -> Completion:
        self._running.add(request.request_id)
        try:
            return await self._generate(request)
        finally:
            self._running.discard(request.request_id)

    async def _generate(self, request: GenerationRequest) -> Completion:
        prompt = prompt_text(request.prompt)
        if self._script.get("poison", "\0") in prompt:
            os._exit(1)
        if self._script.get("stall", "\0") in prompt:
            await asyncio.Event().wait()
        if self._script.get("trickle", "\0") in prompt:
            for _ in range(60):
                await asyncio.sleep(0.05)
                self._num_tokens += 1
        if self._script.get("refuse", "\0") in prompt:
            raise ValueError("no such thing")
        num_prompt_tokens = len(prompt.split())
        if num_prompt_tokens > self._max_model_len:
            return Completion.failed(request, "prompt_too_long")
        await asyncio.sleep(self._clock.random() * self._script.get("latency_ms", 0) / 1000)
        samples = tuple(self._sample(prompt, request.sampling, number) for number in range(request.sampling.n))
        for _ in range(max(sample.num_tokens for sample in samples)):
            if self._seconds_per_token:
                await asyncio.sleep(self._seconds_per_token)
            self._num_tokens += 1
        if self._log(request.request_id) in self._script.get("die_at", ()):
            os.kill(os.getpid(), signal.SIGKILL)
        return Completion(request.request_id, samples, num_prompt_tokens)

    def _sample(self, prompt: str, sampling: Sampling, number: int) -> Sample:
        for part, text in self._script.get("answers", {}).items():
            if part in prompt:
                words = text.split(" ")[: sampling.max_tokens]
                is_cut = len(text.split(" ")) > sampling.max_tokens
                return Sample(" ".join(words), "length" if is_cut else "stop", len(words), tuple(range(len(words))))
        return sample_of(prompt, sampling, number)

    def _is_first(self) -> bool:
        """Whether this is the first engine of this model."""
        try:
            os.close(os.open(self._folder / "first", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _log(self, request_id: str) -> int:
        """Append the id to the file `generated`. Returns how many ids it now has, of all engines."""
        descriptor = os.open(self._folder / "generated", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, f"{request_id:{LOG_LINE_BYTES - 1}}\n".encode())
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.close(descriptor)
        return position // LOG_LINE_BYTES


def prompt_text(prompt: Prompt) -> str:
    """A prompt in any form as the text that the pseudo-model reads. A chat ends with the assistant's turn."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt[0], dict):
        return "".join(f"{message['role']}: {message['content']}\n" for message in prompt) + "assistant:"
    return " ".join(map(str, prompt))


def sample_of(prompt: str, sampling: Sampling, number: int) -> Sample:
    """Sample `number` of a prompt: its words are its tokens."""
    key = sampling.model_dump_json() + (f" sample {number}" if number else "")
    if sampling.structured and sampling.structured.choice:
        text = random.Random(hashlib.sha256(f"{key}\0{prompt}".encode()).digest()).choice(sampling.structured.choice)
    else:
        text = continue_prompt(prompt, key)
    num_tokens = len(text.split())
    finish_reason = "length" if num_tokens > sampling.max_tokens else "stop"
    return Sample(text, finish_reason, num_tokens, tuple(range(num_tokens)))


def continue_prompt(prompt: str, sampling: str) -> str:
    """The pseudo-model's continuation: a function of its two arguments alone."""
    draw = random.Random(hashlib.sha256(f"{sampling}\0{prompt}".encode()).digest())
    if LIST_END.search(prompt):
        return "".join(f"{number}. {item}\n" for number, item in enumerate(map(_instruction, [draw] * 7), 9))[2:]
    if prompt.endswith("Is it classification?"):
        return draw.choice((" Yes", " No", " No"))
    if prompt.endswith("Class label:"):
        return "Class label:".join(f" {label}\nInput: {_words(draw, 3)}\n" for label in ("warm", "cold", "mild"))
    if prompt.endswith("\n"):
        if draw.random() < 0.3:
            return f"Output: {_words(draw, 4)}\n"
        return "".join(_example(draw, number) for number in (1, 2, 3))
    return " " + _words(draw, 5)


def _instruction(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.1:
        return "Do it."  # too short
    if kind < 0.2:
        return f"Draw a picture of {_words(draw, 3)}."  # asks for what a text model cannot do
    if kind < 0.3:
        return "Name the best way to walk a very long way home."  # the same every time
    return f"{draw.choice(VERBS)} {_words(draw, draw.randint(3, 9))}."


def _example(draw: random.Random, number: int) -> str:
    output = "" if draw.random() < 0.1 else _words(draw, 3)
    return f"Example {number}\nInput: {_words(draw, 3)}\nOutput: {output}\n"


def _words(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(THINGS, k=num_words))
