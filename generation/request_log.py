"""The log of finished requests: append-only, checked, and how a run resumes without generating anything twice.

requests/00000.log, 00001.log, ...   segments: records in the order they were appended; the last is being written

A record is a header of 48 bytes (magic, id, payload length, payload CRC-32, CRC-32 of these) and a JSON payload. All
numbers are little-endian. One write appends a record.

Opening reads every record and checks it. A record that a crash left half-written at the end of the last segment is cut
off. Any other damaged byte is an error, because a log that cannot be trusted must not be built on.

There is no index beside the segments. A million requests (1 GB) open in 2.2 s and take 162 MiB of memory; an index that
was mapped from files opened them in 0.4 s, at the price of a second file format that has to agree with the first. It
would save two seconds of a restart that starts engines for longer. `tests/benchmarks/storage.py` measures it.
"""

import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cluster.errors import InputError
from cluster.files import MIB, explain_full_disk, fsync_folder
from cluster.run.fence import Fence

SYNC_SECONDS = 1.0
SEGMENT_BYTES = 64 * MIB  # a damaged byte costs at most so much, and opening holds one segment in memory
MAX_SEGMENT_BYTES = 2**40  # a place is one integer, segment number * this + offset: it takes less than a pair
ID_BYTES = 32  # SHA-256
MAGIC = b"TSRQ"
HEADER = struct.Struct("<4s32sIII")  # magic, id, payload bytes, payload CRC-32, CRC-32 of the bytes before it
_NUM_CHECKED = HEADER.size - 4


class RequestLog:
    """Finished requests by id, which is a SHA-256 in hex. One process at a time; payloads stay on disk.

    num_dropped_bytes: length of the half-written record that opening cut off, 0 if there was none.
    """

    def __init__(self, path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open the log in the folder `path`, or make it.

        segment_bytes: a segment of this size is full. Raises InputError naming the file and the byte at which it is
        damaged, or the segment that is missing.
        """
        self.path = path
        self._segment_bytes = segment_bytes
        self._places: dict[bytes, int] = {}  # id -> where its record begins; if an id is twice there, the newer one
        self._descriptor = -1
        self._fence = Fence(path.parent)
        self._fence.check()
        with explain_full_disk(path):
            path.mkdir(parents=True, exist_ok=True)
            self._number = self._last_segment()  # of the segment being written
            for number in range(self._number):
                self._scan(number, may_be_torn=False)
            self._size = self._scan(self._number, may_be_torn=True)
            self.num_dropped_bytes = self._open_segment(self._number, self._size)
            if self._fence.token is not None:
                # An earlier attempt may not know yet that it is superseded. What it still appends must not come between
                # the records of this one, so this one writes a segment of its own.
                self._start_segment()
        self._last_sync = time.monotonic()

    def __enter__(self) -> "RequestLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request_id: str) -> bool:
        return _to_bytes(request_id) in self._places

    def ids(self) -> set[str]:
        """Ids of all finished requests."""
        return {id_bytes.hex() for id_bytes in self._places}

    def get(self, request_id: str) -> dict | None:
        """What was appended under this id. Raises InputError if the record has been damaged since the log was opened.

        None means that nothing was.
        """
        id_bytes = _to_bytes(request_id)
        place = self._places.get(id_bytes)
        if place is None:
            return None
        number, offset = divmod(place, MAX_SEGMENT_BYTES)
        with open(self._segment(number), "rb") as file:
            file.seek(offset)
            header = file.read(HEADER.size)
            payload = file.read(HEADER.unpack(header)[2]) if len(header) == HEADER.size else b""
        if header + payload != pack_record(id_bytes, payload):
            raise _damaged(self._segment(number), offset)
        return msgspec.json.decode(payload)

    def append(self, request_id: str, value: dict) -> None:
        """Add a finished request. It survives the process at once, and the machine about a second later.

        Raises ValueError for an id that is there already or is no SHA-256 in hex, and InputError if the disk is full;
        the log then is as before the call. Raises Superseded if a newer attempt owns the run; that is checked before
        every new segment and twice a second, not for every record.
        """
        self._fence.check_throttled()
        id_bytes = _to_bytes(request_id)
        if len(id_bytes) != ID_BYTES:
            raise ValueError(f"request id {request_id!r} is not a SHA-256 in lower-case hex")
        if id_bytes in self._places:
            raise ValueError(f"request {request_id} is already in {self.path}")
        record = pack_record(id_bytes, msgspec.json.encode(value))
        with explain_full_disk(self.path):
            if self._size >= self._segment_bytes:
                self._start_segment()
            self._write(record)
            self._places[id_bytes] = self._number * MAX_SEGMENT_BYTES + self._size
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

    def _last_segment(self) -> int:
        """Number of the last segment, 0 if there is none. Raises InputError if one before it is missing."""
        numbers = sorted(int(path.stem) for path in self.path.glob("[0-9]*.log")) or [0]
        if missing := sorted(set(range(numbers[-1])).difference(numbers)):
            path = self._segment(missing[0])
            raise InputError(
                f"{path}: missing, though it is a part of this log. Restore it; or put an empty file in its place "
                f"with `touch {path}` and start again: only the requests it held are generated again."
            )
        return numbers[-1]

    def _scan(self, number: int, may_be_torn: bool) -> int:
        """Note where the records of a segment are. Returns their length in bytes."""
        size = 0
        if self._segment(number).is_file():
            for id_bytes, offset, end in scan_segment(self._segment(number), may_be_torn):
                self._places[id_bytes] = number * MAX_SEGMENT_BYTES + offset
                size = end
        return size

    def _open_segment(self, number: int, size: int) -> int:
        """Open a segment to append to it, and cut it to `size` bytes. Returns the number of bytes cut off."""
        descriptor = os.open(self._segment(number), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fsync_folder(self.path)
            num_torn = os.fstat(descriptor).st_size - size
            if num_torn:
                os.ftruncate(descriptor, size)
                os.fsync(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._number, self._size = descriptor, number, size
        return num_torn

    def _start_segment(self) -> None:
        """Put the segment being written on the disk, and start the next. If that fails, nothing has changed."""
        self._fence.check()
        self.sync()
        self._open_segment(self._number + 1, 0)

    def _write(self, record: bytes) -> None:
        """Write a whole record or nothing: a disk that fills up in the middle leaves no part of it."""
        try:
            num_written = os.write(self._descriptor, record)
            while num_written < len(record):
                num_written += os.write(self._descriptor, record[num_written:])
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise


def pack_record(id_bytes: bytes, payload: bytes) -> bytes:
    """A whole record."""
    start = HEADER.pack(MAGIC, id_bytes, len(payload), zlib.crc32(payload), 0)[:_NUM_CHECKED]
    return b"".join((start, struct.pack("<I", zlib.crc32(start)), payload))


def scan_segment(path: Path, may_be_torn: bool) -> Iterator[tuple[bytes, int, int]]:
    """Id, first byte and end of every record of a segment, checked.

    Only the segment that is being written may end in a torn record: fewer bytes than the record needs, a last record
    whose payload does not match its CRC, or nothing but zeros up to the end (file systems leave those after a power
    cut). The torn record is left out. Anything else that does not match its checksum is damage and raises InputError
    naming the byte.
    """
    data = memoryview(path.read_bytes())
    crc32, unpack = zlib.crc32, HEADER.unpack_from
    offset, size = 0, len(data)
    while offset + HEADER.size <= size:
        magic, id_bytes, num_bytes, payload_crc, header_crc = unpack(data, offset)
        if crc32(data[offset : offset + _NUM_CHECKED]) != header_crc or magic != MAGIC:
            if may_be_torn and not bytes(data[offset:]).strip(b"\0"):
                return
            raise _damaged(path, offset)
        start = offset + HEADER.size
        end = start + num_bytes
        if end > size or crc32(data[start:end]) != payload_crc:
            if may_be_torn and end >= size:
                return
            raise _damaged(path, offset)
        yield id_bytes, offset, end
        offset = end
    if offset < size and not may_be_torn:
        raise _damaged(path, offset)


def _damaged(path: Path, offset: int) -> InputError:
    return InputError(
        f"{path}: damaged at byte {offset}: the record there does not match its checksum. Restore the file, or keep "
        f"what comes before with `truncate -s {offset} {path}` and start again: only the rest is generated again."
    )


def _to_bytes(request_id: str) -> bytes:
    """The 32 bytes of an id; no bytes, which no record has, for a text that is no SHA-256 in lower-case hex."""
    try:
        id_bytes = bytes.fromhex(request_id)
    except ValueError:
        return b""
    return id_bytes if len(id_bytes) == ID_BYTES and id_bytes.hex() == request_id else b""
