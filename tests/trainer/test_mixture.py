"""How often every row is seen: exactly as promised, whatever the shares; and what is held out is never trained on."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from trainer.config.data import DataSource, ValidationConfig
from trainer.config.train import TrainConfig
from trainer.data.batches import Batches
from trainer.data.chat import IGNORE
from trainer.data.dropped import DroppedRows
from trainer.data.mixture import Mixture, held_out_documents
from trainer.data.tokens import SourceFacts, Tokens

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=4)
EPOCHS = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0])


def make_tokens(sizes: list[int], content: list[int] | None = None) -> Tokens:
    """Sources of so many documents of three tokens each; documents with the same number in `content` are equal."""
    total = sum(sizes)
    numbers = np.asarray(content if content is not None else range(total), dtype=np.int32)
    ids = np.stack([numbers, numbers + 1, numbers + 2], axis=1).reshape(-1)
    labels = np.tile(np.array([1, 1, IGNORE], dtype=np.int32), total)
    sources = tuple(SourceFacts(f"source{i}", "messages", size, {}) for i, size in enumerate(sizes))
    return Tokens(ids, labels, np.arange(0, 3 * total + 1, 3), sources)


def make_config(**settings: object) -> TrainConfig:
    return TrainConfig(**{"max_seq_len": 12, "micro_batch_size": 1, "global_batch_size": 2, **settings})


def times_seen(mixture: Mixture, epoch: int, num_documents: int) -> np.ndarray:
    return np.bincount(mixture.documents(epoch), minlength=num_documents)


def spans(sizes: list[int]) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@given(SIZES.flatmap(lambda sizes: st.tuples(st.just(sizes), st.lists(EPOCHS, min_size=4, max_size=4))), st.data())
def test_epochs_of_a_source_are_how_often_each_row_is_seen(drawn: tuple, data: st.DataObject) -> None:
    sizes, epochs = drawn
    config = make_config(data=[{"path": str(i), "epochs": epochs[i]} for i in range(len(sizes))])
    mixture = Mixture(make_tokens(sizes), config, seed=data.draw(st.integers(0, 3)))
    over_all = np.zeros(sum(sizes), dtype=int)
    for epoch in range(4):
        seen = times_seen(mixture, epoch, sum(sizes))
        over_all += seen
        for span, size, wanted in zip(spans(sizes), sizes, epochs, strict=False):
            count = max(1, round(wanted * size))
            assert seen[span].sum() == count
            assert set(seen[span]) <= {count // size, math.ceil(count / size)}
            assert over_all[span].max() - over_all[span].min() <= 1, "some rows are seen more often than others"


@given(SIZES.flatmap(lambda s: st.tuples(st.just(s), st.lists(st.integers(1, 9), min_size=len(s), max_size=len(s)))))
def test_weights_are_shares_of_an_epoch_that_has_as_many_documents(drawn: tuple[list[int], list[int]]) -> None:
    sizes, weights = drawn
    config = make_config(data=[{"path": str(i), "weight": weight} for i, weight in enumerate(weights)])
    mixture, total = Mixture(make_tokens(sizes), config, seed=0), sum(sizes)
    seen = times_seen(mixture, 0, total)
    exact = [Fraction(total * weight, sum(weights)) for weight in weights]
    few = any(share < 1 for share in exact)  # every source is seen at least once
    assert few or seen.sum() == total
    for span, size, share in zip(spans(sizes), sizes, exact, strict=True):
        count = int(seen[span].sum())
        assert few or abs(count - share) < 1
        assert count >= 1
        assert set(seen[span]) <= {count // size, math.ceil(count / size)}


def test_the_mixture_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    config, tokens = make_config(data=[{"path": "a", "epochs": 0.5}]), make_tokens([40])

    def chosen(seed: int, epoch: int) -> list[int]:
        return Mixture(tokens, config, seed).documents(epoch).tolist()

    assert chosen(0, 0) == chosen(0, 0)
    assert chosen(0, 0) != chosen(1, 0)
    assert sorted(chosen(0, 0) + chosen(0, 1)) == list(range(40)), "the second half comes in the second epoch"
    assert chosen(0, 0) == chosen(0, 2)


def test_without_shares_an_epoch_is_every_document_once_in_order() -> None:
    mixture = Mixture(make_tokens([5, 7]), make_config(data=["a", "b"]), seed=3)
    assert mixture.documents(0).tolist() == mixture.documents(9).tolist() == list(range(12))
    assert mixture.same_every_epoch
    assert not Mixture(make_tokens([5]), make_config(data=[{"path": "a", "epochs": 1.5}]), 0).same_every_epoch


@pytest.mark.parametrize("unit", ["rows", "examples"])
@pytest.mark.parametrize("packing", [True, False])
def test_steps_hold_what_the_mixture_says_in_every_epoch(unit: str, packing: bool) -> None:
    config = make_config(
        data=[{"path": "a", "epochs": 2.5}, {"path": "b", "epochs": 0.5}], num_epochs=3, batch_unit=unit,
        packing=packing, validation=ValidationConfig(fraction=0.2),
    )  # fmt: skip
    tokens = make_tokens([9, 14])
    batches, mixture = Batches(tokens, config, 0, 0, 1), Mixture(tokens, config, 0)
    seen = Counter(d for step in range(batches.num_steps) for row in batches.rows_of_step(step) for d in row)
    assert seen == Counter(d for epoch in range(3) for d in mixture.documents(epoch).tolist())
    assert not seen.keys() & set(held_out_documents(tokens, config, 0).tolist())


@given(st.integers(2, 60), st.floats(0.01, 0.9), st.integers(0, 2**70))
def test_what_is_held_out_is_never_trained_on(num_documents: int, fraction: float, seed: int) -> None:
    config, tokens = make_config(validation=ValidationConfig(fraction=fraction)), make_tokens([num_documents])
    left_out = held_out_documents(tokens, config, seed)
    assert len(left_out) == math.ceil(fraction * num_documents)
    if len(left_out) < num_documents:
        assert sorted([*left_out, *Mixture(tokens, config, seed).documents(0)]) == list(range(num_documents))


def test_held_out_documents_have_no_twin_in_training() -> None:
    content = [number % 7 for number in range(35)]
    config, tokens = make_config(validation=ValidationConfig(fraction=0.3)), make_tokens([35], content)
    left_out, trained = held_out_documents(tokens, config, 0), Mixture(tokens, config, 0).documents(0)
    assert not {content[d] for d in left_out} & {content[d] for d in trained}


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    config = make_config(validation=ValidationConfig(fraction=0.3))

    def contents(order: list[int], seed: int) -> set[int]:
        return {order[d] for d in held_out_documents(make_tokens([30], order), config, seed)}

    forward, backward = list(range(30)), list(range(30))[::-1]
    assert contents(forward, 0) == contents(backward, 0)
    assert contents(forward, 0) != contents(forward, 1)


def test_holding_out_all_of_a_source_is_an_error() -> None:
    config = make_config(validation=ValidationConfig(fraction=0.9), data=[DataSource(path="a")])
    with pytest.raises(InputError, match=r"train\.validation\.fraction: all of source0 is held out"):
        Mixture(make_tokens([1]), config, 0)


def test_reasons_that_differ_in_every_row_are_not_all_shown() -> None:
    dropped = {"no assistant turn": 40} | {f"the chat template refuses the conversation: {n}": 1 for n in range(20)}
    shown = DroppedRows(Counter(dropped)).describe()
    assert shown.startswith("no assistant turn: 40; ")
    assert shown.endswith("; other reasons: 13")
