"""Best-fit-decreasing: nothing lost, nothing over the brim, and no worse than first-fit-decreasing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.packing import best_fit_decreasing

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
