"""What the storage of a synthesis costs at a million rows: `python -m tests.benchmarks.storage`.

A log is opened in a new process each time, and its files are in the page cache.
"""

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from cluster.run.rundir import RunDir
from generation.dataset_writer import DatasetWriter
from generation.filters.drafts import Instance
from generation.records import SCHEMA, Origin, Record, human_record
from generation.request_log import RequestLog
from generation.sink import DataSink

ROOT = Path(__file__).parents[2]
ROWS_PER_SHARD = 10_000
WORDS = [f"{a}{b}" for a in ("ri", "mo", "ta", "lu", "se") for b in ("ver", "ral", "ken", "dan", "mit", "por")]


def text(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


def answers(count: int) -> Iterator[tuple[str, dict]]:
    """Ids and completions: 60 words of text, 80 token ids."""
    draw = random.Random(0)
    bodies = [
        {
            "text": text(draw, 60),
            "finish_reason": "stop",
            "num_tokens": 80,
            "token_ids": draw.choices(range(50_000), k=80),
        }
        for _ in range(100)
    ]
    for number in range(count):
        request_id = hashlib.sha256(str(number).encode()).hexdigest()
        sample = {**bodies[number % 100], "finish_reason": "stop", "num_tokens": 80}
        yield request_id, {"request_id": request_id, "samples": [sample], "num_prompt_tokens": 300}


def records(count: int) -> list[Record]:
    draw = random.Random(0)
    instances = [(text(draw, 15), Instance(text(draw, 20), text(draw, 60))) for _ in range(100)]
    return [
        human_record(Origin("seed", f"task-{n}", seed_ids=(f"task-{n}",), license="CC0-1.0"), *instances[n % 100], n)
        for n in range(count)
    ]


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def fill_log(path: Path, count: int) -> float:
    """Seconds to append; the making of the answers does not count."""
    seconds, batch = 0.0, []
    with RequestLog(path) as log:
        for answer in answers(count):
            batch.append(answer)
            if len(batch) == 10_000:
                seconds += timed(lambda: [log.append(*each) for each in batch])
                batch.clear()
        seconds += timed(lambda: [log.append(*each) for each in batch])
    return seconds


def open_log(path: Path) -> tuple[float, float]:
    """Seconds to open a log, and MiB of memory that it then takes."""
    process = psutil.Process()
    before = process.memory_info().rss
    started = time.perf_counter()
    with RequestLog(path):
        seconds = time.perf_counter() - started
        return seconds, (process.memory_info().rss - before) / 2**20


def open_in_own_process(path: Path) -> tuple[float, float]:
    command = [sys.executable, "-m", "tests.benchmarks.storage", "--open", str(path)]
    return tuple(json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))


def write_shards(folder: Path, rows: list[dict]) -> None:
    writer = DatasetWriter(folder, SCHEMA, ROWS_PER_SHARD)
    for row in rows:
        writer.add(row)
    writer.seal()


def write_with_datasets(folder: Path, rows: list[dict]) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(folder)


def fill_sink(run: RunDir, count: int) -> float:
    """Seconds of the last checkpoint of a run with so many rows."""
    sink, _ = DataSink.open(run, ROWS_PER_SHARD, "sha")
    for start in range(0, count, 100_000):
        for record in records(min(100_000, count - start)):
            sink.add_row(record)
    for record in records(ROWS_PER_SHARD // 2):
        sink.add_row(record)
    return timed(lambda: sink.checkpoint({}))


def measure(folder: Path, num_rows: int, num_passes: int) -> Iterator[tuple[str, str, list[float]]]:
    """What was measured, its unit, and the figure of each pass."""
    num_written = min(num_rows, 100_000)
    rows = [record.to_row() for record in records(num_written)]
    ours, peers, appends = [], [], []
    for turn in range(num_passes):
        print(f"pass {turn + 1}", file=sys.stderr, flush=True)
        ours.append(num_written / timed(lambda: write_shards(folder / "ours", rows)))
        peers.append(num_written / timed(lambda: write_with_datasets(folder / "peer", rows)))
        appends.append(num_written / fill_log(folder / "log", num_written))
        for name in ("ours", "peer", "log"):
            shutil.rmtree(folder / name)
    yield "append to the request log", "requests/s", appends
    yield "write shards: DatasetWriter", "rows/s", ours
    yield "write shards: Dataset.from_list(...).save_to_disk", "rows/s", peers
    print(f"log of {num_rows:,} requests", file=sys.stderr, flush=True)
    fill_log(folder / "log", num_rows)
    opened = [open_in_own_process(folder / "log") for _ in range(num_passes)]
    yield f"open a log of {num_rows:,} requests", "s", [seconds for seconds, _ in opened]
    yield f"memory of a log of {num_rows:,} requests", "MiB", [mib for _, mib in opened]
    shutil.rmtree(folder / "log")
    print(f"sink of {num_rows:,} rows", file=sys.stderr, flush=True)
    yield "checkpoint with half a shard of rows", "s", [fill_sink(RunDir(folder), num_rows)]

    def resume() -> None:
        DataSink.open(RunDir(folder), ROWS_PER_SHARD, "sha")

    def read_column() -> None:
        sink, _ = DataSink.open(RunDir(folder), ROWS_PER_SHARD, "sha")
        assert sum(batch.num_rows for batch in sink.iter_columns("synthesized", ["task"])) == sink.num_rows

    yield f"resume a sink of {num_rows:,} rows", "s", [timed(resume) for _ in range(num_passes)]
    yield "resume it and read a column of all rows", "s", [timed(read_column) for _ in range(num_passes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--open", type=Path, help="only open this log, and print seconds and MiB")
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(open_log(arguments.open)))
        return
    table = Table(title="Storage, median (min-max)", title_justify="left")
    for column in ("what", "median", "range", "unit"):
        table.add_column(column, justify="right" if column in ("median", "range") else "left")
    with tempfile.TemporaryDirectory() as folder:
        for what, unit, figures in measure(Path(folder), arguments.rows, arguments.passes):
            digits = ".3f" if unit == "s" else ",.0f"
            low, middle, high = (f"{f(figures):{digits}}" for f in (min, statistics.median, max))
            table.add_row(what, middle, f"{low}-{high}", unit)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
