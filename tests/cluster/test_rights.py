"""Files and folders of a run have the rights that the user's umask gives, so that a group can share a run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.files import append_jsonl, write_json
from cluster.run.fence import claim
from cluster.run.manifest import write_manifest
from launcher.slurm.snapshot import take_snapshot
from trainer.checkpoint.commit import move_files

SETGID = 0o2000


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder of a group, for a user whose umask is 002."""
    before = os.umask(0o002)
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(SETGID | 0o775)
    yield folder
    os.umask(before)


def test_all_that_a_run_leaves_belongs_to_the_group(shared: Path) -> None:
    append_jsonl(shared / "events.jsonl", {})
    write_json(shared / "plan.json", {})
    claim(shared, "train", "7")
    take_snapshot(shared / "code")
    local, weights = shared.parent / "local", {"weight": torch.zeros(2)}
    local.mkdir(mode=0o700)
    save_file(weights, local / "a.safetensors")
    move_files(local, shared / "checkpoint")
    save_file(weights, shared / "checkpoint" / "b.safetensors")  # which only its owner may read
    write_manifest(shared / "checkpoint", ["a.safetensors", "b.safetensors"])
    for path in shared.rglob("*"):
        assert oct(path.stat().st_mode & 0o7666) == oct(SETGID | 0o664 if path.is_dir() else 0o664), path
