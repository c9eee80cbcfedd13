"""Prints how many bytes an export took at most: `python -m tests.trainer.export_worker WARM_UP RUN MAX_SHARD_SIZE`.

Before it a small run is exported, for what the libraries load on use. Memory that the kernel can give back at any time,
such as that of mapped files, does not count.
"""

import sys
from pathlib import Path

from cluster.run.rundir import RunDir
from tests.benchmarks.peak import highest_bytes
from trainer import export
from trainer.config.export import ExportConfig
from trainer.job import read_job


def main() -> None:
    warm_up, run, size = sys.argv[1:]

    def export_all_of(run: str) -> None:
        job = read_job(Path(run))
        config = ExportConfig(max_shard_size=size)
        export.run(export.ExportJob(RunDir(Path(run)), "worker", job.model, job.config, config))

    export_all_of(warm_up)
    with highest_bytes() as highest:
        export_all_of(run)
    print(highest())


if __name__ == "__main__":
    main()
