"""Output tokens per second of our pool and our whole stage against raw vLLM and a peer: `make bench-synthesis`.

Same model, prompts and sampling on every side. In each round every side makes one whole pass over the requests, one
after the other, another of them first each time, so that a share of raw vLLM's speed is that of the same minute; the
first round is a warm-up. Beside the rates stand the CPU time of a pass, which says more than the clock where others use
the machine too, and the tail: the share of a pass that its last 5 % of rows took. `ray.data.llm` starts its engine anew
for each pass; see ray_data.py.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from tests.benchmarks.sides import LENGTHS, RAW, ROOT, Pass, measured, requests_of, sides_of

OURS = (*RAW, "pool", "stage")
PEERS = {"ray.data.llm": "tuned", "ray.data.llm, defaults": "defaults"}


async def measure(names: list[str], lengths: list[str], num_requests: int, num_rounds: int) -> dict[str, dict]:
    """Passes by lengths and side, in the order of the rounds."""
    found: dict[str, dict[str, list[Pass]]] = {}
    async with sides_of(names) as sides:
        for name in lengths:
            requests = requests_of(LENGTHS[name], num_requests)
            passes: dict[str, list[Pass]] = {side: [] for side in sides}
            for number in range(num_rounds + 1):
                for side in rotated(list(sides), number):
                    print(f"{name}: round {number}, {side}", file=sys.stderr, flush=True)
                    passes[side].append(await measured(sides[side], requests))
            found[name] = {side: some[1:] for side, some in passes.items()}
    return found


def rotated(sides: list[str], places: int) -> list[str]:
    """The sides in their order, but another first."""
    places %= len(sides)
    return sides[places:] + sides[:places]


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
    arguments = parser.parse_args()
    ours = [side for side in arguments.sides if side in OURS]
    found = asyncio.run(measure(ours, arguments.lengths, arguments.requests, arguments.rounds))
    for lengths, passes in found.items():
        for peer in (side for side in arguments.sides if side in PEERS):
            passes[peer] = [rate_of_peer(peer, lengths, arguments.requests) for _ in range(arguments.peer_passes)]
    table = Table(title=f"{arguments.requests} requests: medians (min-max)", title_justify="left")
    for column in ("output lengths", "side", "output tokens/s", "of raw", "CPU s a pass", "tail"):
        table.add_column(column, justify="left" if column in ("output lengths", "side") else "right")
    for lengths, passes in found.items():
        raw = next((passes[name] for name in RAW if name in passes), None)
        for side, some in passes.items():
            table.add_row(lengths, side, *cells_of(some, raw or some))
    Console(width=120).print(table)
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")


def cells_of(some: list[Pass], raw: list[Pass]) -> list[str]:
    """The cells of a side: its medians, and its share of raw vLLM's speed, round by round where both took part."""
    rates = [one.tokens_per_second for one in some]
    against = [one.tokens_per_second for one in raw]
    if len(against) != len(rates):
        against = [statistics.median(against)] * len(rates)
    ratios = [own / other for own, other in zip(rates, against, strict=True)]
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
