"""Which weights are tuned, and how."""

from pydantic import Field

from cluster.config import StrictModel


class LoraConfig(StrictModel):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="updates are scaled by alpha / rank (section 4.1)")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"


class PrefixConfig(StrictModel):
    """Prefix tuning (Li and Liang 2021, arXiv 2101.00190)."""

    num_virtual_tokens: int = Field(16, ge=1)
