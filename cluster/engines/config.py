"""What a user says about the engines, and the request and completion that pass through the pool."""

from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator

from cluster.config import StrictModel


class EngineConfig(StrictModel):
    """The vLLM engines of a pool. Results depend on none of these but the model, `dtype` and `max_model_len`."""

    num_replicas: int = Field(1, ge=1, description="engines, each with a whole copy of the model")
    min_replicas: int | None = Field(
        None, ge=1, description="engines there must be room for at the start, others join when there is; none: all"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share each layer of one engine")
    pipeline_parallel_size: int = Field(1, ge=1, description="groups of layers of one engine, each on its own GPUs")
    cpus_per_engine: float = Field(1, gt=0, description="CPUs that Ray reserves for an engine")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory for weights and cache")
    kv_cache_gib: int = Field(1, ge=1, description="cache for keys and values on a machine without GPUs")
    dtype: str = Field(
        "auto", description="number format of the weights; auto: as stored, and float32 on a machine without GPUs"
    )
    max_model_len: int | None = Field(None, ge=1, description="tokens of prompt and completion; none: the model's own")
    max_num_seqs: int = Field(256, ge=1, description="sequences an engine decodes at once")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="tokens an engine computes in one step")
    enforce_eager: bool = Field(False, description="no compilation: starts sooner, runs slower on GPUs")
    enable_prefix_caching: bool = Field(True, description="keep keys and values of prompt beginnings seen before")
    max_lora_rank: int | None = Field(
        None, ge=1, le=512, description="largest rank of the LoRA adapters served; none: what they need"
    )
    seed: int = Field(0, ge=0, description="seed of the engine; every request also carries its own")
    chunk_size: int = Field(8, ge=1, description="requests that go to an engine in one message at most")
    start_timeout_seconds: float = Field(
        600,
        gt=0,
        description="an engine with its resources that is not up by then has failed; also how long to wait for "
        "resources while no engine is up",
    )
    stall_timeout_seconds: float = Field(
        600, gt=0, description="an engine with requests that makes no token for so long is hung"
    )
    slow_window_seconds: float = Field(60, gt=0, description="over such windows the speeds of engines are compared")
    slow_fraction: float = Field(
        0.3, ge=0, lt=1, description="an engine below this part of its peers' median speed is slow: it gets less to do"
    )
    max_restarts: int = Field(3, ge=0, description="restarts of an engine in a row with no finished request between")
    max_request_deaths: int = Field(3, ge=2, description="engine deaths after which a request is set aside")
    backend: str = Field(
        "cluster.engines.engine:VLLMEngine", pattern=r"^[\w.]+:\w+$", description="the engine, module:Class"
    )

    @model_validator(mode="after")
    def _min_replicas_among_all(self) -> Self:
        if self.min_replicas is not None and self.min_replicas > self.num_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than num_replicas={self.num_replicas}")
        return self

    @property
    def max_in_flight(self) -> int:
        """Requests sent to one engine and not yet back: twice what it decodes at once, so that it never runs dry."""
        return 2 * self.max_num_seqs

    @property
    def gpus_per_engine(self) -> int:
        """GPUs of one engine on a cluster that has any."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True)
class EngineReport:
    """How far an engine is. All but running and waiting are counts since it came up."""

    num_tokens: int = 0  # generated, those of unfinished requests included
    num_running: int = 0  # sequences in the batch now
    num_waiting: int = 0  # sequences that it has accepted and not begun
    num_preemptions: int = 0  # sequences put back because the cache was full
    num_prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # of these, found


class StructuredOutput(StrictModel):
    """A form that the engine makes every answer keep to. Exactly one of the three is set.

    An answer cut at max_tokens may end in the middle of the form; its finish_reason says so.
    """

    choice: tuple[str, ...] | None = Field(None, min_length=1, description="the answer is one of these")
    regex: str | None = Field(None, min_length=1, description="the answer matches this as a whole")
    json_schema: dict[str, Any] | None = Field(None, description="the answer is JSON of this schema")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of choice, regex, json_schema; set are: {', '.join(given) or 'none'}")
        return self


class Sampling(StrictModel):
    """How a prompt is continued. Temperature 0 is greedy."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(512, ge=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    n: int = Field(1, ge=1, description="samples of one prompt")
    structured: StructuredOutput | None = None


# Text, to which the tokenizer adds its special tokens | token ids | messages of a chat: {"role": ..., "content": ...}
Prompt = str | list[int] | list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it.

    A chat is rendered by the model's own template, up to where the assistant speaks. adapter: the folder of a LoRA
    adapter that the pool was started with. group: requests of one group begin with the same text, and an engine that
    gets them together computes it once.
    """

    request_id: str
    prompt: Prompt
    sampling: Sampling
    adapter: str | None = None
    group: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation.

    finish_reason: "stop" (end of text or a stop string), "length" (cut at max_tokens), or, with an empty text,
    "prompt_too_long" (the model cannot hold it) and "engine_died" (it took several engines down with it).
    """

    text: str
    finish_reason: str
    num_tokens: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of a request. Every request gets one, with `sampling.n` samples in order."""

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
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first sample."""
        return self.samples[0].token_ids

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(sample.num_tokens for sample in self.samples)

    @classmethod
    def failed(cls, request: GenerationRequest, finish_reason: str) -> Self:
        """The completion of a request that no engine could answer."""
        return cls(request.request_id, (Sample("", finish_reason, 0),) * request.sampling.n, 0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The completion that `dataclasses.asdict` made these values of, also when they went through JSON."""
        samples = tuple(Sample(**{**sample, "token_ids": tuple(sample["token_ids"])}) for sample in values["samples"])
        return cls(values["request_id"], samples, values["num_prompt_tokens"])
