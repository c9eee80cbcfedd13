"""The text of a file, decompressed and decoded, piece by piece.

for text in text_chunks(Path("my.jsonl.zst")): ...
"""

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from cluster.errors import InputError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# The first bytes of a file, not its name, say how it is opened: browsers decompress what they download.
OPENERS: dict[bytes, Callable[[Path], BinaryIO]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"),
}
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CHUNK_BYTES = 2**20


def named_type(file: Path) -> str:
    """The ending of a file's name, in lower case and without that of compression: `.jsonl` of `my.JSONL.gz`."""
    name = file.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def text_chunks(file: Path) -> Iterator[str]:
    """The text of a file in pieces of up to a million characters. UTF-8, or UTF-16 with a byte order mark.

    Raises InputError naming the line that is no text, or the file if its compression is damaged.
    """
    with open(file, "rb") as opened:
        magic = opened.read(8)
    opener = next((opener for beginning, opener in OPENERS.items() if magic.startswith(beginning)), None)
    line = 1
    try:
        with opener(file) if opener else open(file, "rb") as opened:
            data = opened.read(CHUNK_BYTES)
            encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
            decoder = codecs.getincrementaldecoder(encoding)()
            is_last = False
            while not is_last:
                is_last = not data
                text = decoder.decode(data, final=is_last)
                if (nul := text.find("\0")) >= 0:
                    line += text.count("\n", 0, nul)
                    raise InputError(f"{file}:{line}: a NUL byte: the file is damaged, or no text. Replace it.")
                if text:
                    yield text
                line += text.count("\n")
                data = opened.read(CHUNK_BYTES)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].decode(encoding, "replace").count("\n")
        reason = f"byte 0x{error.object[error.start]:02x}: {error.reason}"
        raise InputError(
            f"{file}:{line}: not {error.encoding.upper()} ({reason}). Save the file as UTF-8, or fix this line."
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if opener is None:
            raise
        raise InputError(f"{file}: the compressed file is cut off or damaged near line {line} ({error}).") from error
