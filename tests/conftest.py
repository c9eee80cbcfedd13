"""Fixtures shared by the packages' tests: one Ray for all that need it, a tiny random Llama, and a small disk."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """One private Ray for the whole test session."""
    from cluster.ray_cluster import ray_session

    with ray_session(tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random Llama of two layers and a byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [
        "Come up with a series of tasks:",
        "1. List five things that float on water.",
        "Is it classification? Yes",
        "Task: Sort the words by length.\nExample 1\nInput: pear fig\nOutput: fig pear",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
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
