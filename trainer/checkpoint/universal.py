"""A checkpoint in the form that any number of ranks can load: DeepSpeed's universal checkpoints.

checkpoints/universal_step_000200/      made when the number of ranks has changed, removed at the next save
    zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt
    manifest.json                       size and SHA-256 of all files, and of the manifest of the checkpoint itself

DeepSpeed's own converter does it, in a process of its own: it works with several forked processes, which a rank with
its threads and its GPU must not do.

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
from trainer.checkpoint.commit import CONVERTED, explain_failed_write, seal

# DeepSpeed refuses to convert ZeRO-1 and ZeRO-2 without this entry; it names layers split over tensor-parallel ranks.
log = stage_logger("train")
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
MAX_WORKERS = 4  # each holds the optimizer state of one rank in memory
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def universal_folder(folder: Path) -> Path:
    return folder.with_name(f"{CONVERTED}{folder.name}")


def convert(folder: Path) -> None:
    """Make the universal form of a checkpoint that was verified, unless it is there already. For one rank alone.

    Raises InputError if what is there is corrupt or the disk is full, TunesmithError if DeepSpeed's converter fails.
    """
    target, source = universal_folder(folder), sha256_file(folder / MANIFEST)
    if is_sealed(target) and verify_manifest(target)["source"] == source:
        return
    log.info(f"{folder}: made by another number of ranks, converting it for any number")
    # A folder of its own around it, because the converter leaves a pointer file beside its output.
    workshop = folder.with_name(f".converting_{folder.name}")
    shutil.rmtree(workshop, ignore_errors=True)
    workshop.mkdir()
    try:
        with explain_failed_write(folder.parent.parent):
            _run_converter(folder, workshop / target.name)
            seal(workshop / target.name, target, source=source)
    finally:
        shutil.rmtree(workshop)


def _run_converter(folder: Path, output: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "trainer.checkpoint.universal", str(folder), str(output)]
    answer = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if answer.returncode != 0:
        raise TunesmithError(
            f"{folder}: DeepSpeed could not make it loadable by another number of ranks. Start with the number that "
            f"made it, or remove it to go on from the one before. The converter ended with:\n{answer.stdout[-2000:]}"
        )


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m trainer.checkpoint.universal", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()

    from deepspeed.checkpoint import ds_to_universal

    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(arguments.folder), output_folder=str(arguments.output), num_extract_workers=workers,
            num_merge_workers=workers, keep_temp_folder=False, strict=True, inject_missing_state=False,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
