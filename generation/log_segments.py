"""The files of the request log: records in segments, and the index of a segment that is full.

A segment is records one after another. A record is a header of 48 bytes (magic, id, payload length, payload CRC-32,
CRC-32 of these) and a JSON payload. An index is a header of 32 bytes (magic, number of records, bytes of the segment
it speaks of, CRC-32 of the columns, CRC-32 of the header) and three columns, in the order of the ids: ids of 32 bytes,
offsets of the records in the segment (uint64), payload lengths (uint32). All numbers are little-endian.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import InputError
from cluster.files import write_atomic

ID_BYTES = 32  # SHA-256
MAGIC = b"TSRQ"
HEADER = struct.Struct("<4s32sIII")  # magic, id, payload bytes, payload CRC-32, CRC-32 of the bytes before it
INDEX_MAGIC = b"TSIX"
INDEX_HEADER = struct.Struct("<4sQQI4xI")  # magic, records, segment bytes, CRC-32 of the columns, and of the header
_CHECKED = HEADER.size - 4
_INDEX_CHECKED = INDEX_HEADER.size - 4


def pack_record(id_bytes: bytes, payload: bytes) -> bytes:
    """A whole record."""
    start = HEADER.pack(MAGIC, id_bytes, len(payload), zlib.crc32(payload), 0)[:_CHECKED]
    return b"".join((start, struct.pack("<I", zlib.crc32(start)), payload))


def read_payload(descriptor: int, path: Path, id_bytes: bytes, offset: int, num_bytes: int) -> bytes:
    """The payload of the record of this id at `offset`. Raises InputError if that is not what lies there."""
    record = os.pread(descriptor, HEADER.size + num_bytes, offset)
    payload = record[HEADER.size :]
    if record != pack_record(id_bytes, payload) or len(payload) != num_bytes:
        raise damaged(path, offset)
    return payload


def damaged(path: Path, offset: int) -> InputError:
    return InputError(
        f"{path}: damaged at byte {offset}: the record there does not match its checksum. Restore the file, or keep "
        f"what comes before with `truncate -s {offset} {path}` and start again: only the rest is generated anew."
    )


@dataclass(frozen=True, slots=True)
class Records:
    """Where the records of a segment lie, in the order of the file."""

    ids: list[bytes]
    offsets: list[int]
    lengths: list[int]  # of the payloads
    num_bytes: int  # of the whole records; what follows is a torn end


def scan_segment(path: Path, may_be_torn: bool) -> Records:
    """Read and check every record of a segment.

    Only the segment that is being written may end in a torn record: fewer bytes than the record needs, a last record
    whose payload does not match its CRC, or nothing but zeros up to the end (file systems leave those after a power
    cut). Anything else that does not match its checksum is damage and raises InputError naming the byte.
    """
    data = memoryview(path.read_bytes())
    crc32, unpack = zlib.crc32, HEADER.unpack_from
    ids, offsets, lengths = [], [], []
    offset, size = 0, len(data)
    while offset + HEADER.size <= size:
        magic, id_bytes, num_bytes, payload_crc, header_crc = unpack(data, offset)
        if crc32(data[offset : offset + _CHECKED]) != header_crc or magic != MAGIC:
            if may_be_torn and not bytes(data[offset:]).strip(b"\0"):
                break
            raise damaged(path, offset)
        start = offset + HEADER.size
        end = start + num_bytes
        if end > size or crc32(data[start:end]) != payload_crc:
            if may_be_torn and end >= size:
                break
            raise damaged(path, offset)
        ids.append(id_bytes)
        offsets.append(offset)
        lengths.append(num_bytes)
        offset = end
    if offset < size and not may_be_torn:
        raise damaged(path, offset)
    return Records(ids, offsets, lengths, offset)


class SegmentIndex:
    """The index of a full segment, mapped from its file. In memory are eight bytes for each record."""

    def __init__(self, columns: np.ndarray, num_records: int) -> None:
        ids, offsets, lengths = np.split(columns, [num_records * ID_BYTES, num_records * (ID_BYTES + 8)])
        self.ids = ids.reshape(num_records, ID_BYTES)  # [N, 32] uint8, sorted
        self._offsets = offsets.view("<u8")  # [N]
        self._lengths = lengths.view("<u4")  # [N]
        # The first eight bytes of each id as a number: sorted like the ids, and searched without touching the file.
        self._keys = self.ids.view(">u8")[:, 0].astype(np.uint64) if num_records else np.zeros(0, np.uint64)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, id_bytes: bytes, key: np.uint64) -> tuple[int, int] | None:
        """Offset of the record and length of its payload, or None. key: the first eight bytes of the id."""
        place = int(self._keys.searchsorted(key))
        while place < len(self._keys) and self._keys[place] == key:
            if self.ids[place].tobytes() == id_bytes:
                return int(self._offsets[place]), int(self._lengths[place])
            place += 1
        return None


def key_of(id_bytes: bytes) -> np.uint64:
    """What `SegmentIndex.find` searches for."""
    return np.uint64(int.from_bytes(id_bytes[:8], "big"))


def write_index(path: Path, records: Records) -> None:
    """Write the index of a segment that holds these records, atomically."""
    ids = np.frombuffer(b"".join(records.ids), np.uint8).reshape(-1, ID_BYTES)
    order = np.argsort(ids.reshape(-1).view(f"S{ID_BYTES}"), kind="stable") if len(ids) else np.zeros(0, int)
    columns = b"".join(
        (
            ids[order].tobytes(),
            np.asarray(records.offsets, "<u8")[order].tobytes(),
            np.asarray(records.lengths, "<u4")[order].tobytes(),
        )
    )
    start = INDEX_HEADER.pack(INDEX_MAGIC, len(ids), records.num_bytes, zlib.crc32(columns), 0)[:_INDEX_CHECKED]
    write_atomic(path, start + struct.pack("<I", zlib.crc32(start)) + columns)


def open_index(path: Path, segment_bytes: int) -> SegmentIndex | None:
    """The index at `path`; None if it is missing, damaged, or of a segment of another size."""
    if not path.is_file() or path.stat().st_size < INDEX_HEADER.size:
        return None
    data = np.memmap(path, np.uint8, mode="r")
    header, columns = data[: INDEX_HEADER.size].tobytes(), data[INDEX_HEADER.size :]
    magic, num_records, num_bytes, columns_crc, header_crc = INDEX_HEADER.unpack(header)
    is_sound = magic == INDEX_MAGIC and zlib.crc32(header[:_INDEX_CHECKED]) == header_crc
    if not is_sound or num_bytes != segment_bytes or len(columns) != num_records * (ID_BYTES + 8 + 4):
        return None
    if zlib.crc32(columns) != columns_crc:
        return None
    return SegmentIndex(columns, num_records)
