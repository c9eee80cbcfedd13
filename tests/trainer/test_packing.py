"""Best-fit-decreasing: nothing lost, nothing over the brim, and no worse than first-fit-decreasing."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.batches import best_fit_decreasing

LENGTHS = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


def best_fit_by_search(lengths: list[int], capacity: int) -> list[int]:
    """Tokens in every row of best-fit-decreasing, by looking at all rows each time."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, used in enumerate(rows) if used + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda index: rows[index])] += length
        else:
            rows.append(length)
    return sorted(rows)


@given(LENGTHS)
def test_every_document_is_in_exactly_one_row_and_no_row_is_over_capacity(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = drawn
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in row) <= capacity for row in rows)


@given(LENGTHS)
def test_rows_are_filled_as_by_a_search_over_all_rows(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = drawn
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(sum(lengths[document] for document in row) for row in rows) == best_fit_by_search(lengths, capacity)


@given(LENGTHS)
def test_no_two_rows_could_be_one(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = drawn
    used = sorted(sum(lengths[document] for document in row) for row in best_fit_decreasing(lengths, capacity))
    assert len(used) < 2 or used[0] + used[1] > capacity


@given(LENGTHS)
def test_packing_is_a_pure_function(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = drawn
    assert best_fit_decreasing(lengths, capacity) == best_fit_decreasing(list(lengths), capacity)


def test_equal_lengths_go_in_order_of_index() -> None:
    assert best_fit_decreasing([3, 3, 4, 4], 4) == [[2], [3], [0], [1]]


def test_a_document_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="document 1 has 9 tokens, a row holds 8"):
        best_fit_decreasing([3, 9], 8)


def lower_bound(lengths: list[int], capacity: int) -> int:
    """Rows that any packing needs (Martello and Toth 1990, section 8.3, bound L2).

    Documents longer than capacity - k share a row with none of at least k tokens; those above half of it share a row
    with no other above half, and what is left of their rows takes so much of the documents from k to half.
    """
    best = 0
    for k in range(capacity // 2 + 1):
        alone = [length for length in lengths if length > capacity - k]
        large = [length for length in lengths if capacity - k >= length > capacity / 2]
        small = [length for length in lengths if capacity / 2 >= length >= k]
        room = len(large) * capacity - sum(large)
        best = max(best, len(alone) + len(large) + max(0, -(-(sum(small) - room) // capacity)))
    return best


@given(LENGTHS)
def test_there_are_never_many_more_rows_than_any_packing_needs(drawn: tuple[list[int], int]) -> None:
    """At most 11/9 of the optimum and 6/9 of a row: proven for the decreasing fits (Dosa 2007)."""
    lengths, capacity = drawn
    rows = len(best_fit_decreasing(lengths, capacity))
    assert lower_bound(lengths, capacity) <= rows
    assert rows <= 11 / 9 * optimum_at_most(lengths, capacity) + 6 / 9


def optimum_at_most(lengths: list[int], capacity: int) -> int:
    """No fewer rows than the optimum: the best of many packings."""
    rng = random.Random(0)
    orders = [sorted(lengths, reverse=True), list(lengths), *(rng.sample(lengths, len(lengths)) for _ in range(10))]
    return min(first_fit(order, capacity) for order in orders)


def first_fit(lengths: list[int], capacity: int) -> int:
    rows: list[int] = []
    for length in lengths:
        fitting = next((index for index, used in enumerate(rows) if used + length <= capacity), None)
        if fitting is None:
            rows.append(length)
        else:
            rows[fitting] += length
    return len(rows)


@pytest.mark.parametrize(("median", "sigma", "capacity"), [(100, 0.8, 512), (300, 1.0, 2048), (600, 1.2, 4096)])
def test_rows_of_a_log_normal_mix_are_98_percent_full(median: float, sigma: float, capacity: int) -> None:
    """As the lengths of instruction data are distributed, those above the capacity cut."""
    lengths = np.random.default_rng(0).lognormal(np.log(median), sigma, size=4000)
    cut = np.clip(lengths.astype(int), 2, capacity).tolist()
    rows = best_fit_decreasing(cut, capacity)
    assert sum(cut) / (len(rows) * capacity) >= 0.98
    assert len(rows) <= 1.02 * lower_bound(cut, capacity)
