"""The order of training: the same rows in the same steps for any number of ranks, and no label across a border."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from trainer.config.train import TrainConfig
from trainer.data.batches import Batches, MicroBatch
from trainer.data.chat import IGNORE
from trainer.data.tokens import SourceFacts, Tokens

MAX_SEQ_LEN = 16


def make_tokens(lengths: list[int]) -> Tokens:
    """Documents whose tokens are all different; the label of a token is the next one's id, of the last it is IGNORE."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    labels = ids + 1
    labels[offsets[1:] - 1] = IGNORE
    return Tokens(ids, labels.astype(np.int32), offsets, (SourceFacts("made", "messages", len(lengths), {}),))


@dataclass(frozen=True)
class Plan:
    tokens: Tokens
    config: TrainConfig
    seed: int

    def batches(self, rank: int, world_size: int) -> Batches:
        return Batches(self.tokens, self.config, self.seed, rank, world_size)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Jobs that 1, 2 and 3 ranks can run."""
    lengths = draw(st.lists(st.integers(2, MAX_SEQ_LEN), min_size=1, max_size=40))
    micro = draw(st.integers(1, 3))
    config = TrainConfig(
        packing=draw(st.booleans()), max_seq_len=MAX_SEQ_LEN, micro_batch_size=micro,
        global_batch_size=6 * micro * draw(st.integers(1, 2)), batch_unit="rows", num_epochs=2,
    )  # fmt: skip
    return Plan(make_tokens(lengths), config, draw(st.integers(0, 3)))


def documents_in(batch: MicroBatch) -> list[tuple[int, ...]]:
    """Token ids of each document of a micro-batch, told apart by positions that restart; padding has id 0."""
    found = []
    for ids, positions in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True):
        assert positions[0] == 0
        begins = [index for index, position in enumerate(positions) if position == 0]
        for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
            assert positions[begin:end] == list(range(end - begin))
            if ids[begin]:
                found.append(tuple(ids[begin:end]))
    return found


@given(plans(), st.sampled_from((1, 2, 3)))
def test_an_epoch_has_every_document_once_for_any_number_of_ranks(plan: Plan, world_size: int) -> None:
    ranks = [plan.batches(rank, world_size) for rank in range(world_size)]
    seen = [
        document
        for step in range(ranks[0].steps_per_epoch)
        for rank in ranks
        for batch in rank.micro_batches(step)
        for document in documents_in(batch)
    ]
    ids, offsets = plan.tokens.input_ids.tolist(), plan.tokens.offsets.tolist()
    expected = [tuple(ids[begin:end]) for begin, end in pairwise(offsets)]
    assert sorted(seen) == sorted(expected)


@given(plans(), st.sampled_from((2, 3)))
def test_a_step_has_the_same_rows_for_any_number_of_ranks(plan: Plan, world_size: int) -> None:
    alone = plan.batches(0, 1)
    ranks = [plan.batches(rank, world_size) for rank in range(world_size)]
    for step in range(alone.num_steps):
        expected = [document for batch in alone.micro_batches(step) for document in documents_in(batch)]
        found = [document for rank in ranks for batch in rank.micro_batches(step) for document in documents_in(batch)]
        assert sorted(found) == sorted(expected)


@given(plans(), st.sampled_from((1, 2, 3)))
def test_every_rank_has_the_same_number_of_micro_batches_in_every_step(plan: Plan, world_size: int) -> None:
    for rank in range(world_size):
        batches = plan.batches(rank, world_size)
        counts = {len(batches.micro_batches(step)) for step in range(batches.num_steps)}
        per_pass = plan.config.micro_batch_size * world_size
        assert counts == {batches.grad_accum_steps} == {plan.config.global_batch_size // per_pass}


@given(plans())
def test_labels_are_the_documents_own_and_cross_no_border(plan: Plan) -> None:
    batches = plan.batches(0, 1)
    num_trained_tokens = 0
    for step in range(batches.steps_per_epoch):
        for batch in batches.micro_batches(step):
            ids, labels, positions = batch.input_ids.numpy(), batch.labels.numpy(), batch.position_ids.numpy()
            assert (labels[ids == 0] == IGNORE).all(), "padding has a label"
            last = np.concatenate([positions[:, 1:] == 0, np.ones((len(positions), 1), dtype=bool)], axis=1)
            assert (labels[last] == IGNORE).all(), "a document's last token has a label"
            labeled = labels != IGNORE
            assert (labels[labeled] == ids[labeled] + 1).all()
            assert batch.num_trained_tokens == labeled.sum()
            num_trained_tokens += batch.num_trained_tokens
    assert num_trained_tokens == plan.tokens.num_trained


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    config = TrainConfig(packing=False, max_seq_len=MAX_SEQ_LEN, micro_batch_size=1, global_batch_size=50, num_epochs=2)
    tokens = make_tokens([2] * 50)
    first, again, other = (Batches(tokens, config, seed, 0, 1) for seed in (0, 0, 1))
    assert first.rows_of_step(0) == again.rows_of_step(0)
    assert first.rows_of_step(0) != other.rows_of_step(0)
    assert first.rows_of_step(0) != first.rows_of_step(1)
    assert sorted(first.rows_of_step(0)) == sorted(first.rows_of_step(1)) == [[number] for number in range(50)]
    assert first.rows_of_step(0) != sorted(first.rows_of_step(0))


def test_steps_may_be_read_in_any_order() -> None:
    config = TrainConfig(packing=False, max_seq_len=MAX_SEQ_LEN, micro_batch_size=1, global_batch_size=7, num_epochs=3)
    tokens = make_tokens([2] * 20)
    forward, backward = Batches(tokens, config, 0, 0, 1), Batches(tokens, config, 0, 0, 1)
    steps = range(forward.num_steps)
    assert [forward.rows_of_step(step) for step in steps] == [backward.rows_of_step(step) for step in reversed(steps)][
        ::-1
    ]


def test_max_steps_ends_before_the_epochs_do() -> None:
    config = TrainConfig(packing=False, max_seq_len=MAX_SEQ_LEN, micro_batch_size=1, global_batch_size=4, num_epochs=2)
    tokens = make_tokens([2] * 10)
    assert Batches(tokens, config, 0, 0, 1).num_steps == 6
    for max_steps, expected in ((4, 4), (99, 6)):
        limited = config.model_copy(update={"max_steps": max_steps})
        assert Batches(tokens, limited, 0, 0, 1).num_steps == expected


def test_a_batch_that_ranks_cannot_share_evenly_is_an_error() -> None:
    config = TrainConfig(max_seq_len=MAX_SEQ_LEN, micro_batch_size=2, global_batch_size=8, batch_unit="rows")
    with pytest.raises(InputError, match=r"global_batch_size=8 is not a multiple of micro_batch_size 2 x 3 ranks = 6"):
        Batches(make_tokens([2]), config, 0, 0, 3)


def test_collating_costs_no_pass_over_all_documents() -> None:
    tokens = make_tokens([2] * 10)
    assert tokens.lengths is tokens.lengths


@st.composite
def plans_by_examples(draw: st.DrawFn) -> Plan:
    lengths = draw(st.lists(st.integers(2, MAX_SEQ_LEN), min_size=1, max_size=40))
    config = TrainConfig(
        packing=draw(st.booleans()), max_seq_len=MAX_SEQ_LEN, num_epochs=2,
        micro_batch_size=draw(st.integers(1, 3)), global_batch_size=draw(st.integers(1, 13)),
    )  # fmt: skip
    return Plan(make_tokens(lengths), config, draw(st.integers(0, 3)))


@given(plans_by_examples(), st.sampled_from((1, 2, 3)))
def test_steps_counted_in_examples_have_that_many_for_any_number_of_ranks(plan: Plan, world_size: int) -> None:
    ranks = [plan.batches(rank, world_size) for rank in range(world_size)]
    alone, size, total = plan.batches(0, 1), plan.config.global_batch_size, plan.tokens.num_documents
    sizes = [min(size, total - begin) for begin in range(0, total, size)]
    assert ranks[0].num_steps == len(sizes) * 2
    seen: list[tuple[int, ...]] = []
    for step in range(ranks[0].num_steps):
        per_rank = [rank.micro_batches(step) for rank in ranks]
        assert len({len(batches) for batches in per_rank}) == 1, "a rank would wait for the others"
        found = [document for batches in per_rank for batch in batches for document in documents_in(batch)]
        assert len(found) == sizes[step % len(sizes)]
        assert sorted(found) == sorted(d for batch in alone.micro_batches(step) for d in documents_in(batch))
        seen += found
    ids, offsets = plan.tokens.input_ids.tolist(), plan.tokens.offsets.tolist()
    assert sorted(seen) == sorted([tuple(ids[begin:end]) for begin, end in pairwise(offsets)] * 2)


def test_packing_does_not_change_the_examples_of_a_step() -> None:
    """The same conversations make a step, packed or not, in a fraction of the rows and passes."""
    config = TrainConfig(max_seq_len=MAX_SEQ_LEN, micro_batch_size=1, global_batch_size=128, num_epochs=1)
    tokens = make_tokens([3, 4, 5] * 200)
    packed, plain = (
        Batches(tokens, config.model_copy(update={"packing": packing}), 0, 0, 1) for packing in (True, False)
    )
    assert packed.num_steps == plain.num_steps == 5
    for step in range(5):
        rows = packed.rows_of_step(step)
        assert sorted(d for row in rows for d in row) == sorted(d for row in plain.rows_of_step(step) for d in row)
        assert len(packed.micro_batches(step)) == len(rows) <= len(plain.micro_batches(step)) / 3
    assert "a step: 128 examples, about 3" in packed.describe()[-1]
    by_rows = Batches(tokens, config.model_copy(update={"batch_unit": "rows", "global_batch_size": 32}), 0, 0, 1)
    assert "a step: 32 rows, about 12" in by_rows.describe()[-1]
