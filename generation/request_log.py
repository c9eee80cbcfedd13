"""The log of finished requests: append-only, checked, and the whole of how a run resumes.

A record is a header of 16 bytes (magic, payload length, payload CRC-32, CRC-32 of these three) and a JSON payload. One
write appends it. Opening reads every record: what a crash left half-written at the end is cut off, and a damaged byte
anywhere before the end is an error, because a log that cannot be trusted must not be built on.
"""

import json
import os
import struct
import time
import zlib
from pathlib import Path

from cluster.errors import InputError
from cluster.files import explain_full_disk, fsync_folder

MAGIC = b"TSRQ"
HEADER = struct.Struct("<4sIII")  # magic, payload bytes, payload CRC-32, CRC-32 of the first twelve bytes
SYNC_SECONDS = 1.0


class RequestLog:
    """Finished requests by id. One process at a time; the payloads stay on disk."""

    def __init__(self, path: Path) -> None:
        """Open or make the log. Raises InputError naming the byte at which it is damaged."""
        self.path = path
        self.num_dropped_bytes = 0  # cut off the end when opened
        self._places: dict[str, tuple[int, int]] = {}  # id -> offset and bytes of the payload
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = self._replay()
        fsync_folder(path.parent)
        self._last_sync = time.monotonic()

    def __enter__(self) -> "RequestLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._places

    def ids(self) -> set[str]:
        """Ids of all finished requests."""
        return set(self._places)

    def get(self, request_id: str) -> dict | None:
        """What was appended under this id, or None."""
        if request_id not in self._places:
            return None
        offset, num_bytes = self._places[request_id]
        return json.loads(os.pread(self._descriptor, num_bytes, offset))["value"]

    def append(self, request_id: str, value: dict) -> None:
        """Add a finished request. It survives the process at once, and the machine about a second later.

        Raises ValueError for an id that is there already, and InputError if the disk is full; the log then is as
        before the call.
        """
        if request_id in self._places:
            raise ValueError(f"request {request_id} is already in {self.path}")
        payload = json.dumps({"id": request_id, "value": value}, ensure_ascii=False, separators=(",", ":")).encode()
        record = pack_header(payload) + payload
        with explain_full_disk(self.path):
            self._write(record)
            self._places[request_id] = (self._size + HEADER.size, len(payload))
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

    def _write(self, record: bytes) -> None:
        """Write a whole record or nothing: a disk that fills up in the middle leaves no part of it."""
        try:
            num_written = os.write(self._descriptor, record)
            while num_written < len(record):
                num_written += os.write(self._descriptor, record[num_written:])
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise

    def _replay(self) -> int:
        """Index every record; returns where the good ones end, after cutting off what follows."""
        data = self.path.read_bytes()
        offset = 0
        while offset < len(data):
            payload = unpack_record(data, offset, self.path)
            if payload is None:
                self.num_dropped_bytes = len(data) - offset
                os.ftruncate(self._descriptor, offset)
                os.fsync(self._descriptor)
                break
            self._places[json.loads(payload)["id"]] = (offset + HEADER.size, len(payload))
            offset += HEADER.size + len(payload)
        return offset


def pack_header(payload: bytes) -> bytes:
    """The header of a record with this payload."""
    start = HEADER.pack(MAGIC, len(payload), zlib.crc32(payload), 0)[:12]
    return start + struct.pack("<I", zlib.crc32(start))


def unpack_record(data: bytes, offset: int, path: Path) -> bytes | None:
    """The payload of the record at `offset`, or None if it is the torn end of the log.

    Torn is: fewer bytes than the record needs, a last record whose payload does not match its CRC, or nothing but
    zeros up to the end (file systems leave those after a power cut). Anything else is damage and raises InputError.
    """
    header = data[offset : offset + HEADER.size]
    if len(header) < HEADER.size:
        return None
    magic, num_bytes, payload_crc, header_crc = HEADER.unpack(header)
    if magic != MAGIC or zlib.crc32(header[:12]) != header_crc:
        if not data[offset:].strip(b"\0"):
            return None
        raise _damaged(path, offset)
    end = offset + HEADER.size + num_bytes
    payload = data[offset + HEADER.size : end]
    if len(payload) == num_bytes and zlib.crc32(payload) == payload_crc:
        return payload
    if end >= len(data):
        return None
    raise _damaged(path, offset)


def _damaged(path: Path, offset: int) -> InputError:
    return InputError(
        f"{path}: damaged at byte {offset}: the record there does not match its checksum. Restore the file, or keep "
        f"what comes before with `truncate -s {offset} {path}` and start again: only the rest is generated anew."
    )
