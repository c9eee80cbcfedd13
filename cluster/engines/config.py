"""The configuration of the engines, and the requests and completions of the pool."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from cluster.config import StrictModel


class EngineConfig(StrictModel):
    """The vLLM engines of a pool. Of these keys, results depend on `dtype` and `max_model_len` alone."""

    num_replicas: int = Field(1, ge=1, description="number of engines, each with a copy of the model")
    min_replicas: int | None = Field(
        None,
        ge=1,
        description="engines that must have their resources at the start; the others start later. None means all",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share each layer of one engine")
    pipeline_parallel_size: int = Field(1, ge=1, description="groups of layers of one engine, each on GPUs of its own")
    cpus_per_engine: float | None = Field(
        None,
        gt=0,
        description="CPUs that Ray reserves for an engine, and on a machine without GPUs the threads that it computes "
        "with. None means 1 with GPUs; without GPUs the engines share all CPUs, and one of a model whose weights have "
        "less than 64 MiB gets 1",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="fraction of a GPU's memory for weights and the KV cache"
    )
    kv_cache_gib: int = Field(1, ge=1, description="KV cache of an engine on a machine without GPUs")
    dtype: str = Field(
        "auto",
        description="data type of the weights. auto means as stored, but float32 on a CPU that does not compute in "
        "bfloat16",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="tokens of prompt and completion together. None means what the model supports"
    )
    max_num_seqs: int = Field(256, ge=1, description="sequences that an engine decodes at once")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="tokens that an engine computes in one step. None means vLLM's default"
    )
    enforce_eager: bool | None = Field(
        None,
        description="no compilation: the engine starts a minute sooner, but is slower on GPUs. None means true on a "
        "machine without GPUs, false on others",
    )
    enable_prefix_caching: bool = Field(
        True, description="reuse keys and values of prompt prefixes that were computed before"
    )
    max_lora_rank: int | None = Field(
        None,
        ge=1,
        le=512,
        description="largest rank of the LoRA adapters. None means the largest among the adapters served",
    )
    seed: int = Field(0, ge=0, description="seed of the engine. Requests have seeds of their own")
    chunk_size: int = Field(8, ge=1, description="largest number of requests in one message to an engine")
    start_timeout_seconds: float = Field(
        600,
        gt=0,
        description="time limit of an engine that loads its model, and of the wait for resources while no engine is up",
    )
    stall_timeout_seconds: float = Field(
        600,
        gt=0,
        description="an engine that has requests but generates no token for this long is hung, and is replaced",
    )
    slow_window_seconds: float = Field(
        60, gt=0, description="length of the windows over which the speeds of engines are compared"
    )
    slow_fraction: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="an engine below this fraction of the others' median speed is slow, and gets fewer requests",
    )
    max_restarts: int = Field(3, ge=0, description="restarts of an engine in a row without a finished request")
    max_request_deaths: int = Field(
        3,
        ge=2,
        description="a request that was in flight at this many engine deaths is quarantined: it is not sent again",
    )
    backend: str = Field(
        "cluster.engines.engine:VLLMEngine", pattern=r"^[\w.]+:\w+$", description="class of the engine, module:Class"
    )

    @model_validator(mode="after")
    def _min_replicas_among_all(self) -> Self:
        if self.min_replicas is not None and self.min_replicas > self.num_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than num_replicas={self.num_replicas}")
        return self

    @property
    def min_cpus(self) -> float:
        """CPUs of one engine at the least: `cpus_per_engine`, or 1 before it is known how many there are to share."""
        return self.cpus_per_engine or 1

    @property
    def max_in_flight(self) -> int:
        """Unfinished requests on one engine: twice what it decodes at once, so that it never runs out of work."""
        return 2 * self.max_num_seqs

    @property
    def gpus_per_engine(self) -> int:
        """GPUs of one engine, if the cluster has GPUs."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(slots=True)
class EngineReport:
    """What an engine has done since it came up, and the sequences that it has now."""

    num_tokens: int = 0  # generated, also for unfinished requests
    num_running: int = 0  # sequences in the batch now
    num_waiting: int = 0  # sequences that are accepted but not begun
    num_preemptions: int = 0  # sequences put back because the cache was full
    num_prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # of these, those found


class StructuredOutput(StrictModel):
    """A form that the engine enforces on every answer. Exactly one of the three is set.

    An answer that is cut at max_tokens may be incomplete; then its finish_reason is "length".
    """

    choice: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None, min_length=1, description="the answer is one of these"
    )
    regex: str | None = Field(None, min_length=1, description="the answer matches this as a whole")
    json_schema: dict[str, Any] | None = Field(None, description="the answer is JSON of this schema")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        names = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(f"set exactly one of choice, regex, json_schema; set are: {', '.join(names) or 'none'}")
        return self

    @model_validator(mode="after")
    def _can_be_enforced(self) -> Self:
        if self.choice is not None:
            return self
        from llguidance import LLMatcher  # the engines' backend; recipes rarely name a form

        if self.regex is not None:
            grammar = LLMatcher.grammar_from_regex(self.regex)
        else:
            grammar = LLMatcher.grammar_from_json_schema(self.json_schema)
        if error := LLMatcher.validate_grammar(grammar):
            raise ValueError(f"the engines cannot enforce this form: {' '.join(error.split())}")
        return self


Temperature = Annotated[float, Field(ge=0, le=2, description="0 always takes the most probable token")]


class Sampling(StrictModel):
    """How a prompt is continued. Temperature 0 is greedy. The limits are those of vLLM's SamplingParams."""

    temperature: Temperature = 1.0
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most probable tokens with this total probability"
    )
    max_tokens: int = Field(512, ge=1, description="tokens of the answer at most")
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="lowers the probability of tokens that the answer has already"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="lowers the probability of tokens by how often the answer has them"
    )
    stop: tuple[str, ...] = Field((), description="texts that end the answer")
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="token ids that end the answer")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed of the request. None means that the caller sets it"
    )
    n: int = Field(1, ge=1, le=16_384, description="samples of one prompt")
    structured: StructuredOutput | None = None

    @field_validator("stop")
    @classmethod
    def _stop_texts_are_not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty text would end every answer at once. Remove it")
        return stop

    @model_validator(mode="after")
    def _samples_can_differ(self) -> Self:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature=0 is greedy, so all n={self.n} samples would be the same text. Set a temperature, or n=1"
            )
        return self


class SingleSampling(Sampling):
    """Sampling of a request of which one text is used."""

    @field_validator("n")
    @classmethod
    def _one_text_is_used(cls, n: int) -> int:
        if n > 1:
            raise ValueError(f"one text of each of these requests is used, so {n - 1} of n={n} would be lost. Set n=1")
        return n


# text, to which the tokenizer adds its special tokens | token ids | messages of a chat: {"role": ..., "content": ...}
Prompt = str | list[int] | list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it.

    A chat is rendered by the model's chat template, up to the assistant's turn; the template gets
    `chat_template_kwargs` too. `adapter` is the folder of a LoRA adapter that the pool was started with. Requests of
    one `group` begin with the same text, which an engine that gets them together computes once.
    """

    request_id: str
    prompt: Prompt
    sampling: Sampling
    adapter: str | None = None
    group: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


UNANSWERED = ("prompt_too_long", "engine_died", "refused")  # finish reasons of a completion without a text


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation.

    `finish_reason` is "stop" (end of text or a stop string) or "length" (cut at max_tokens). Without a text it is
    "prompt_too_long" (longer than the model supports), "engine_died" (several engines died with the request) or
    "refused" (`error` is the engine's). `reasoning_content` is what a reasoning model thought before the text.
    `stop_reason` is the stop string, or the id of the stop token, that ended the text. None means that the model did.
    """

    text: str
    finish_reason: str
    num_tokens: int
    token_ids: tuple[int, ...] = ()
    stop_reason: str | int | None = None
    reasoning_content: str = ""
    error: str = ""

    @property
    def was_cut(self) -> bool:
        """Whether the text ends before its end: at max_tokens, or in a line that has a stop string in it.

        A stop string that begins with a letter or a digit ("20.", "Task:") names the beginning of a line. Inside a line
        ("in March 2020.") it was written as part of the text.
        """
        begins_word = isinstance(self.stop_reason, str) and self.stop_reason.lstrip(" ")[:1].isalnum()
        last_line = self.text.rpartition("\n")[2]
        return self.finish_reason == "length" or (begins_word and bool(last_line.strip()))


@dataclass(frozen=True, slots=True)
class Completion:
    """The outcome of a request: `sampling.n` samples in order. Every request gets one."""

    request_id: str
    samples: tuple[Sample, ...]
    num_prompt_tokens: int

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.samples[0].text

    @property
    def finish_reason(self) -> str:
        """Finish reason of the first sample."""
        return self.samples[0].finish_reason

    @property
    def was_cut(self) -> bool:
        """Whether the first sample ends before its end."""
        return self.samples[0].was_cut

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first sample."""
        return self.samples[0].token_ids

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(sample.num_tokens for sample in self.samples)

    @classmethod
    def failed(cls, request: GenerationRequest, finish_reason: str, error: str = "") -> Self:
        """The completion of a request that no engine could answer."""
        return cls(request.request_id, (Sample("", finish_reason, 0, error=error),) * request.sampling.n, 0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, also of values that went through JSON."""
        samples = tuple(Sample(**{**sample, "token_ids": tuple(sample["token_ids"])}) for sample in values["samples"])
        return cls(values["request_id"], samples, values["num_prompt_tokens"])
