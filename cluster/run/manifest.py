"""The manifest of a finished folder: written last, it names every file with its size and SHA-256.

A folder without a valid manifest is unfinished work, whatever else lies in it. Datasets and exports both use this.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.errors import InputError
from cluster.files import sha256_file, write_json

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


def hashes_of(files: Iterable[Path]) -> list[str]:
    """SHA-256 of files, several at a time: a file system of many disks reads faster than one core hashes."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(sha256_file, files))


def write_manifest(folder: Path, files: list[str], **fields: object) -> dict:
    """Seal `folder`: record bytes and SHA-256 of `files` (names relative to it) and `fields`, atomically."""
    hashes = hashes_of(folder / name for name in files)
    entries = [
        {"name": name, "bytes": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in zip(files, hashes, strict=True)
    ]
    manifest = {"schema_version": SCHEMA_VERSION, **fields, "files": entries}
    write_json(folder / MANIFEST, manifest)
    return manifest


def is_sealed(folder: Path) -> bool:
    """True if `folder` has a manifest. Says nothing about its files: `verify_manifest` does."""
    return (folder / MANIFEST).is_file()


def verify_manifest(folder: Path, below: str = "") -> dict:
    """Check every file of `folder` against its manifest and return it; with `below`, the files in that subfolder alone.

    Raises InputError naming the first file that is missing or differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no {MANIFEST}, so what lies there is unfinished. Run the stage that makes it.")
    try:
        manifest = json.loads(path.read_text())
        entries = [(entry["name"], entry["bytes"], entry["sha256"]) for entry in manifest["files"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest ({error}). Remove {folder} and run the stage again.") from error
    entries = [entry for entry in entries if Path(entry[0]).is_relative_to(below)]
    for name, _, _ in entries:
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: missing, though {path} lists it. Restore it, or remove {folder} and run again."
            )
    hashes = hashes_of(folder / name for name, _, _ in entries)
    for (name, num_bytes, sha256), found in zip(entries, hashes, strict=True):
        file = folder / name
        if file.stat().st_size != num_bytes or found != sha256:
            raise InputError(
                f"{file}: corrupt, its bytes differ from the SHA-256 in {path}. "
                f"Restore it, or remove {folder} and run the stage that makes it again."
            )
    return manifest
