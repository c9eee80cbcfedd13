"""The log of finished requests survives torn writes and never trusts a damaged byte."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from generation.request_log import HEADER, RequestLog

values = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=30), max_size=3), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


def write_log(path: Path, values: list[dict]) -> list[int]:
    """A new log with these values under the ids "0", "1", ...; returns where each record ends."""
    path.unlink(missing_ok=True)
    ends = []
    with RequestLog(path) as log:
        for number, value in enumerate(values):
            log.append(str(number), value)
            ends.append(path.stat().st_size)
    return ends


def assert_holds(log: RequestLog, values: list[dict]) -> None:
    assert len(log) == len(values)
    for number, value in enumerate(values):
        assert str(number) in log
        assert log.get(str(number)) == value


@given(values=values)
def test_what_was_appended_is_there_after_opening_again(folder, values):
    write_log(folder / "log", values)
    with RequestLog(folder / "log") as log:
        assert_holds(log, values)
        assert log.get("unknown") is None and "unknown" not in log
        assert log.num_dropped_bytes == 0


@given(values=values, data=st.data())
def test_cut_anywhere_it_loses_only_the_record_that_was_cut(folder, values, data):
    path = folder / "log"
    ends = write_log(path, values)
    size = data.draw(st.integers(0, ends[-1]), label="size")
    os.truncate(path, size)
    num_whole = sum(end <= size for end in ends)
    with RequestLog(path) as log:
        assert_holds(log, values[:num_whole])
        assert log.num_dropped_bytes == size - (ends[num_whole - 1] if num_whole else 0)
        for number in range(num_whole, len(values)):
            log.append(str(number), values[number])
        assert_holds(log, values)
    with RequestLog(path) as log:
        assert_holds(log, values)


@given(values=values, data=st.data())
def test_a_changed_byte_is_an_error_that_names_the_record_or_costs_only_the_last(folder, values, data):
    path = folder / "log"
    ends = write_log(path, values)
    place = data.draw(st.integers(0, ends[-1] - 1), label="place")
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= data.draw(st.integers(1, 255), label="flip")
    path.write_bytes(damaged)
    number = sum(end <= place for end in ends)
    start = ends[number - 1] if number else 0
    if number == len(values) - 1 and place >= start + HEADER.size:
        with RequestLog(path) as log:  # the last payload: looks like a write that a power cut interrupted
            assert_holds(log, values[:number])
            assert log.num_dropped_bytes == ends[-1] - start
    else:
        with pytest.raises(InputError, match=rf"damaged at byte {start}:"):
            RequestLog(path)
        assert path.read_bytes() == damaged  # and nothing was cut off


def test_zeros_after_a_power_cut_are_a_torn_end(tmp_path):
    (end,) = write_log(tmp_path / "log", [{"a": "b"}])
    os.truncate(tmp_path / "log", end + 500)
    with RequestLog(tmp_path / "log") as log:
        assert_holds(log, [{"a": "b"}])
        assert log.num_dropped_bytes == 500
    assert (tmp_path / "log").stat().st_size == end


def test_an_id_is_appended_once(tmp_path):
    with RequestLog(tmp_path / "log") as log:
        log.append("a", {"n": 1})
        with pytest.raises(ValueError, match="already"):
            log.append("a", {"n": 2})
        assert log.get("a") == {"n": 1}


@pytest.mark.parametrize("num_bytes_that_fit", [0, 7, 30])
def test_a_full_disk_leaves_no_part_of_a_record(tmp_path, monkeypatch, num_bytes_that_fit):
    path = tmp_path / "log"
    real_write = os.write
    room = num_bytes_that_fit

    def write_until_full(descriptor: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        num_written = real_write(descriptor, data[:room])
        room -= num_written
        return num_written

    with RequestLog(path) as log:
        log.append("0", {"kept": True})
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", write_until_full)
        with pytest.raises(InputError, match=r"the disk is full .* start the same command again"):
            log.append("1", {"lost": "x" * 100})
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert "1" not in log
        log.append("1", {"now": "it fits"})
    with RequestLog(path) as log:
        assert_holds(log, [{"kept": True}, {"now": "it fits"}])
