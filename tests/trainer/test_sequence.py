"""The parts that several ranks get of a row make up the row. Heads that cannot be divided are refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from tests.trainer.test_batches import Plan, plans, plans_by_examples
from tests.trainer.test_memory import FACTS, config_of
from trainer.config.train import TrainConfig
from trainer.data.batches import Batches
from trainer.data.chat import IGNORE
from trainer.data.sequence_parallel import SequenceParallelBatches
from trainer.memory import check_heads
from trainer.resolve import with_choices


@given(plan=plans() | plans_by_examples(), num_groups=st.integers(1, 3), num_parts=st.integers(2, 5))
def test_parts_make_up_the_rows(plan: Plan, num_groups: int, num_parts: int) -> None:
    config = plan.config.model_copy(update={"sequence_parallel_size": num_parts})
    world_size = num_groups * num_parts
    split = [SequenceParallelBatches(plan.tokens, config, plan.seed, rank, world_size) for rank in range(world_size)]
    for group in range(num_groups):
        whole = Batches(plan.tokens, config, plan.seed, group, num_groups)
        members = split[group * num_parts : (group + 1) * num_parts]
        assert {member.num_steps for member in members} == {whole.num_steps}
        for step in range(whole.num_steps):
            parts_by_member = zip(*(member.micro_batches(step) for member in members), strict=True)
            for row, parts in zip(whole.micro_batches(step), parts_by_member, strict=True):
                assert len({part.input_ids.shape for part in parts}) == 1
                assert len(parts[0].input_ids) == config.micro_batch_size
                assert sum(part.num_trained_tokens for part in parts) == row.num_trained_tokens
                num_rows, num_tokens = row.input_ids.shape
                for name in ("input_ids", "position_ids", "labels"):
                    joined = torch.cat([getattr(part, name) for part in parts], dim=1)
                    assert torch.equal(joined[:num_rows, :num_tokens], getattr(row, name))
                    if name == "labels":
                        assert (joined[num_rows:] == IGNORE).all()
                        assert (joined[:, num_tokens:] == IGNORE).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts", "complaint"),
    [(8, 8, 3, "does not divide the model's 8 attention heads"), (12, 4, 6, "one of the two numbers has to divide"),
     (8, 2, 4, None), (8, 4, 2, None), (8, 8, 1, None)],
)  # fmt: skip
def test_heads_that_cannot_be_divided_among_ranks_are_refused(
    heads: int, kv_heads: int, parts: int, complaint: str
) -> None:
    facts = replace(FACTS, num_heads=heads, num_kv_heads=kv_heads)
    config = config_of(sequence_parallel_size=parts, packing=False)
    if complaint is None:
        check_heads(facts, config)
        return
    with pytest.raises(InputError, match=complaint):
        check_heads(facts, config)


def test_packed_rows_are_refused_without_flash_attention() -> None:
    """`attention: auto` resolves to PyTorch's here, with which packed documents would see each other."""
    with pytest.raises(InputError, match=r"train: packed rows with sequence_parallel_size need train\.attention=flash"):
        with_choices(TrainConfig(sequence_parallel_size=2), zero_stage=2, attention="sdpa")
