"""A checkpoint in the form that any number of ranks can load: DeepSpeed's universal checkpoints.

checkpoints/universal_step_000200/      written if the number of ranks has changed, removed at the next save
    zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt
    manifest.json                       size and SHA-256 of all files, and the hash of the original's manifest

DeepSpeed's converter runs in a separate process, because it forks workers: a rank with threads and a GPU must not fork.

    python -m trainer.checkpoint.universal CHECKPOINT OUTPUT
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cluster.errors import TunesmithError
from cluster.files import sha256_file
from cluster.log import stage_logger
from cluster.processes.descendants import die_with_parent
from cluster.run.manifest import MANIFEST, is_sealed, verify_manifest
from trainer.checkpoint.commit import CONVERTED, commit_folder, explain_failed_write

log = stage_logger("train")
# DeepSpeed refuses to convert ZeRO-1 and ZeRO-2 without this entry, which names layers that tensor parallelism splits.
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
MAX_WORKERS = 4  # each holds the optimizer state of one rank in memory
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def universal_folder(folder: Path) -> Path:
    return folder.with_name(f"{CONVERTED}{folder.name}")


def convert(folder: Path) -> None:
    """Write the universal form of a verified checkpoint, unless it exists. Only one rank may call this.

    Raises InputError if an existing form is corrupt or the disk is full, TunesmithError if DeepSpeed's converter fails.
    """
    target, source = universal_folder(folder), sha256_file(folder / MANIFEST)
    if is_sealed(target) and verify_manifest(target)["source"] == source:
        return
    log.info(f"{folder}: saved by another number of ranks; converting it to the form that any number can load")
    # In a separate folder, because the converter also writes a pointer file next to its output.
    workdir = folder.with_name(f".converting_{folder.name}")
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir()
    try:
        with explain_failed_write(folder.parent.parent):
            _run_converter(folder, workdir / target.name)
            commit_folder(workdir / target.name, target, source=source)
    finally:
        shutil.rmtree(workdir)


def _run_converter(folder: Path, output: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "trainer.checkpoint.universal", str(folder), str(output)]
    process = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode != 0:
        raise TunesmithError(
            f"{folder}: DeepSpeed could not convert this checkpoint for another number of ranks. Start with the number "
            f"that saved it, or remove it to resume from the previous one. The converter ended with:\n"
            f"{process.stdout[-2000:]}"
        )


def main() -> None:
    die_with_parent()
    from deepspeed.checkpoint import ds_to_universal

    folder, output = sys.argv[1:]
    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=folder, output_folder=output, num_extract_workers=workers,
            num_merge_workers=workers, keep_temp_folder=False, strict=True, inject_missing_state=False,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
