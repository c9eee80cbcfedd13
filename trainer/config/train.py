"""The section `train:` of a recipe. Imports pydantic alone and does no I/O."""

import importlib.util
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import StrictModel
from trainer.config.data import DataSource, ValidationConfig
from trainer.config.tuning import (
    METHODS,
    AdapterConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    Tuning,
    refusal,
)
from trainer.config.zero import Stage, ZeroConfig

Tracker = Literal["tensorboard", "wandb", "trackio"]


class CheckpointConfig(StrictModel):
    """When checkpoints are written, where they are written first, and which ones are kept."""

    every_steps: int = Field(200, ge=1, description="optimizer steps between two checkpoints")
    keep_last: int = Field(2, ge=1, description="number of newest complete checkpoints to keep")
    keep_best: int = Field(
        0, ge=0, description="number of checkpoints with the lowest `best` to keep, in addition to `keep_last`"
    )
    best: Literal["validation_loss", "train_loss"] = Field(
        "validation_loss",
        description="the loss by which `keep_best` compares checkpoints. train_loss is the mean over the steps since "
        "the previous checkpoint",
    )
    local_dir: str | None = Field(
        None,
        description="a folder on each node's own disk. Checkpoints are written there and copied to the run folder "
        "while training continues. None means that checkpoints are written to the run folder directly",
    )


class WatchConfig(StrictModel):
    """What is reported about training while it runs. Nothing here changes its result."""

    spike_window: int = Field(
        50, ge=2, description="number of most recent steps whose losses a new loss is compared with"
    )
    spike_std: float = Field(
        6.0,
        gt=0,
        description="a loss is reported as a spike if it is more than this many standard deviations above the mean of "
        "the last `spike_window` losses",
    )
    stall_timeout_seconds: float | None = Field(
        None,
        gt=0,
        description="a rank that makes no progress for this long prints the stacks of its threads. None means 300 "
        "seconds, or half of process_group_timeout_seconds if that is less",
    )


class ProfileConfig(StrictModel):
    """A trace of some steps of rank 0 by torch.profiler, for chrome://tracing or Perfetto."""

    start_step: int = Field(10, ge=1, description="first step of the trace, numbered as in the log")
    num_steps: int = Field(3, ge=1, description="number of steps in the trace")


class TrainConfig(StrictModel):
    """One training job. Where Alpaca's script for 7B has a value, it is the default (Taori et al. 2023, train.py)."""

    # These fields may change when a job resumes: they affect neither the examples of a step nor its arithmetic.
    MAY_CHANGE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        {
            "activation_checkpointing", "attention", "checkpoint", "compile", "data", "gpu_memory_gib", "liger",
            "micro_batch_size", "num_processes", "process_group_timeout_seconds", "profile", "report_to", "validation",
            "watch",
        }
    )  # fmt: skip

    data: tuple[DataSource, ...] = Field(
        (),
        description="the datasets to train on: a path, a section train.data, or a list of these. Empty means the "
        "dataset that the run synthesized",
    )
    objective: Literal["chat", "text"] = Field(
        "chat",
        description="chat takes the loss on the assistant's turns. text takes the loss on every token of the column "
        "`text`",
    )
    chat_template: str | None = Field(
        None,
        description="a Jinja file, or the name of one of the tokenizer's templates, or chatml. None means the "
        "tokenizer's own template, or ChatML if it has none",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="variables for the chat template, such as {enable_thinking: false}. Set the same ones in later use",
    )
    fold_system: bool = Field(
        False,
        description="put the text of a system turn before that of the user's next turn, for a chat template without "
        "system turns, as Gemma's",
    )
    validation: ValidationConfig | None = Field(
        None, description="data to validate on during training. None means no validation"
    )
    max_seq_len: int = Field(
        512, ge=8, description="tokens in a row of a batch. A longer example is cut and gets no end-of-turn label"
    )
    packing: bool = Field(
        True, description="put several examples into one row. Attention does not cross from one example to another"
    )

    global_batch_size: int = Field(
        128, ge=1, description="number of `batch_unit` in one optimizer step, over all ranks together"
    )
    batch_unit: Literal["examples", "rows"] = Field(
        "examples",
        description="what global_batch_size counts. examples are the conversations or texts of the data, as in "
        "published recipes, with packing or without. rows hold up to max_seq_len tokens; with packing, a row has "
        "several examples",
    )
    micro_batch_size: int = Field(4, ge=1, description="rows in one forward pass of one rank")
    num_epochs: int = Field(3, ge=1, description="passes over the data")
    max_steps: int | None = Field(
        None, ge=1, description="end training after this many optimizer steps. None means after num_epochs"
    )

    learning_rate: float = Field(2e-5, gt=0, description="the peak rate, reached after the warm-up")
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="how the rate falls after the warm-up. cosine is Alpaca's. linear is Tulu 3's (Lambert et al. "
        "2024, arXiv 2411.15124). constant is Tk-Instruct's (Wang et al. 2022, arXiv 2204.07705, its train script). "
        "wsd (warmup-stable-decay) stays at the peak and falls linearly in the last `decay_ratio` of the steps, as "
        "OLMo-core's (Hu et al. 2024, arXiv 2404.06395, section 4)",
    )
    decay_ratio: float = Field(
        0.1, gt=0, le=1, description="fraction of all steps in which `lr_schedule: wsd` falls (Hu et al. 2024: 0.1)"
    )
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="the schedule ends at this fraction of learning_rate. constant does not fall"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="fraction of all steps with a linear warm-up")
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="number of steps with a linear warm-up. None means that warmup_ratio decides",
    )
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's decay of weight matrices. Norms, biases and IA3's vectors have none"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates of both moments")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(
        1.0, ge=0, description="gradients are clipped to this norm. 0 means that gradients are not clipped"
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="factor of log(Z)^2 in the loss, where Z is the softmax's denominator. PaLM has 1e-4 (Chowdhery "
        "et al. 2022, section 5)",
    )
    neftune_noise_alpha: float = Field(
        0.0,
        ge=0,
        description="strength of the noise on the embeddings in training. The paper tries 5, 10 and 15 (Jain et al. "
        "2023, arXiv 2310.05914)",
    )

    tuning: Tuning = Field(
        "full",
        description="which weights are trained: all of them, or an adapter. Every other value has a section of its "
        "name, except that qlora, LoRA on a base in 4 bits, reads the section lora",
    )
    lora: LoraConfig = LoraConfig()
    ia3: Ia3Config = Ia3Config()
    prefix: PrefixConfig = PrefixConfig()
    prompt: PromptConfig = PromptConfig()
    adapter: AdapterConfig = AdapterConfig()

    num_processes: int = Field(
        1, ge=1, description="number of ranks if training runs on this machine. Under Slurm the job decides"
    )
    zero_stage: Stage = Field("auto", description="auto chooses the lowest ZeRO stage that fits into memory")
    zero: ZeroConfig = ZeroConfig()
    gpu_memory_gib: float | None = Field(
        None,
        gt=0,
        description="memory that one rank may use, in GiB, for `zero_stage: auto` and `plan`. None means the memory "
        "of the machine",
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="data type of weights and activations. AdamW's states are in float32 with both"
    )
    sequence_parallel_size: int = Field(
        1, ge=1, description="number of ranks that share every row, for rows too long for one rank"
    )
    attention: Literal[
        "auto",
        "varlen",
        "sdpa",
        "sdpa_by_document",
        "eager",
        "flex_attention",
        "flash_attention_2",
        "flash_attention_3",
    ] = Field(
        "auto",
        description="the attention implementation. For packed rows auto chooses varlen, PyTorch's own flash attention, "
        "on a GPU in bf16, else sdpa_by_document. For other rows it chooses flash attention if the package is "
        "installed, else sdpa",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="which activations of a layer the backward pass recomputes. selective recomputes all but the "
        "outputs of matrix products and attention. It does not work with ZeRO-3 or compile",
    )
    liger: Literal["auto", True, False] = Field(
        "auto",
        description="use Liger's kernels for RMSNorm, rotary embedding and SwiGLU. auto means if there is a GPU and "
        "liger-kernel is installed",
    )
    compile: bool = Field(
        False,
        description="compile every decoder layer with torch.compile. This does not work with ZeRO-3 or "
        "`activation_checkpointing: selective`",
    )
    loss_chunk_tokens: int = Field(
        1024,
        ge=1,
        description="number of tokens whose logits exist at the same time. A lower value needs less memory and does "
        "not change the result",
    )

    checkpoint: CheckpointConfig = CheckpointConfig()
    process_group_timeout_seconds: int = Field(
        3600, ge=30, description="training fails if a collective operation of the ranks takes longer"
    )
    watch: WatchConfig = WatchConfig()
    report_to: tuple[Tracker, ...] = Field((), description="trackers that get the metrics, besides metrics.jsonl")
    profile: ProfileConfig | None = Field(
        None, description="write a trace of some steps into the run folder. None means no trace"
    )

    @field_validator("data", mode="before")
    @classmethod
    def _paths_are_sources(cls, value: object) -> object:
        if isinstance(value, (str, dict, DataSource)):
            value = [value]
        if not isinstance(value, (list, tuple)):
            return value
        return tuple({"path": item} if isinstance(item, str) else item for item in value)

    @field_validator("data")
    @classmethod
    def _weights_of_all_or_none(cls, sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        weighted = [source.weight is not None for source in sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"{sources[weighted.index(False)].path} has no weight, while other sources of train.data have one. "
                "Set a weight for all or for none"
            )
        return sources

    @property
    def stall_timeout_seconds(self) -> float:
        """How long a rank may make no progress before it prints its stacks."""
        return self.watch.stall_timeout_seconds or min(300, self.process_group_timeout_seconds / 2)

    @property
    def stages(self) -> list[int]:
        """The ZeRO stages that work with the rest of the recipe, lowest first."""
        excluded = {0, 1, 2, 3} - set(METHODS[self.tuning].zero_stages)
        if self.compile or self.activation_checkpointing == "selective":
            excluded.add(3)
        if self.sequence_parallel_size > 1 and self.precision == "bf16":
            excluded.add(1)
        return [stage for stage in self.zero.stages(self.precision) if stage not in excluded]

    @field_validator("report_to")
    @classmethod
    def _trackers_are_installed(cls, names: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"{name} is not installed. Install it (pip install {name}), or remove it from the list"
                )
        return names

    @model_validator(mode="after")
    def _stalls_are_reported_before_the_timeout(self) -> "TrainConfig":
        if self.stall_timeout_seconds >= self.process_group_timeout_seconds:
            raise ValueError(
                f"watch.stall_timeout_seconds={self.stall_timeout_seconds:g} is not below process_group_timeout_seconds"
                f"={self.process_group_timeout_seconds}, which would end the ranks first. Set a lower one"
            )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "TrainConfig":
        if self.checkpoint.keep_best and self.checkpoint.best == "validation_loss" and self.validation is None:
            raise ValueError(
                "checkpoint.keep_best needs a validation loss, but train.validation is not set. Set it, or set "
                "train.checkpoint.best=train_loss"
            )
        return self

    @model_validator(mode="after")
    def _combinations_that_work(self) -> "TrainConfig":
        for source in self.data:
            if source.format is not None and (source.format == "text") != (self.objective == "text"):
                raise ValueError(
                    f"objective={self.objective} cannot use {source.path} of format {source.format}. Change one of them"
                )
        if (why := self.zero.refusal(self.zero_stage, self.precision)) is not None:
            raise ValueError(why)
        checkpointing = self.activation_checkpointing != "none"
        if (why := refusal(self.tuning, self.zero_stage, checkpointing, self.packing)) is not None:
            raise ValueError(why)
        if self.tuning == "qlora" and self.lora.dora:
            raise ValueError("lora.dora has not been tested with tuning=qlora. Set train.lora.dora=false")
        self._refuse_layers_that_do_not_combine()
        if self.sequence_parallel_size > 1:
            self._refuse_what_ulysses_lacks()
        if self.attention.startswith("flash") and self.packing and self.micro_batch_size != 1:
            raise ValueError(
                "flash attention on packed rows needs train.micro_batch_size=1, because it finds the borders of "
                "documents in the position_ids of a single row. Set that, and for more work in a pass a longer "
                "train.max_seq_len"
            )
        if self.attention in ("sdpa_by_document", "varlen") and not self.packing:
            raise ValueError(f"attention={self.attention} is for packed rows only. Set train.attention=sdpa")
        if self.attention == "varlen" and self.precision != "bf16":
            raise ValueError("attention=varlen needs 16 bits. Set train.precision=bf16 or train.attention=auto")
        return self

    def _refuse_layers_that_do_not_combine(self) -> None:
        is_stage_3 = self.zero_stage == 3 or self.zero.needs_stage_3
        if self.compile and is_stage_3:
            raise ValueError("compile does not work with ZeRO-3, whose hooks gather weights. Set train.compile=false")
        if self.activation_checkpointing == "selective" and is_stage_3:
            raise ValueError(
                "activation_checkpointing=selective does not work with ZeRO-3, because the weights that are gathered "
                "for recomputing are not the recorded ones. Set train.activation_checkpointing=full"
            )
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "compile does not work with activation_checkpointing=selective, which cannot see the operations inside "
                "a compiled layer. Set train.activation_checkpointing to full or none"
            )

    def _refuse_what_ulysses_lacks(self) -> None:
        if self.packing and self.attention in ("sdpa", "sdpa_by_document", "varlen", "flex_attention"):
            raise ValueError(
                "packed rows with sequence_parallel_size need train.attention=flash_attention_2 or flash_attention_3, "
                "because others would let documents see each other. Set one of them, or train.packing=false"
            )
        if self.attention in ("eager", "flex_attention"):
            raise ValueError("sequence_parallel_size works with sdpa and flash attention. Set train.attention=sdpa")
        if self.tuning in ("prefix", "prompt"):
            raise ValueError(
                f"sequence_parallel_size does not work with tuning={self.tuning}, whose virtual tokens belong to no "
                "row. Set train.sequence_parallel_size=1"
            )
        if self.validation is not None or self.neftune_noise_alpha:
            raise ValueError(
                "sequence_parallel_size does not work with validation or neftune_noise_alpha. "
                "Remove them, or set train.sequence_parallel_size=1"
            )
        if self.zero_stage == 1 and self.precision == "bf16":
            raise ValueError(
                "sequence_parallel_size does not work with zero_stage=1 and bf16: DeepSpeed's optimizer for these two "
                "has no gradients on the other ranks of a group. Set train.zero_stage=2"
            )
