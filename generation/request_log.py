"""The log of finished requests: append-only, checked, and how a run resumes without generating anything twice.

requests/00000.log     a full segment: records in the order they were appended
requests/00000.index   its index, which can always be made again from the segment
requests/00001.log     the segment being written: no index yet, opening reads it from end to end

One write appends a record. Opening cuts off what a crash left half-written at the end, and a damaged byte anywhere
before the end is an error, because a log that cannot be trusted must not be built on: in the segment being written when
the log is opened, in a full one when the record is read, for its bytes are not looked at before.
"""

import os
import time
from pathlib import Path

import msgspec

from cluster.errors import InputError
from cluster.files import MIB, explain_full_disk, fsync_folder
from cluster.run.fence import Fence
from generation.log_segments import (
    ID_BYTES,
    Records,
    SegmentIndex,
    key_of,
    open_index,
    pack_record,
    read_payload,
    scan_segment,
    write_index,
)

SYNC_SECONDS = 1.0
SEGMENT_BYTES = 64 * MIB  # read in a fraction of a second when a log is opened


class RequestLog:
    """Finished requests by id, which is a SHA-256 in hex. One process at a time; payloads and ids stay on disk.

    num_dropped_bytes: cut off the end when opened. rebuilt: indexes that were missing or damaged and were made again.
    """

    def __init__(self, path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open the log in the folder `path`, or make it.

        segment_bytes: a segment that has grown to so many is full. Raises InputError naming the file and the byte at
        which it is damaged, or the segment that is missing.
        """
        self.path = path
        self.num_dropped_bytes = 0
        self.rebuilt: list[Path] = []
        self._segment_bytes = segment_bytes
        self._descriptor = -1
        self._fence = Fence(path.parent)
        self._fence.check()
        with explain_full_disk(path):
            path.mkdir(parents=True, exist_ok=True)
            self._sealed = self._open_sealed()
            self._open_active()
            if self._fence.token is not None:
                # An earlier generation may not know yet that it is one: what it still appends must not come between
                # the records of this one, so its segment is closed and this one has a segment of its own.
                self._seal()
        self._last_sync = time.monotonic()

    def __enter__(self) -> "RequestLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places) + sum(len(index) for index in self._sealed)

    def __contains__(self, request_id: str) -> bool:
        return self._find(_to_bytes(request_id)) is not None

    def ids(self) -> set[str]:
        """Ids of all finished requests."""
        sealed = (row.tobytes().hex() for index in self._sealed for row in index.ids)
        return {*sealed, *(id_bytes.hex() for id_bytes in self._places)}

    def get(self, request_id: str) -> dict | None:
        """What was appended under this id, or None. Raises InputError if the record is damaged on the disk."""
        id_bytes = _to_bytes(request_id)
        found = self._find(id_bytes)
        if found is None:
            return None
        number, offset, num_bytes = found
        if number == len(self._sealed):
            return msgspec.json.decode(read_payload(self._descriptor, self._active, id_bytes, offset, num_bytes))
        path = self._segment(number)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return msgspec.json.decode(read_payload(descriptor, path, id_bytes, offset, num_bytes))
        finally:
            os.close(descriptor)

    def append(self, request_id: str, value: dict) -> None:
        """Add a finished request. It survives the process at once, and the machine about a second later.

        Raises ValueError for an id that is there already or is no SHA-256 in hex, and InputError if the disk is full;
        the log then is as before the call. Raises Superseded if a newer generation owns the run; that is looked up
        before every new segment and twice a second, not for every record.
        """
        self._fence.check_throttled()
        id_bytes = _to_bytes(request_id)
        if len(id_bytes) != ID_BYTES:
            raise ValueError(f"request id {request_id!r} is not a SHA-256 in lower-case hex")
        if self._find(id_bytes) is not None:
            raise ValueError(f"request {request_id} is already in {self.path}")
        payload = msgspec.json.encode(value)
        record = pack_record(id_bytes, payload)
        with explain_full_disk(self.path):
            if self._size >= self._segment_bytes:
                self._seal()
            self._write(record)
            self._places[id_bytes] = (self._size, len(payload))
            self._size += len(record)
            if time.monotonic() - self._last_sync >= SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        """Put everything appended so far on the disk."""
        os.fsync(self._descriptor)
        self._last_sync = time.monotonic()

    def close(self) -> None:
        """Sync and close; closing twice is harmless."""
        if self._descriptor >= 0:
            with explain_full_disk(self.path):
                self.sync()
            os.close(self._descriptor)
            self._descriptor = -1

    # -- segments

    def _segment(self, number: int) -> Path:
        return self.path / f"{number:05d}.log"

    def _find(self, id_bytes: bytes) -> tuple[int, int, int] | None:
        """Number of the segment, offset of the record and length of its payload, or None; the newest segment first."""
        if place := self._places.get(id_bytes):
            return len(self._sealed), *place
        if not self._sealed:
            return None
        key = key_of(id_bytes)
        for number in range(len(self._sealed) - 1, -1, -1):
            if place := self._sealed[number].find(id_bytes, key):
                return number, *place
        return None

    def _open_sealed(self) -> list[SegmentIndex]:
        """Map the indexes of all full segments: those with an index, and all before the last."""
        numbers = sorted(int(path.stem) for path in self.path.glob("[0-9]*.log"))
        with_index = {int(path.stem) for path in self.path.glob("[0-9]*.index")}
        num_segments = max([*numbers, *with_index], default=-1) + 1
        for number in range(num_segments):
            if number >= len(numbers) or numbers[number] != number:
                path = self._segment(number)
                raise InputError(
                    f"{path}: missing, though it is a part of this log. Restore it; or put an empty file in its place "
                    f"with `touch {path}` and start again: only the requests it held are generated anew."
                )
        num_sealed = num_segments if num_segments - 1 in with_index else max(num_segments - 1, 0)
        return [self._open_index(number) for number in range(num_sealed)]

    def _open_index(self, number: int) -> SegmentIndex:
        """The index of a full segment, made again from the segment if it is missing or does not fit."""
        segment, path = self._segment(number), self.path / f"{number:05d}.index"
        index = open_index(path, segment.stat().st_size)
        if index is not None:
            return index
        write_index(path, scan_segment(segment, may_be_torn=False))
        self.rebuilt.append(path)
        return open_index(path, segment.stat().st_size)

    def _open_active(self) -> None:
        """Begin to write the segment after the full ones; what it holds already is read, and its torn end cut off."""
        path = self._segment(len(self._sealed))
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fsync_folder(self.path)
            records = scan_segment(path, may_be_torn=True)
            num_torn = os.fstat(descriptor).st_size - records.num_bytes
            if num_torn:
                os.ftruncate(descriptor, records.num_bytes)
                os.fsync(descriptor)
        except (OSError, InputError):
            os.close(descriptor)
            raise
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._active = descriptor, path
        self.num_dropped_bytes += num_torn
        self._size = records.num_bytes
        self._places = dict(zip(records.ids, zip(records.offsets, records.lengths, strict=True), strict=True))

    def _seal(self) -> None:
        """Put the full segment and its index on the disk, and begin the next. If that fails, nothing has changed."""
        self._fence.check()
        self.sync()
        number = len(self._sealed)
        path = self.path / f"{number:05d}.index"
        offsets, lengths = zip(*self._places.values(), strict=True) if self._places else ((), ())
        write_index(path, Records(list(self._places), offsets, lengths, self._size))
        self._sealed.append(open_index(path, self._size))
        try:
            self._open_active()
        except OSError:
            self._sealed.pop()
            raise

    def _write(self, record: bytes) -> None:
        """Write a whole record or nothing: a disk that fills up in the middle leaves no part of it."""
        try:
            num_written = os.write(self._descriptor, record)
            while num_written < len(record):
                num_written += os.write(self._descriptor, record[num_written:])
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise


def _to_bytes(request_id: str) -> bytes:
    """The 32 bytes of an id; no bytes, which no record has, for a text that is no SHA-256 in lower-case hex."""
    try:
        id_bytes = bytes.fromhex(request_id)
    except ValueError:
        return b""
    return id_bytes if len(id_bytes) == ID_BYTES and id_bytes.hex() == request_id else b""
