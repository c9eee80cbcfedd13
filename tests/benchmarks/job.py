"""Seconds from nothing to the last row, engine start included: the job as whoever waits for it sees it.

Each turn starts every side anew in a process of its own, and another of them first; the first turn is a warm-up. The
requests are those of the first pass in synthesis.py. Raw vLLM keeps nothing of what it makes, our stage has it on the
disk by then and `ray.data.llm` in its driver.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

from tests.benchmarks.sides import LENGTHS, RAW, ROOT, requests_of, sides_of, work_of
from tests.benchmarks.synthesis import PEERS

DONE = "rate "  # begins the line that a side prints when it has the last row
OURS = (*RAW, "stage")
COMMANDS = {
    **{side: ["tests.benchmarks.job", "--only", side] for side in OURS},
    **{peer: ["tests.benchmarks.ray_data", form] for peer, form in PEERS.items()},
}


async def run_one(side: str, lengths: str, num_requests: int) -> None:
    """Start one side, let it do its work, and say so."""
    work = work_of("toy")
    async with sides_of(work, [side]) as sides:
        started = time.perf_counter()
        rows = await sides[side](requests_of(work.model, LENGTHS[lengths], num_requests, 0))
        rate = sum(tokens for _, tokens in rows) / (time.perf_counter() - started)
        print(f"{DONE}{rate}", flush=True)


def seconds_of(side: str, lengths: str, num_requests: int) -> float:
    """Seconds from the start of a side in a new process to its last row. Returns when that process has ended."""
    print(f"{num_requests} requests: {side}", file=sys.stderr, flush=True)
    module, *arguments = COMMANDS[side]
    command = [sys.executable, "-m", module, *arguments, lengths, str(num_requests)]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        seconds = [time.perf_counter() - started for line in process.stdout if line.startswith(DONE)]
    if process.returncode or not seconds:
        sys.exit(f"{side} ended with {process.returncode}; to see why: {subprocess.list2cmdline(command)}")
    return seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--sides", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--only", choices=OURS, help="run this side once, here, and time nothing")
    parser.add_argument("lengths", nargs="?", choices=LENGTHS, default="mixed (8-160)")
    parser.add_argument("requests", nargs="*", type=int, default=[256, 1024])
    arguments = parser.parse_args()
    if arguments.only:
        return asyncio.run(run_one(arguments.only, arguments.lengths, arguments.requests[0]))
    table = Table(title=f"{arguments.lengths} tokens: medians (min-max)", title_justify="left")
    for column in ("requests", "side", "seconds", f"of {arguments.sides[0]}"):
        table.add_column(column, justify="left" if column == "side" else "right")
    sides = arguments.sides
    for num_requests in arguments.requests:
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(arguments.turns + 1):
            for place in range(len(sides)):
                side = sides[(place + turn) % len(sides)]
                seconds[side].append(seconds_of(side, arguments.lengths, num_requests))
        medians = {side: statistics.median(some[1:]) for side, some in seconds.items()}
        for side, some in seconds.items():
            spread = f"{medians[side]:.1f} ({min(some[1:]):.1f}-{max(some[1:]):.1f})"
            table.add_row(str(num_requests), side, spread, f"{medians[side] / medians[sides[0]]:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
