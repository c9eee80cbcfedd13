"""Rows out of JSON text, one at a time: JSON lines, a list, objects one after another, or `{"data": [...]}`.

No type is inferred from other rows, and one row is in memory, however large the file is.

for place, row in JsonRows(path, chunks):      # "my.jsonl:12", {"instruction": ..., "output": ...}
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from cluster.errors import InputError

NUMBER_REST = re.compile(r"[-+.eE\d]*")  # a number that goes on in the next chunk, "0" of "0.5" or "1" of "1e5"
WHITESPACE = re.compile(r"[ \t\r\n]*")
# Keys under which an object holds its file's rows, as in many published datasets: {"version": "1.1", "data": [...]}.
ROW_LISTS = ("data", "train", "rows")
TURN_KEYS = ("role", "from")  # a list of such objects is a conversation, not a file's rows
REPEATED = "the key {!r} occurs twice, with different values"
TAIL_CHARS = 16  # an error this close to the end of what is read may be due to a value that goes on


class _RepeatedKey(Exception):
    """A key occurs twice in an object, with different values."""


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise _RepeatedKey(REPEATED.format(key))
    return found


# strict=False: line breaks and tabs may be inside strings. pandas writes NaN where a value is missing.
DECODER = json.JSONDecoder(strict=False, parse_constant=lambda _: None, object_pairs_hook=_object)


class JsonRows:
    """The rows of a JSON text that comes in `chunks`, each with its place: file and line.

    Raises InputError naming the line at which a broken row begins, and where in it the text is no JSON.
    """

    def __init__(self, path: Path, chunks: Iterator[str]) -> None:
        self._path, self._chunks = path, chunks
        self._text, self._at = "", 0  # what is not read yet begins at `_at`
        self._line = 1  # of `_at`
        self._last_line = self._row_of_line = 0

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        is_first = True
        while char := self._peek():
            if char == "{" and is_first:
                yield from self._first_object()
            else:
                yield from map(self._as_row, self._list() if char == "[" else [self._item()])
            is_first = False

    def _first_object(self) -> Iterator[tuple[str, dict]]:
        """The object, if it is a row, or the rows of the list that it holds."""
        place, row, list_key = self._place(), {}, None
        for key in self._keys():
            if key not in ROW_LISTS or self._peek() != "[":
                value = self._value()
                if row.setdefault(key, value) != value:
                    self._fail(REPEATED.format(key))
                continue
            items = self._list()
            first = next(items, ("", None))
            if not isinstance(first[1], dict) or any(turn_key in first[1] for turn_key in TURN_KEYS):
                row[key] = [value for _, value in (first, *items)]
                continue
            if list_key is not None:
                raise InputError(
                    f"{self._path}: `{list_key}` and `{key}` both hold rows. Write each of them to a file of its own."
                )
            list_key = key
            yield first
            yield from map(self._as_row, items)
        if list_key is None:
            yield place, row

    def _keys(self) -> Iterator[str]:
        """The keys of the object that begins here. Whoever takes a key reads its value."""
        self._skip(1)
        while self._peek() != "}":
            key = self._value()
            if not isinstance(key, str) or self._peek() != ":":
                self._fail("expected a key and ':'")
            self._skip(1)
            yield key
            if self._peek() not in (",", "}"):
                self._fail("expected ',' or '}'")
            if self._peek() == ",":
                self._skip(1)
                if self._peek() == "}":
                    self._fail("a comma before the end of an object")
        self._skip(1)

    def _list(self) -> Iterator[tuple[str, object]]:
        """The items of the list that begins here, with their places."""
        self._skip(1)
        char = self._peek()
        while char != "]":
            yield self._item()
            char = self._peek()
            if char not in (",", "]"):
                self._fail("expected ',' or ']'" if char else "the file ends inside a list")
            if char == ",":
                self._skip(1)
                if self._peek() == "]":
                    self._fail("a comma before the end of a list")
        self._skip(1)

    def _item(self) -> tuple[str, object]:
        return self._place(), self._value()

    def _as_row(self, item: tuple[str, object]) -> tuple[str, dict]:
        place, value = item
        if not isinstance(value, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(value).__name__}.")
        return place, value

    def _place(self) -> str:
        """File and line of the row that begins here. The second row of a line also gets a number."""
        self._peek()
        self._row_of_line = self._row_of_line + 1 if self._line == self._last_line else 1
        self._last_line = self._line
        return self._row_place()

    def _row_place(self) -> str:
        is_later = self._line == self._last_line and self._row_of_line > 1
        return f"{self._path}:{self._line}" + (f" (row {self._row_of_line})" if is_later else "")

    # -- the text

    def _peek(self) -> str:
        """The next character that is no white space. Empty at the end of the text."""
        while True:
            self._skip(WHITESPACE.match(self._text, self._at).end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def _skip(self, num_chars: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + num_chars)
        self._at += num_chars

    def _read_more(self) -> bool:
        """Read until twice as much is ahead, so that a value of any length is read in linear time."""
        chunks, wanted = [], len(self._text) - self._at
        while wanted >= 0 and (chunk := next(self._chunks, "")):
            chunks.append(chunk)
            wanted -= len(chunk)
        if chunks:
            self._text, self._at = "".join([self._text[self._at :], *chunks]), 0
        return bool(chunks)

    def _value(self) -> object:
        """The value that begins here."""
        self._peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos + TAIL_CHARS >= len(self._text)
                if not (is_cut and self._read_more()):
                    self._fail(error.msg.removesuffix(" at"), error.pos)
            except _RepeatedKey as error:
                self._fail(str(error))
            except RecursionError:
                self._fail("values are nested too deeply")
            else:
                if not NUMBER_REST.fullmatch(self._text, end) or not self._read_more():
                    break
        if "\\ud" in (text := self._text[self._at : end]) or "\\uD" in text:
            self._refuse_half_characters(value)
        self._skip(end - self._at)
        return value

    def _refuse_half_characters(self, value: object) -> None:
        """Two escapes, such as \\ud83d\\ude00, are one character. One of them alone is none, and cannot be written."""
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            self._fail(f"{half} is half of a character, whose other half is missing")

    def _fail(self, reason: str, position: int | None = None) -> NoReturn:
        """Raise InputError naming the row at which the value begins, and `position`, an index of the text."""
        where = ""
        if position is not None:
            num_lines = self._text.count("\n", self._at, position)
            where = f" at line {self._line + num_lines}" if num_lines else f" at character {position - self._at + 1}"
        is_cut = (
            reason.startswith("Unterminated") or not self._text[self._at if position is None else position :].strip()
        )
        cut = " The file seems cut off: get it again." if is_cut and not self._read_more() else ""
        raise InputError(f"{self._row_place()}: not JSON ({reason}{where}).{cut} Fix or remove this row.")
