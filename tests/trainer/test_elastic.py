"""Training resumes with another number of ranks, and ends where it would have ended without the change.

This process, one rank, trains every job to its end as the reference. GROWING jobs start here, resume with two ranks and
end with three. SHRINKING jobs start with two ranks and end here.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cluster.errors import InputError
from tests.trainer.elastic_worker import StopAfter
from tests.trainer.tools import (
    DEADLINE_SECONDS,
    chat_documents,
    chosen,
    names_of,
    trace,
    train_here,
    weights,
    write_chats,
    write_job,
)
from trainer.checkpoint.commit import CONVERTED
from trainer.checkpoint.state import complete_checkpoints, newest_checkpoint, read_state
from trainer.checkpoint.universal import convert, universal_folder
from trainer.job import read_job
from trainer.train import train

MOVED_AFTER = 2  # steps
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative; sums in another order, and in bf16 with rounded weights
# Decay on matrices alone shows settings that went to the wrong group. A large epsilon keeps AdamW from turning rounding
# noise of near-zero gradients into whole steps. Twelve rows a step divide among 1, 2 and 3 ranks.
COMMON = {
    "adam_epsilon": 1e-3, "learning_rate": 1e-2, "weight_decay": 0.3, "warmup_ratio": 0.0, "max_grad_norm": 0.5,
    "micro_batch_size": 2, "global_batch_size": 12, "num_epochs": 2, "max_seq_len": 128,
}  # fmt: skip
ADAPTER = {"tuning": "lora", "lora": {"rank": 4, "alpha": 16}}
GROWING = {"zero0": {"zero_stage": 0}, "zero1": {"zero_stage": 1}, "zero3": {"zero_stage": 3}}
SHRINKING = {
    "zero2": {"zero_stage": 2}, "lora-zero2": {"zero_stage": 2, **ADAPTER}, "lora-zero3": {"zero_stage": 3, **ADAPTER},
    "bf16-zero1": {"zero_stage": 1, "precision": "bf16"},
}  # fmt: skip
JOBS = GROWING | SHRINKING
LONG = ("zero0", "lora-zero2", "lora-zero3", "bf16-zero1")


def torchrun(num_ranks: int, runs: dict[Path, int], log: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += ["-m", "tests.trainer.elastic_worker", *(str(argument) for pair in runs.items() for argument in pair)]
    with open(log, "w") as output:
        code = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT,
            timeout=DEADLINE_SECONDS,
        ).returncode  # fmt: skip
    assert code == 0, log.read_text()[-6000:]
    return log.read_text()


def convert_all(root: Path, names: Iterable[str]) -> None:
    """Convert two at a time, because each conversion runs in its own process."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(convert, [newest_checkpoint(root / name / "moved" / "checkpoints") for name in names]))


@pytest.fixture(scope="module")
def root(request, tmp_path_factory, one_rank, chat_model: Path) -> Path:
    """Run folders `<job>/whole` and `<job>/moved`, the output in `<number of ranks>.txt`, and `kept`.

    `kept` has checkpoints of two ranks, of which one is converted.
    """
    root = tmp_path_factory.mktemp("elastic")
    data = write_chats(root / "chats.jsonl", chat_documents(60))
    jobs = chosen(request, JOBS, LONG)
    growing, shrinking = ([name for name in jobs if name in kind] for kind in (GROWING, SHRINKING))
    for name, settings in jobs.items():
        for run in ("whole", "moved"):
            write_job(root / name / run, chat_model, data, **COMMON | settings)
        train_here(root / name / "whole")
    for name in growing:
        train(read_job(root / name / "moved"), StopAfter(MOVED_AFTER))
    convert_all(root, ["zero1"])
    torchrun(2, {root / name / "moved": MOVED_AFTER for name in jobs}, root / "2.txt")
    convert_all(root, ["zero1", "zero3", *shrinking])
    shutil.copytree(root / "zero3" / "moved" / "checkpoints", root / "kept")
    torchrun(3, {root / name / "moved": 0 for name in growing}, root / "3.txt")
    for name in shrinking:
        train_here(root / name / "moved")
    return root


@pytest.mark.parametrize("name", names_of(JOBS, LONG))
def test_another_number_of_ranks_ends_with_the_same_figures(root: Path, name: str) -> None:
    tolerance = TOLERANCE["bf16" if name.startswith("bf16") else "fp32"]
    expected, found = trace(root / name / "whole"), trace(root / name / "moved")
    assert found.keys() == expected.keys()
    for step, figures in expected.items():
        assert found[step] == pytest.approx(figures, rel=tolerance), f"loss and gradient norm of step {step}"
    wanted, got = weights(root / name / "whole"), weights(root / name / "moved")
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        error = (got[key].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-9)
        assert error < tolerance, key


def test_the_number_of_ranks_changed(root: Path) -> None:
    end = len(trace(root / "zero3" / "whole"))
    for name, expected in {"zero3": [(2, 2 * MOVED_AFTER), (3, end)], "zero2": [(2, MOVED_AFTER), (1, end)]}.items():
        states = [read_state(folder) for folder in complete_checkpoints(root / name / "moved" / "checkpoints")]
        assert [(state.world_size, state.step) for state in states] == expected


def test_a_checkpoint_is_converted_once_and_the_next_save_removes_the_converted_form(root: Path) -> None:
    assert (root / "2.txt").read_text().count("converting it") == 1, "of zero3 alone; zero1 has it already"
    assert "converting it" not in (root / "3.txt").read_text()
    assert len(list((root / "kept").glob(f"{CONVERTED}*"))) == 1
    jobs = [folder for folder in root.iterdir() if (folder / "moved").is_dir()]
    assert len(jobs) >= 3
    for job in jobs:
        folders = [path for path in (job / "moved" / "checkpoints").iterdir() if path.is_dir()]
        assert {path.name.split("_")[0] for path in folders} == {"step"}


def test_every_file_of_the_converted_form_is_checked(root: Path) -> None:
    folder = newest_checkpoint(root / "kept")
    other = universal_folder(folder)
    files = [path for path in other.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{file}: corrupt"):
            convert(folder)
        file.unlink()
        with pytest.raises(InputError, match=f"{file}: missing"):
            convert(folder)
        file.write_bytes(content)
    convert(folder)


@pytest.mark.parametrize("name", names_of(["lora-zero2", "lora-zero3"], LONG))
def test_a_checkpoint_of_an_adapter_has_nothing_of_the_base(root: Path, name: str) -> None:
    folder = newest_checkpoint(root / name / "whole" / "checkpoints")
    loaded = [torch.load(file, weights_only=False) for file in folder.glob("*model_states.pt")]
    names = {name for states in loaded for name in states["module"]}
    assert names
    assert all("lora_" in name for name in names)
