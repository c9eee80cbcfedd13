"""Prints how many bytes an export took at most: `python -m tests.trainer.export_worker WARM_UP RUN MAX_SHARD_SIZE`.

Before it a small run is exported, for what the libraries load on use. Memory that the kernel can give back at any time,
such as that of mapped files, does not count.
"""

import re
import sys
import threading
from pathlib import Path

from cluster.rundir import RunDir
from trainer import export
from trainer.config import ExportConfig
from trainer.job import read_job


def anonymous_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    warm_up, run, size = sys.argv[1:]

    def export_all_of(run: str) -> None:
        job = read_job(Path(run))
        config = ExportConfig(max_shard_size=size)
        export.run(export.ExportJob(RunDir(Path(run)), "worker", job.model, job.config, config))

    export_all_of(warm_up)
    before, highest, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    export_all_of(run)
    done.set()
    watcher.join()
    print(highest - before)


if __name__ == "__main__":
    main()
