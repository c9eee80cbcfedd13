"""How ZeRO spreads a model over the ranks, and what it may move out of the GPUs."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import StrictModel

Stage = Literal["auto", 0, 1, 2, 3]
Offload = Literal["none", "cpu", "nvme"]


class ZeroConfig(StrictModel):
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) with offloading (arXiv 2101.06840, 2104.07857).

    Sizes are in elements, as DeepSpeed's own are: 200 million are 400 MB of bf16, large enough to hide latency and
    small beside a 7B model.
    """

    offload_optimizer: Offload = Field("none", description="where AdamW's states live and are updated; nvme: ZeRO-3")
    offload_parameters: Offload = Field("none", description="where weights wait to be gathered; ZeRO-3 alone")
    nvme_path: str | None = Field(None, description="a folder on a local NVMe disk of every node, for nvme")
    pin_memory: bool = Field(True, description="page-locked host memory for what is offloaded, on machines with GPUs")
    hpz_partition_size: int = Field(
        1, ge=1, description="ranks of a node among which ZeRO-3 keeps a second copy of the weights (ZeRO++ hpZ)"
    )
    reduce_bucket_size: int = Field(200_000_000, ge=1, description="gradients summed over ranks in one call")
    allgather_bucket_size: int = Field(200_000_000, ge=1, description="weights gathered in one call, ZeRO-1 and 2")
    prefetch_bucket_size: int = Field(50_000_000, ge=0, description="weights gathered ahead, ZeRO-3")
    param_persistence_threshold: int = Field(100_000, ge=0, description="smaller weights are never split, ZeRO-3")
    max_live_parameters: int = Field(1_000_000_000, ge=1, description="weights gathered at a time at most, ZeRO-3")

    @model_validator(mode="after")
    def _combinations_that_work(self) -> "ZeroConfig":
        uses_nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if uses_nvme and self.nvme_path is None:
            raise ValueError("offloading to nvme needs train.zero.nvme_path, a folder on a local disk of every node")
        if not uses_nvme and self.nvme_path is not None:
            raise ValueError("nvme_path is set and nothing is offloaded to nvme. Set train.zero.offload_optimizer=nvme")
        if self.hpz_partition_size > 1 and self.offload_parameters != "none":
            raise ValueError(
                "hpz_partition_size keeps a second copy of the weights on the GPUs, offload_parameters moves them off: "
                "choose one"
            )
        return self

    @property
    def needs_stage_3(self) -> list[str]:
        """The settings that no lower stage has."""
        found = []
        if self.offload_parameters != "none":
            found.append(f"zero.offload_parameters={self.offload_parameters}")
        if self.offload_optimizer == "nvme":
            found.append("zero.offload_optimizer=nvme")  # stages 1 and 2 would put the states into host memory
        if self.hpz_partition_size > 1:
            found.append(f"zero.hpz_partition_size={self.hpz_partition_size}")
        return found

    def stages(self, precision: str) -> list[int]:
        """The stages that these settings work with, lowest first."""
        if self.needs_stage_3:
            return [3]
        # DeepSpeed sums bf16 gradients in bf16 without ZeRO, and has nothing to offload there.
        return [0, 1, 2, 3] if precision == "fp32" and self.offload_optimizer == "none" else [1, 2, 3]

    def complaint(self, stage: Stage, precision: str) -> str | None:
        """Why a stage does not work with these settings; None if it does."""
        if stage == 0 and precision == "bf16":
            return (
                "zero_stage=0 works with precision=fp32 alone: DeepSpeed sums bf16 gradients there in bf16. "
                "Set train.zero_stage=1, which sums them in float32 and takes less memory"
            )
        if stage == 0 and self.offload_optimizer != "none":
            return "zero.offload_optimizer needs ZeRO. Set train.zero_stage=1 or higher"
        if stage != "auto" and stage < 3 and self.needs_stage_3:
            return f"{' and '.join(self.needs_stage_3)} works with train.zero_stage=3 alone. Set that, or auto"
        if self.hpz_partition_size > 1 and precision == "fp32":
            return "zero.hpz_partition_size works with train.precision=bf16 alone: DeepSpeed keeps that copy in 16 bits"
        return None
