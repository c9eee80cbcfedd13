"""Which documents share a row: best-fit-decreasing bin packing to a token budget."""

from collections import defaultdict
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into rows of at most `capacity` tokens; return the document indices of each row.

    Longest first, each into the row with the least room that still takes it, else into a new row. A pure function of
    its arguments: ties go to the lower index. O(n log n) plus one big-integer operation of `capacity` bits a document.
    Raises ValueError if a document is longer than `capacity`.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r is set while some row has room for exactly r more tokens
    for document in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[document]
        if length > capacity:
            raise ValueError(f"document {document} has {length} tokens, a row holds {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        if left := room - length:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    return rows
