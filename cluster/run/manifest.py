"""The manifest of a finished folder: every file with its size and SHA-256.

It is written last, so a folder without a valid manifest is unfinished. Datasets, checkpoints and exports have one.
"""

import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.errors import InputError
from cluster.files import sha256_file, write_json

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


def sha256_files(files: Iterable[Path]) -> list[str]:
    """SHA-256 of files, several at a time: a parallel file system reads faster than one core hashes."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(sha256_file, files))


def share_as_umask_says(files: Iterable[Path]) -> None:
    """Give files the rights of new files: safetensors makes files that only their owner may read."""
    [umask] = re.findall(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    for file in files:
        mode = file.stat().st_mode
        if (wanted := mode | (0o666 & ~int(umask, 8))) != mode:
            file.chmod(wanted)


def write_manifest(folder: Path, files: list[str], **fields: object) -> dict:
    """Seal `folder`: write bytes and SHA-256 of `files` (names relative to it) and `fields`, atomically."""
    share_as_umask_says(folder / name for name in files)
    hashes = sha256_files(folder / name for name in files)
    entries = [
        {"name": name, "bytes": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in zip(files, hashes, strict=True)
    ]
    manifest = {"schema_version": SCHEMA_VERSION, **fields, "files": entries}
    write_json(folder / MANIFEST, manifest)
    return manifest


def is_sealed(folder: Path) -> bool:
    """Whether `folder` has a manifest. `verify_manifest` checks its files as well."""
    return (folder / MANIFEST).is_file()


def verify_manifest(folder: Path, below: str = "") -> dict:
    """Check every file of `folder` against its manifest and return the manifest. `below` limits it to a subfolder.

    Raises InputError naming the first file that is missing or differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder}: no {MANIFEST}, so the folder is unfinished. Run the stage that makes it again: synthesize for "
            "a dataset, train for a checkpoint, export for a model."
        )
    try:
        manifest = json.loads(path.read_text())
        entries = [(entry["name"], entry["bytes"], entry["sha256"]) for entry in manifest["files"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest ({error}). Remove {folder} and run the stage again.") from error
    entries = [entry for entry in entries if Path(entry[0]).is_relative_to(below)]
    for name, _, _ in entries:
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: missing, but {path} lists it. Restore it, or remove {folder} and run again."
            )
    hashes = sha256_files(folder / name for name, _, _ in entries)
    for (name, num_bytes, sha256), found in zip(entries, hashes, strict=True):
        file = folder / name
        if file.stat().st_size != num_bytes or found != sha256:
            raise InputError(
                f"{file}: corrupt, its bytes differ from the SHA-256 in {path}. "
                f"Restore it, or remove {folder} and run the stage that makes it again."
            )
    return manifest
