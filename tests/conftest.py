"""Fixtures shared by the packages' tests: one Ray for all that need it, a tiny random Llama, and a small disk."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from english.model import cached_model
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """One private Ray for the whole test session."""
    from cluster.ray.cluster import ray_session

    with ray_session(tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random Llama of two layers and a byte-level BPE tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def english_model() -> Path:
    """A real model, from the user's cache: `make english-model` puts it there. Without it, tests fail in CI."""
    folder = cached_model()
    if folder is None:
        missing = "the English model is not in the cache: `make english-model`"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return folder


@dataclass(frozen=True)
class SmallDisk:
    """A file system of a few MiB at `path`."""

    path: Path

    def resize(self, num_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(self.path)], check=True)

    def fill(self, leave_bytes: int) -> None:
        """Take up all space but so many bytes."""
        state = os.statvfs(self.path)
        with open(self.path / "ballast", "wb") as file:
            file.write(b"\0" * (state.f_bavail * state.f_frsize - leave_bytes))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system of its own")
    path = tmp_path / "small-disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine does not let us mount a file system: {mounted.stderr.strip()}")
    yield SmallDisk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def pytest_terminal_summary(terminalreporter) -> None:
    """Above the closing line: what to type next."""
    terminalreporter.write_line("Next: `make demo` goes the whole way, `.venv/bin/tunesmith --help` lists all.")


# Which tests share what is dear to make, and so run in one process, one after the other: whole folders, and all files
# of the trainer whose tests are a rank themselves, as a process can be one only once. Every other file is on its own.
TOGETHER = ("end_to_end", "slurm")
SHARED = "one_rank"
FIRST = ("end_to_end", "slurm", "trainer")  # the longest, so that the processes end at about the same time


@pytest.hookimpl(wrapper=True)  # around the others: pytest-xdist reads the marks in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Say to pytest-xdist what belongs together, and put the longest first."""

    def folder(item: pytest.Item) -> str:
        return item.path.parent.name

    sharing = {item.path for item in items if SHARED in getattr(item, "fixturenames", ())}
    for item in items:
        name = SHARED if item.path in sharing else item.path.stem
        item.add_marker(pytest.mark.xdist_group(folder(item) if folder(item) in TOGETHER else name))
    items.sort(key=lambda item: FIRST.index(folder(item)) if folder(item) in FIRST else len(FIRST))
    return (yield)
