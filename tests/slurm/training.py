"""A chained training on the bed: two nodes, real torchrun and DeepSpeed, a tiny model and a few conversations."""

import json
import os
import shutil
import sys
from pathlib import Path

from cluster.files import sha256_file
from tests.slurm.bed import SlurmBed
from tests.slurm.chained import ChainedRun, write_recipe
from tests.slurm.machine import PROJECT

SCRIPT = PROJECT / "slurm" / "train.sbatch"
ENV = {"TUNESMITH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
NUM_STEPS = 100
WORDS = ("fig", "pear", "plum", "lime", "kiwi", "date", "sloe", "quince")


TRAIN = {
    "data": ["rows.jsonl"],  # relative: a job runs where it was submitted
    "zero_stage": 2, "precision": "fp32", "packing": False, "max_seq_len": 64, "micro_batch_size": 1,
    "global_batch_size": 4, "batch_unit": "rows", "process_group_timeout_seconds": 120,
}  # fmt: skip


def lay_out(folder: Path, model: Path) -> None:
    """Put the model and the conversations that TRAIN names into a folder."""
    shutil.copytree(model, folder / "model")
    turns = [[("user", f"Say {word}"), ("assistant", word)] for word in WORDS]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_training(bed: SlurmBed, model: Path, name: str, **slurm: object) -> ChainedRun:
    """A training of two ranks, not submitted yet; `slurm` goes into its recipe."""
    folder = bed.shared / name
    lay_out(folder, model)
    train = TRAIN | {"num_epochs": NUM_STEPS // 2, "checkpoint": {"every_steps": 10, "keep_last": 2}}
    write_recipe(folder, train=train, slurm=slurm)
    env = ENV | {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}
    return ChainedRun(bed, folder, SCRIPT, env, is_for_any_stage=False)


def weights(run: ChainedRun) -> dict[str, str]:
    """SHA-256 of the trained weights, by file."""
    folder = run.run / "checkpoints" / f"step_{NUM_STEPS:06d}" / "weights"
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
