"""Output tokens per second of our pool and our whole stage against raw vLLM and a peer: `make bench-synthesis`.

Same model, prompts and sampling on both sides of a ratio: each of ours takes turns with raw vLLM on requests that
neither has seen, one whole pass each, the other of them first every second round, so that a share of raw vLLM's speed
is that of the same minute; the first round is a warm-up. Beside the rates stand the CPU time of a pass, which says more
than the clock where others use the machine too, and the tail: the share of a pass that its last 5 % of rows took.
`ray.data.llm` starts its engine anew for each pass; see ray_data.py.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from tests.benchmarks.sides import LENGTHS, RAW, ROOT, Pass, Work, measured, requests_of, sides_of, work_of

OURS = (*RAW, "pool", "stage")
PEERS = {"ray.data.llm": "tuned", "ray.data.llm, defaults": "defaults"}


@dataclass
class Found:
    """What was measured of a side."""

    passes: list[Pass] = field(default_factory=list)
    of_raw: list[float] = field(default_factory=list)  # its speed by raw vLLM's on the same requests, pass by pass


async def measure(
    work: Work, names: list[str], lengths: list[str], num_requests: int, num_rounds: int
) -> dict[str, dict]:
    """What was found by lengths and side, in the order of the rounds."""
    found: dict[str, dict[str, Found]] = {name: {side: Found() for side in names} for name in lengths}
    draws = itertools.count()
    async with sides_of(work, names) as sides:
        for name in lengths:
            for number in range(num_rounds + 1):
                for pair in pairs_of(names):
                    requests = requests_of(work.model, LENGTHS[name], num_requests, next(draws))
                    passes = {}
                    for side in pair if number % 2 else reversed(pair):
                        print(f"{name}: round {number}, {side}", file=sys.stderr, flush=True)
                        passes[side] = await measured(sides[side], requests)
                    for side, one in passes.items() if number else ():
                        found[name][side].passes.append(one)
                        found[name][side].of_raw.append(one.tokens_per_second / passes[pair[0]].tokens_per_second)
    return found


def pairs_of(sides: Sequence[str]) -> list[list[str]]:
    """The sides that take turns on the same requests: raw vLLM, in the first layout among them, and each other one."""
    raw = next(side for side in RAW if side in sides)
    return [[raw, side] for side in sides if side != raw] or [[raw]]


def rate_of_peer(peer: str, lengths: str, num_requests: int) -> Pass:
    """One pass of `ray.data.llm`, in a process of its own."""
    print(f"{lengths}: {peer}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "tests.benchmarks.ray_data", PEERS[peer], lengths, str(num_requests)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rates = [line.removeprefix("rate ") for line in done.stdout.splitlines() if line.startswith("rate ")]
    if done.returncode or not rates:
        sys.exit(f"{peer} failed:\n{done.stderr[-2000:]}")
    return Pass(float(rates[-1]), float("nan"), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of each side")
    parser.add_argument("--peer-passes", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=[*OURS, *PEERS], default=("raw", "pool", "stage"))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--model", choices=("toy", "english"), default="toy")
    arguments = parser.parse_args()
    if not RAW.keys() & set(arguments.sides):
        parser.error(f"--sides: add what the others are compared with, one of {', '.join(map(repr, RAW))}")
    ours = [side for side in arguments.sides if side in OURS]
    found = asyncio.run(
        measure(work_of(arguments.model), ours, arguments.lengths, arguments.requests, arguments.rounds)
    )
    for lengths, sides in found.items():
        for peer in (side for side in arguments.sides if side in PEERS):
            passes = [rate_of_peer(peer, lengths, arguments.requests) for _ in range(arguments.peer_passes)]
            raw = statistics.median(one.tokens_per_second for one in sides[pairs_of(ours)[0][0]].passes)
            sides[peer] = Found(passes, [one.tokens_per_second / raw for one in passes])
    table = Table(
        title=f"{arguments.model} model, {arguments.requests} requests: medians (min-max)", title_justify="left"
    )
    for column in ("output lengths", "side", "output tokens/s", "of raw", "CPU s a pass", "tail"):
        table.add_column(column, justify="left" if column in ("output lengths", "side") else "right")
    for lengths, sides in found.items():
        for side, some in sides.items():
            table.add_row(lengths, side, *cells_of(some))
    Console(width=120).print(table)
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")


def cells_of(found: Found) -> list[str]:
    """The cells of a side: its medians, and what they range over."""
    some, ratios = found.passes, found.of_raw
    rates = [one.tokens_per_second for one in some]
    tails = [one.tail for one in some if one.tail is not None]
    cpu = statistics.median(one.cpu_seconds for one in some)
    return [
        f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})",
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
        "-" if cpu != cpu else f"{cpu:.1f}",
        f"{statistics.median(tails):.1%}" if tails else "-",
    ]


if __name__ == "__main__":
    main()
