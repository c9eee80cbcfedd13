"""The section `train.zero:` of a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import StrictModel

Stage = Literal["auto", 0, 1, 2, 3]
Offload = Literal["none", "cpu", "nvme"]


class ZeroConfig(StrictModel):
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) with offloading (arXiv 2101.06840, 2104.07857).

    Sizes are numbers of elements, as DeepSpeed's own are. The buckets' 200 million elements are 400 MB in bf16: large
    enough to hide latency, and small compared with a 7B model.
    """

    offload_optimizer: Offload = Field(
        "none", description="where AdamW's states are kept. none means on the GPU. nvme needs ZeRO-3"
    )
    offload_parameters: Offload = Field(
        "none", description="where the partitioned weights are kept. cpu and nvme need ZeRO-3"
    )
    nvme_path: str | None = Field(
        None, description="a folder on a local NVMe disk of every node. None means no offloading to nvme"
    )
    pin_memory: bool = Field(
        True, description="offload into page-locked host memory, which is faster. Without GPUs it has no effect"
    )
    hpz_partition_size: int = Field(
        1,
        ge=1,
        description="number of ranks among which ZeRO-3 keeps a second copy of the weights, usually those of a node "
        "(hpZ of ZeRO++, arXiv 2306.10209). 1 means no second copy",
    )
    reduce_bucket_size: int = Field(200_000_000, ge=1, description="gradients that one call sums over the ranks")
    allgather_bucket_size: int = Field(
        200_000_000, ge=1, description="weights that one call gathers. Used by ZeRO-1 and 2"
    )
    prefetch_bucket_size: int = Field(
        50_000_000, ge=0, description="weights that are gathered in advance. Used by ZeRO-3"
    )
    param_persistence_threshold: int = Field(
        100_000, ge=0, description="weights smaller than this are not partitioned. Used by ZeRO-3"
    )
    max_live_parameters: int = Field(
        1_000_000_000, ge=1, description="limit of the weights gathered at the same time. Used by ZeRO-3"
    )

    @model_validator(mode="after")
    def _combinations_that_work(self) -> "ZeroConfig":
        uses_nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if uses_nvme and self.nvme_path is None:
            raise ValueError(
                "offloading to nvme needs train.zero.nvme_path. Set it to a folder on a local disk of every node"
            )
        if not uses_nvme and self.nvme_path is not None:
            raise ValueError("nvme_path is set, but nothing is offloaded to nvme. Remove it, or offload to nvme")
        if self.hpz_partition_size > 1 and self.offload_parameters != "none":
            raise ValueError(
                "hpz_partition_size keeps a second copy of the weights on the GPUs, while offload_parameters removes "
                "them. Set one of the two"
            )
        return self

    @property
    def needs_stage_3(self) -> list[str]:
        """The settings, as `key=value`, that only ZeRO-3 has."""
        settings = []
        if self.offload_parameters != "none":
            settings.append(f"zero.offload_parameters={self.offload_parameters}")
        if self.offload_optimizer == "nvme":
            settings.append("zero.offload_optimizer=nvme")  # lower stages would keep the states in host memory
        if self.hpz_partition_size > 1:
            settings.append(f"zero.hpz_partition_size={self.hpz_partition_size}")
        return settings

    def stages(self, precision: str) -> list[int]:
        """The stages that work with these settings, lowest first."""
        return [stage for stage in range(4) if self.refusal(stage, precision) is None]

    def refusal(self, stage: Stage, precision: str) -> str | None:
        """The error message if a stage does not work with these settings. None means that it works."""
        if stage == 0 and precision == "bf16":
            return (
                "zero_stage=0 works only with precision=fp32, because DeepSpeed sums bf16 gradients in bf16 there. "
                "Set train.zero_stage=1, which sums them in float32 and takes less memory"
            )
        if stage == 0 and self.offload_optimizer != "none":
            return "zero.offload_optimizer needs ZeRO. Set train.zero_stage=1 or higher"
        if stage != "auto" and stage < 3 and self.needs_stage_3:
            return f"{' and '.join(self.needs_stage_3)} works only with train.zero_stage=3. Set that, or auto"
        if self.hpz_partition_size > 1 and precision == "fp32":
            return "zero.hpz_partition_size works only with train.precision=bf16: DeepSpeed keeps its copy in 16 bits"
        return None
