"""The sections `train.lora:`, `train.ia3:` and so on, and what each tuning method can be combined with."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from cluster.config import StrictModel

Tuning = Literal["full", "lora", "ia3", "prefix", "prompt", "adapter", "qlora"]


class LoraConfig(StrictModel):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685); for `tuning: lora` and `tuning: qlora`."""

    rank: int = Field(16, ge=1, description="rank of the update matrices")
    alpha: float = Field(32.0, gt=0, description="updates are scaled by alpha / rank (section 4.1)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input, as a probability")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="names of the modules that get an adapter, or a regular expression. all-linear means every linear "
        "layer except the output layer",
    )
    rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)"
    )
    dora: bool = Field(
        False,
        description="DoRA: train magnitudes and directions of weights separately (Liu et al. 2024, arXiv 2402.09353)",
    )


class Ia3Config(StrictModel):
    """IA3: vectors that scale keys, values and feed-forward (Liu et al. 2022, arXiv 2205.05638, section 3.3)."""

    attention_modules: tuple[str, ...] = Field(("k_proj", "v_proj"), description="modules whose outputs are scaled")
    feedforward_modules: tuple[str, ...] = Field(("down_proj",), description="modules whose inputs are scaled")


class PrefixConfig(StrictModel):
    """Prefix tuning (Li and Liang 2021, arXiv 2101.00190)."""

    num_virtual_tokens: int = Field(
        16, ge=1, description="length of the prefix. The paper has 10 to 200, by task (section 7.2)"
    )


class PromptConfig(StrictModel):
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691)."""

    num_virtual_tokens: int = Field(
        100, ge=1, description="length of the prompt. 100 is the paper's default (section 3)"
    )
    init_text: str | None = Field(
        None, min_length=1,
        description="start from the embeddings of this text, cut or repeated to num_virtual_tokens. None means the "
        "embeddings of random tokens",
    )  # fmt: skip


class AdapterConfig(StrictModel):
    """Bottleneck adapters after attention and after the feed-forward (Houlsby et al. 2019, arXiv 1902.00751)."""

    bottleneck_size: int = Field(
        64, ge=1, description="hidden size of an adapter. The paper tries 8, 64 and 256 (section 3.2)"
    )
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field("gelu", description="activation inside an adapter")


@dataclass(frozen=True)
class TuningMethod:
    """What a tuning method can be combined with. A `no_...` is the reason why not; None means that it works."""

    title: str
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    no_other_stages: str | None = None
    no_packing: str | None = None
    no_checkpointing: str | None = None
    no_merging: str | None = None
    new_token_stages: tuple[int, ...] = ()  # ZeRO stages in which it can train tokens that the chat template adds


_OUTSIDE = "virtual tokens are not part of the base's weights"

METHODS: dict[str, TuningMethod] = {
    "full": TuningMethod("every weight", new_token_stages=(0, 1, 2, 3)),
    "lora": TuningMethod("LoRA, rsLoRA, DoRA", new_token_stages=(0, 1, 2)),
    "ia3": TuningMethod("IA3"),
    "prefix": TuningMethod(
        "prefix tuning",
        no_packing="the prefix is in the attention cache, and with a cache packed documents see each other",
        no_checkpointing="it turns off the attention cache, which holds the prefix",
        no_merging=_OUTSIDE,
    ),
    "prompt": TuningMethod(
        "prompt tuning", no_merging=_OUTSIDE,
        no_packing="its virtual tokens are at the start of a row, where only the first document sees them",
    ),
    "adapter": TuningMethod("bottleneck adapters", no_merging="it adds non-linear layers to the base"),
    "qlora": TuningMethod(
        "LoRA on a base in 4 bits", zero_stages=(0, 1, 2),
        no_other_stages="ZeRO-3 has not been tested with weights in 4 bits",
        new_token_stages=(0, 1, 2),
    ),
}  # fmt: skip


def refusal(tuning: str, zero_stage: int | str, checkpointing: bool, packing: bool) -> str | None:
    """The error message if this combination cannot be trained. None means that it can."""
    method = METHODS[tuning]
    if zero_stage != "auto" and zero_stage not in method.zero_stages:
        return (
            f"zero_stage={zero_stage} does not work with tuning={tuning}: {method.no_other_stages}. "
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
    """The error message if a model of this tuning cannot be exported in this form. None means that it can."""
    if form == "adapter" and tuning == "full":
        return "export.form=adapter does not work with train.tuning=full, which has no adapter. Set export.form=merged"
    if form == "merged" and (reason := METHODS[tuning].no_merging):
        return (
            f"export.form=merged does not work with train.tuning={tuning}, which cannot be merged into the base: "
            f"{reason}. Set export.form=adapter"
        )
    return None
