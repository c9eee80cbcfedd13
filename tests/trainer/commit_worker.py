"""Commits checkpoints of two ranks by way of a local disk until it is killed: `python -m ... RUN LOCAL STEP`."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.checkpoint.commit import commit_checkpoint, move_files, partial_folder, remove_unfinished
from trainer.config.train import CheckpointConfig

CONFIG = CheckpointConfig(keep_last=2)


def main() -> None:
    checkpoints, local = Path(sys.argv[1]), Path(sys.argv[2])
    step = int(sys.argv[3])
    thread = ThreadPoolExecutor(max_workers=1)
    while True:
        step += 1
        partial = partial_folder(checkpoints, step)
        remove_unfinished(checkpoints)
        partial.mkdir(parents=True)
        for rank in range(2):
            place = local / f"rank-{rank}" / partial.name
            (place / "weights").mkdir(parents=True, exist_ok=True)
            (place / f"part-{rank}").write_bytes(bytes([step % 256]) * 300_000)
            (place / "weights" / f"w-{rank}").write_bytes(bytes([rank]) * step)
            thread.submit(move_files, place, partial)
        thread.submit(commit_checkpoint, checkpoints, step, CONFIG).result()
        print(step, flush=True)


if __name__ == "__main__":
    main()
