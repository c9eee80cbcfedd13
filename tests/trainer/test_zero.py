"""Which ZeRO settings can be combined, and that DeepSpeed accepts our configuration."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.errors import InputError
from tests.trainer.tools import train_here, write_job
from trainer.config.train import TrainConfig


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"zero_stage": 2, "zero": {"offload_parameters": "cpu"}},
            "offload_parameters=cpu works only with train.zero_stage=3",
        ),
        (
            {"zero_stage": 1, "zero": {"offload_optimizer": "nvme", "nvme_path": "/x"}},
            "offload_optimizer=nvme works only with",
        ),
        ({"zero": {"offload_optimizer": "nvme"}}, "needs train.zero.nvme_path"),
        ({"zero": {"nvme_path": "/x"}}, "nothing is offloaded to nvme"),
        (
            {"zero_stage": 2, "zero": {"hpz_partition_size": 2}},
            "hpz_partition_size=2 works only with train.zero_stage=3",
        ),
        ({"zero_stage": 3, "precision": "fp32", "zero": {"hpz_partition_size": 2}}, "only with train.precision=bf16"),
        ({"zero": {"hpz_partition_size": 2, "offload_parameters": "cpu"}}, "Set one of the two"),
        ({"zero_stage": 0}, "zero_stage=0 works only with precision=fp32"),
        ({"zero_stage": 0, "precision": "fp32", "zero": {"offload_optimizer": "cpu"}}, "offload_optimizer needs ZeRO"),
        ({"zero": {"offload_optimiser": "cpu"}}, "Extra inputs are not permitted"),
        ({"zero_stage": 3, "compile": True}, "compile does not work with ZeRO-3"),
        ({"zero_stage": 3, "activation_checkpointing": "selective"}, "selective does not work with ZeRO-3"),
        ({"compile": True, "activation_checkpointing": "selective"}, "compile does not work with activation_check"),
        ({"compile": True, "zero": {"offload_parameters": "cpu"}}, "compile does not work with ZeRO-3"),
        ({"sequence_parallel_size": 2, "attention": "sdpa"}, "packed rows with sequence_parallel_size"),
        ({"sequence_parallel_size": 2, "attention": "eager", "packing": False}, "Set train.attention=sdpa"),
        ({"attention": "sdpa_by_document", "packing": False}, "sdpa_by_document is for packed rows"),
        ({"sequence_parallel_size": 2, "tuning": "prefix", "packing": False}, "does not work with tuning=prefix"),
        ({"sequence_parallel_size": 2, "zero_stage": 1, "packing": False}, "does not work with zero_stage=1 and bf16"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValidationError, match=r"(?s)" + complaint.replace(".", r"\.")):
        TrainConfig(**settings)


@given(
    precision=st.sampled_from(["bf16", "fp32"]), compiled=st.booleans(),
    zero=st.sampled_from([{}, {"offload_optimizer": "cpu"}, {"offload_parameters": "cpu"}, {"reduce_bucket_size": 5}]),
    parts=st.sampled_from([1, 2]), recomputed=st.sampled_from(["none", "selective", "full"]),
)  # fmt: skip
def test_auto_offers_every_stage_that_a_recipe_may_set(
    precision: str, compiled: bool, zero: dict, parts: int, recomputed: str
) -> None:
    settings = {
        "precision": precision, "compile": compiled, "zero": zero, "sequence_parallel_size": parts, "packing": False,
        "activation_checkpointing": recomputed,
    }  # fmt: skip

    def is_valid(stage: object) -> bool:
        try:
            TrainConfig(**settings, zero_stage=stage)
        except ValidationError:
            return False
        return True

    if is_valid("auto"):
        offered = TrainConfig(**settings).stages
        assert offered == [stage for stage in range(4) if is_valid(stage)]


def test_settings_that_this_machine_does_not_support_are_refused(
    one_rank: None, tmp_path: Path, chat_model: Path, chat_data: Path
) -> None:
    for name, settings, complaint in (
        ("hpz", {"zero": {"hpz_partition_size": 2}, "precision": "bf16"}, "does not divide 1 ranks"),
        ("sequence", {"sequence_parallel_size": 2, "packing": False}, "does not divide 1 ranks"),
        ("disk", {"zero": {"offload_optimizer": "nvme", "nvme_path": "/no/such"}}, "this node has no folder /no/such"),
    ):
        run = write_job(tmp_path / name, chat_model, chat_data, **settings)
        with pytest.raises(InputError, match=complaint):
            train_here(run)
