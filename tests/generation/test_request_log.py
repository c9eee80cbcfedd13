"""The log of finished requests survives torn writes, spans many segments, and trusts no damaged byte."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InputError
from generation.request_log import HEADER, RequestLog

values = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=30), max_size=3), min_size=1, max_size=8)
segment_sizes = st.sampled_from([1, 100, 250, 10_000])
quick = settings(deadline=None, max_examples=60)


def make_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


def write_log(path: Path, values: list[dict], segment_bytes: int = 10_000) -> list[tuple[Path, int, int]]:
    """Write a new log with these values. Returns segment, first byte and end of each record."""
    shutil.rmtree(path, ignore_errors=True)
    places = []
    with RequestLog(path, segment_bytes) as log:
        for number, value in enumerate(values):
            sizes = {file: file.stat().st_size for file in path.glob("*.log")}
            log.append(make_id(number), value)
            grown = max(path.glob("*.log"))
            places.append((grown, sizes.get(grown, 0), grown.stat().st_size))
    return places


def assert_holds(log: RequestLog, values: list[dict]) -> None:
    assert len(log) == len(values)
    assert log.ids() == {make_id(number) for number in range(len(values))}
    for number, value in enumerate(values):
        assert make_id(number) in log
        assert log.get(make_id(number)) == value


@quick
@given(values=values, segment_bytes=segment_sizes)
def test_a_reopened_log_has_everything_that_was_appended(folder, values, segment_bytes):
    write_log(folder / "log", values[:-1], segment_bytes)
    for expected in (values[:-1], values):
        with RequestLog(folder / "log", segment_bytes) as log:
            assert_holds(log, expected)
            assert make_id(99) not in log and log.get(make_id(99)) is None
            assert log.num_dropped_bytes == 0
            if expected is not values:
                log.append(make_id(len(values) - 1), values[-1])
                assert_holds(log, values)


def test_after_a_full_segment_the_next_is_written(tmp_path):
    write_log(tmp_path / "log", [{"text": "x" * 100}] * 7, segment_bytes=400)
    names = sorted(file.name for file in (tmp_path / "log").iterdir())
    assert names == ["00000.log", "00001.log", "00002.log"]
    with RequestLog(tmp_path / "log", segment_bytes=10_000) as log:  # another size later on
        assert_holds(log, [{"text": "x" * 100}] * 7)


@quick
@given(values=values, segment_bytes=segment_sizes, data=st.data())
def test_a_truncated_log_loses_only_the_truncated_record(folder, values, segment_bytes, data):
    path = folder / "log"
    places = write_log(path, values, segment_bytes)
    last = places[-1][0]
    size = data.draw(st.integers(0, places[-1][2]), label="size")
    os.truncate(last, size)
    whole = [place for place in places if place[0] != last or place[2] <= size]
    with RequestLog(path, segment_bytes) as log:
        assert_holds(log, values[: len(whole)])
        assert log.num_dropped_bytes == size - max([end for file, _, end in whole if file == last], default=0)
        for number in range(len(whole), len(values)):
            log.append(make_id(number), values[number])
        assert_holds(log, values)
    with RequestLog(path, segment_bytes) as log:
        assert_holds(log, values)


@quick
@given(values=values, segment_bytes=segment_sizes, data=st.data())
def test_a_changed_byte_is_an_error_and_never_a_wrong_value(folder, values, segment_bytes, data):
    path = folder / "log"
    places = write_log(path, values, segment_bytes)
    file = data.draw(st.sampled_from(sorted(file for file in path.iterdir() if file.stat().st_size)), label="file")
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1), label="place")
    content[place] ^= data.draw(st.integers(1, 255), label="flip")
    file.write_bytes(content)
    number = next(n for n, (name, _, end) in enumerate(places) if name == file and place < end)
    start, end = places[number][1:]
    error = rf"{file}: damaged at byte {start}: .*`truncate -s {start} {file}`"
    if file == places[-1][0] and number == len(values) - 1 and place >= start + HEADER.size:
        with RequestLog(path, segment_bytes) as log:  # the last payload: looks like a write that a power cut stopped
            assert_holds(log, values[:number])
            assert log.num_dropped_bytes == end - start
    else:
        with pytest.raises(InputError, match=error):
            RequestLog(path, segment_bytes)
        assert file.read_bytes() == content  # and nothing was cut off


def test_a_record_that_is_damaged_while_the_log_is_open_is_an_error(tmp_path):
    ((segment, _, _),) = write_log(tmp_path / "log", [{"n": 1}])
    with RequestLog(tmp_path / "log") as log:
        for spoil in (lambda: segment.write_bytes(segment.read_bytes()[:-2] + b"2}"), lambda: os.truncate(segment, 9)):
            spoil()
            with pytest.raises(InputError, match=rf"{segment}: damaged at byte 0"):
                log.get(make_id(0))


def test_a_truncated_full_segment_is_damaged_not_torn(tmp_path):
    path, values = tmp_path / "log", [{"n": number} for number in range(9)]
    places = write_log(path, values, segment_bytes=150)
    segment, start, end = places[1]
    os.truncate(segment, end - 1)
    with pytest.raises(InputError, match=rf"{segment}: damaged at byte {start}"):
        RequestLog(path, segment_bytes=150)
    os.truncate(segment, start)  # the fix of the message
    lost = {number for number, place in enumerate(places) if place[0] == segment and place[2] > start}
    with RequestLog(path, segment_bytes=150) as log:
        assert log.ids() == {make_id(number) for number in range(9) if number not in lost}
        for number in lost:
            log.append(make_id(number), values[number])
        assert_holds(log, values)


def test_a_missing_segment_is_named_and_an_empty_file_replaces_it(tmp_path):
    path = tmp_path / "log"
    write_log(path, [{"n": number} for number in range(3)], segment_bytes=1)
    (path / "00001.log").unlink()
    with pytest.raises(InputError, match=rf"{path}/00001.log: missing.*`touch {path}/00001.log`"):
        RequestLog(path, segment_bytes=1)
    (path / "00001.log").touch()
    with RequestLog(path, segment_bytes=1) as log:
        assert log.ids() == {make_id(0), make_id(2)}


def test_zeros_after_a_power_cut_are_a_torn_end(tmp_path):
    ((segment, _, end),) = write_log(tmp_path / "log", [{"a": "b"}])
    os.truncate(segment, end + 500)
    with RequestLog(tmp_path / "log") as log:
        assert_holds(log, [{"a": "b"}])
        assert log.num_dropped_bytes == 500
    assert segment.stat().st_size == end


@pytest.mark.parametrize("segment_bytes", [1, 10_000])
def test_an_id_is_appended_once(tmp_path, segment_bytes):
    write_log(tmp_path / "log", [{"n": 1}, {"n": 2}], segment_bytes)
    with RequestLog(tmp_path / "log", segment_bytes) as log:
        with pytest.raises(ValueError, match="already"):
            log.append(make_id(0), {"n": 3})
        assert_holds(log, [{"n": 1}, {"n": 2}])


@pytest.mark.parametrize("request_id", ["", "seed", "ab" * 31, "AB" * 32, " " + "ab" * 31 + "a", "ab" * 33])
def test_an_id_that_is_no_hash_is_an_error(tmp_path, request_id):
    with RequestLog(tmp_path / "log") as log:
        with pytest.raises(ValueError, match="not a SHA-256"):
            log.append(request_id, {})
        assert request_id not in log and log.get(request_id) is None
        assert len(log) == 0


def write_until_full(room: int):
    """An `os.write` for a disk with `room` free bytes."""
    real_write = os.write

    def write(descriptor: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        num_written = real_write(descriptor, data[:room])
        room -= num_written
        return num_written

    return write


@pytest.mark.parametrize("num_bytes_that_fit", [0, 7, 60])
def test_a_full_disk_leaves_no_part_of_a_record(tmp_path, monkeypatch, num_bytes_that_fit):
    path = tmp_path / "log"
    with RequestLog(path) as log:
        log.append(make_id(0), {"kept": True})
        before = (path / "00000.log").read_bytes()
        monkeypatch.setattr(os, "write", write_until_full(num_bytes_that_fit))
        with pytest.raises(InputError, match=r"the disk is full .* start the same command again"):
            log.append(make_id(1), {"lost": "x" * 100})
        monkeypatch.undo()
        assert (path / "00000.log").read_bytes() == before
        assert make_id(1) not in log
        log.append(make_id(1), {"now": "it fits"})
    with RequestLog(path) as log:
        assert_holds(log, [{"kept": True}, {"now": "it fits"}])


@pytest.mark.parametrize("what", ["open", "write"])
def test_a_disk_that_fills_up_when_a_segment_is_full_changes_nothing(tmp_path, monkeypatch, what):
    path = tmp_path / "log"
    real = getattr(os, what)

    def full(*arguments, **options):
        if what == "open" and "00001.log" not in str(arguments[0]):
            return real(*arguments, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    with RequestLog(path, segment_bytes=1) as log:
        log.append(make_id(0), {"n": 0})
        monkeypatch.setattr(os, what, full)
        with pytest.raises(InputError, match="the disk is full"):
            log.append(make_id(1), {"n": 1})
        monkeypatch.undo()
        assert_holds(log, [{"n": 0}])
    with RequestLog(path, segment_bytes=1) as log:
        assert_holds(log, [{"n": 0}])
        log.append(make_id(1), {"n": 1})
        assert_holds(log, [{"n": 0}, {"n": 1}])
