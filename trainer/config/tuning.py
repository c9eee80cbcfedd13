"""Which weights are tuned, and how; and what each way of tuning can be combined with."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from cluster.config import StrictModel

Tuning = Literal["full", "lora", "ia3", "prefix", "prompt", "adapter", "qlora"]


class LoraConfig(StrictModel):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685); the settings of `tuning: lora` and of `tuning: qlora`."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="updates are scaled by alpha / rank (section 4.1)")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732)"
    )
    dora: bool = Field(
        False,
        description="train lengths of the weights apart from their directions (Liu et al. 2024, arXiv 2402.09353)",
    )


class Ia3Config(StrictModel):
    """IA3: factors on keys, values and inside the feed-forward (Liu et al. 2022, arXiv 2205.05638, section 3.3)."""

    attention_modules: tuple[str, ...] = Field(("k_proj", "v_proj"), description="layers whose outputs are scaled")
    feedforward_modules: tuple[str, ...] = Field(("down_proj",), description="layers whose inputs are scaled")


class PrefixConfig(StrictModel):
    """Prefix tuning (Li and Liang 2021, arXiv 2101.00190)."""

    num_virtual_tokens: int = Field(16, ge=1)


class PromptConfig(StrictModel):
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691)."""

    num_virtual_tokens: int = Field(100, ge=1, description="the paper's default (section 3)")
    init_text: str | None = Field(
        None, min_length=1,
        description="start from the embeddings of this text, cut or repeated to the length; none: of random tokens",
    )  # fmt: skip


class AdapterConfig(StrictModel):
    """Bottleneck adapters after attention and after the feed-forward (Houlsby et al. 2019, arXiv 1902.00751)."""

    bottleneck_size: int = Field(64, ge=1, description="the paper tries 8, 64 and 256 (section 3.2)")
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"


@dataclass(frozen=True)
class Method:
    """What a way of tuning works with. A `no_...` says why it does not; None is where it does."""

    title: str
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    other_stages: str = ""  # why it does not work in the stages left out
    no_packing: str | None = None
    no_checkpointing: str | None = None
    no_merging: str | None = None
    token_stages: tuple[int, ...] = ()  # ZeRO stages in which it trains tokens that the chat template adds


_NO_ROOM = "its virtual tokens come once at the start of a row, so that only the first document would see them"
_NOT_LINEAR = "it adds steps to the computation that no weight of the base can hold"
_OUTSIDE = "its virtual tokens are no weights of the base"

METHODS: dict[str, Method] = {
    "full": Method("every weight", token_stages=(0, 1, 2, 3)),
    "lora": Method("LoRA, rsLoRA, DoRA", token_stages=(0, 1, 2)),
    "ia3": Method("IA3"),
    "prefix": Method(
        "prefix tuning",
        no_packing="the prefix lives in the attention cache, which rules out the isolation of packed documents",
        no_checkpointing="checkpointing turns off the attention cache that holds the prefix",
        no_merging=_OUTSIDE,
    ),
    "prompt": Method("prompt tuning", no_packing=_NO_ROOM, no_merging=_OUTSIDE),
    "adapter": Method("bottleneck adapters", no_merging=_NOT_LINEAR),
    "qlora": Method(
        "LoRA on a base in 4 bits", zero_stages=(0, 1, 2),
        other_stages="ZeRO-3 is not known to partition weights packed in 4 bits and bring them back as they were",
        token_stages=(0, 1, 2),
    ),
}  # fmt: skip


def refusal(tuning: str, zero_stage: int | str, checkpointing: bool, packing: bool) -> str | None:
    """Why this combination cannot be trained, and what to set instead; None if it can."""
    method = METHODS[tuning]
    if zero_stage != "auto" and zero_stage not in method.zero_stages:
        return (
            f"zero_stage={zero_stage} does not work with tuning={tuning}: {method.other_stages}. "
            f"Set train.zero_stage={max(method.zero_stages)}"
        )
    if packing and method.no_packing:
        return f"packing does not work with tuning={tuning}: {method.no_packing}. Set train.packing=false"
    if checkpointing and method.no_checkpointing:
        return (
            f"activation_checkpointing does not work with tuning={tuning}: {method.no_checkpointing}. "
            "Set train.activation_checkpointing=none"
        )
    return None


def form_refusal(tuning: str, form: str) -> str | None:
    """Why a model tuned so cannot be exported in this form, and what to set instead; None if it can."""
    if form == "adapter" and tuning == "full":
        return "export.form=adapter, but train.tuning=full has no adapter. Set export.form=merged"
    if form == "merged" and (reason := METHODS[tuning].no_merging):
        return (
            f"export.form=merged, but what train.tuning={tuning} learns cannot be merged into the weights: {reason}. "
            "Set export.form=adapter"
        )
    return None
