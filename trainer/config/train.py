"""What a recipe's `train:`, `export:` and `evaluate:` sections may say. Imports pydantic alone and does no I/O."""

import importlib.util
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import StrictModel
from trainer.config.after import EvaluateConfig, ExportConfig
from trainer.config.checkpoints import CheckpointConfig
from trainer.config.data import DataSource, ValidationConfig, as_sources, refuse_mixed_weights, refuse_other_formats
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
from trainer.config.watch import ProfileConfig, Tracker, WatchConfig
from trainer.config.zero import Stage, ZeroConfig

__all__ = [
    "CheckpointConfig", "DataSource", "EvaluateConfig", "ExportConfig", "ProfileConfig", "TrainConfig",
    "ValidationConfig", "WatchConfig", "ZeroConfig",
]  # fmt: skip


class TrainConfig(StrictModel):
    """One tuning job. Defaults are Alpaca's for 7B (Taori et al. 2023, train.py) where it has a value."""

    # What may change between two starts of one job: the rows of a step and what is computed of them stay the same.
    NOT_DECIDING: ClassVar[frozenset[str]] = frozenset(
        {
            "activation_checkpointing", "attention", "checkpoint", "compile", "data", "gpu_memory_gib", "liger",
            "micro_batch_size", "num_processes", "process_group_timeout_seconds", "profile", "report_to", "validation",
            "watch",
        }
    )  # fmt: skip

    data: tuple[DataSource, ...] = Field(
        (), description="datasets, each a path or {path, ...}; empty means the run's own synthesized dataset"
    )
    validation: ValidationConfig | None = None
    loss_chunk_tokens: int = Field(1024, ge=1, description="logits exist for at most so many positions at a time")
    z_loss: float = Field(
        0.0, ge=0, description="times log(Z)^2 in the gradient; PaLM has 1e-4 (Chowdhery et al. 2022, section 5)"
    )
    neftune_noise_alpha: float = Field(
        0.0, ge=0, description="noise on the embeddings of training; 5 to 15 (Jain et al. 2023, arXiv 2310.05914)"
    )
    objective: Literal["chat", "text"] = Field(
        "chat", description="chat: loss on the assistant's turns; text: loss on every token of `text`"
    )
    tuning: Tuning = "full"
    lora: LoraConfig = LoraConfig()
    ia3: Ia3Config = Ia3Config()
    prefix: PrefixConfig = PrefixConfig()
    prompt: PromptConfig = PromptConfig()
    adapter: AdapterConfig = AdapterConfig()
    chat_template: str | None = Field(None, description="a Jinja file; default: the tokenizer's own, else ChatML")

    zero_stage: Stage = Field("auto", description="auto: the lowest stage that fits into the memory")
    zero: ZeroConfig = ZeroConfig()
    gpu_memory_gib: float | None = Field(None, gt=0, description="of one rank; default: what the machine has")
    precision: Literal["bf16", "fp32"] = "bf16"
    attention: Literal[
        "auto", "sdpa", "sdpa_by_document", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = Field(
        "auto",
        description="auto: flash attention where it is installed, flex for packed rows on a GPU, sdpa_by_document for "
        "them on a CPU, else sdpa",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="what is made again in the backward pass; selective: all but matrix products and attention"
    )
    liger: Literal["auto", True, False] = Field("auto", description="Liger's RMSNorm, rotary embedding and SwiGLU")
    compile: bool = Field(False, description="torch.compile of every decoder layer; not with ZeRO-3")
    num_processes: int = Field(1, ge=1, description="ranks on this machine when started here; one per GPU on a cluster")

    max_seq_len: int = Field(512, ge=8, description="tokens in a row; longer documents are cut, without an end label")
    packing: bool = True
    sequence_parallel_size: int = Field(1, ge=1, description="ranks that share every row, for rows too long for one")
    micro_batch_size: int = Field(4, ge=1, description="rows in one forward pass of one rank")
    global_batch_size: int = Field(128, ge=1, description="`batch_unit` in one optimizer step, over all ranks together")
    batch_unit: Literal["examples", "rows"] = Field(
        "examples",
        description="What `global_batch_size` counts. examples: conversations or texts of the data, however they are "
        "packed; a published batch size means these. rows: rows of up to `max_seq_len` tokens; with packing, a row "
        "holds several examples",
    )

    num_epochs: int = Field(3, ge=1)
    max_steps: int | None = Field(None, ge=1, description="stop here, however many epochs that is")
    learning_rate: float = Field(2e-5, gt=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="the cosine ends at this share of the peak")
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")

    checkpoint: CheckpointConfig = CheckpointConfig()
    process_group_timeout_seconds: int = Field(3600, ge=30)
    watch: WatchConfig = WatchConfig()
    report_to: tuple[Tracker, ...] = Field((), description="where metrics go besides metrics.jsonl")
    profile: ProfileConfig | None = Field(None, description="write a trace of some steps into the run folder")

    @field_validator("data", mode="before")
    @classmethod
    def _paths_are_sources(cls, value: object) -> object:
        return as_sources(value)

    @field_validator("data")
    @classmethod
    def _weights_of_all_or_none(cls, value: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        refuse_mixed_weights(value)
        return value

    @property
    def stall_timeout_seconds(self) -> float:
        """How long a rank may be at one place before it tells where it is."""
        return self.watch.stall_timeout_seconds or min(300, self.process_group_timeout_seconds / 2)

    @field_validator("report_to")
    @classmethod
    def _trackers_are_installed(cls, names: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"{name} is not installed. Install it (pip install {name}), or leave it out")
        return names

    @model_validator(mode="after")
    def _stalls_are_told_in_time(self) -> "TrainConfig":
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
                "checkpoint.keep_best needs a validation loss, and train.validation is not set. "
                "Set train.checkpoint.best=train_loss, or keep_best=0"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _gradient_checkpointing_is_all_or_nothing(cls, values: object) -> object:
        """The older key `gradient_checkpointing: true | false` means full | none."""
        if not isinstance(values, dict) or "gradient_checkpointing" not in values:
            return values
        if "activation_checkpointing" in values:
            raise ValueError("gradient_checkpointing is the older name of activation_checkpointing: give one of them")
        rest = dict(values)
        old = rest.pop("gradient_checkpointing")
        if not isinstance(old, bool):
            raise ValueError("gradient_checkpointing is true or false. Better, set activation_checkpointing")
        return rest | {"activation_checkpointing": "full" if old else "none"}

    @model_validator(mode="after")
    def _combinations_that_work(self) -> "TrainConfig":
        refuse_other_formats(self.data, self.objective)
        if complaint := self.zero.complaint(self.zero_stage, self.precision):
            raise ValueError(complaint)
        checkpointing = self.activation_checkpointing != "none"
        if (why := refusal(self.tuning, self.zero_stage, checkpointing, self.packing)) is not None:
            raise ValueError(why)
        if self.tuning == "qlora" and self.lora.dora:
            raise ValueError("lora.dora is not known to work on a base in 4 bits. Set train.lora.dora=false")
        if self.compile and (self.zero_stage == 3 or self.zero.needs_stage_3):
            raise ValueError("compile does not work with ZeRO-3, whose hooks gather weights. Set train.compile=false")
        if self.activation_checkpointing == "selective" and (self.zero_stage == 3 or self.zero.needs_stage_3):
            raise ValueError(
                "activation_checkpointing=selective does not work with ZeRO-3: gathering weights a second time is not "
                "what was recorded. Set train.activation_checkpointing=full"
            )
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "compile does not work with activation_checkpointing=selective: inside a compiled layer the operations "
                "to keep are not seen. Set train.activation_checkpointing to full or none"
            )
        if self.sequence_parallel_size > 1:
            self._refuse_what_ulysses_lacks()
        if self.attention.startswith("flash") and self.packing and self.micro_batch_size != 1:
            raise ValueError(
                "packed rows with flash attention need train.micro_batch_size=1: document boundaries are read from "
                "position_ids of a single row. Use a longer train.max_seq_len instead"
            )
        if self.attention == "sdpa_by_document" and not self.packing:
            raise ValueError("attention=sdpa_by_document is for packed rows. Set train.attention=sdpa")
        return self

    @property
    def stages(self) -> list[int]:
        """The ZeRO stages that work with the rest of the recipe, lowest first."""
        lacking = {0, 1, 2, 3} - set(METHODS[self.tuning].zero_stages)
        if self.compile or self.activation_checkpointing == "selective":
            lacking.add(3)
        if self.sequence_parallel_size > 1 and self.precision == "bf16":
            lacking.add(1)
        return [stage for stage in self.zero.stages(self.precision) if stage not in lacking]

    def _refuse_what_ulysses_lacks(self) -> None:
        if self.packing and self.attention in ("sdpa", "sdpa_by_document", "flex_attention"):
            raise ValueError(
                "packed rows with sequence_parallel_size need train.attention=flash_attention_2 or 3: with the others "
                "documents would see each other. Set that, or train.packing=false"
            )
        if self.attention in ("eager", "flex_attention"):
            raise ValueError("sequence_parallel_size works with sdpa and flash attention. Set train.attention=sdpa")
        if self.tuning in ("prefix", "prompt"):
            raise ValueError(
                f"sequence_parallel_size does not work with tuning={self.tuning}, whose virtual tokens are in no row. "
                "Set train.sequence_parallel_size=1"
            )
        if self.validation is not None or self.neftune_noise_alpha:
            raise ValueError(
                "sequence_parallel_size does not work with validation or neftune_noise_alpha yet. "
                "Leave them out, or set train.sequence_parallel_size=1"
            )
        if self.zero_stage == 1 and self.precision == "bf16":
            raise ValueError(
                "sequence_parallel_size does not work with zero_stage=1 and bf16: DeepSpeed's optimizer for these two "
                "has no gradients on the other ranks of a group. Set train.zero_stage=2"
            )
