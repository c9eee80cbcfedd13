"""Output tokens per second of our pool and our whole stage against raw vLLM and a peer: `make bench-synthesis`.

Same model, prompts and sampling on every side. The sides take turns, each in a process of its own, and whole passes
over the requests are timed after a warm-up, so that engine start counts for none. Beside the rates stand the CPU time
of a pass, of a side and all below it, which says more than the clock where others use the machine too; and the tail:
the share of a pass that its last 5 % of rows took.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from tests.benchmarks.sides import LENGTHS, ROOT, SIDES, requests_of


def in_own_process(side: str, lengths: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "tests.benchmarks.synthesis", "--side", side, "--lengths", lengths]
    command += ["--requests", str(arguments.requests), "--passes", str(arguments.passes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]  # libraries say their own good-byes
    return json.loads(answers[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=3, help="timed passes of each process")
    parser.add_argument("--turns", type=int, default=2, help="processes of each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[side for side in SIDES if side != "ray.data.llm"])
    parser.add_argument("--side", choices=SIDES, help="measure this one here and print its figures as JSON")
    parser.add_argument("--lengths", choices=LENGTHS, default=None)
    arguments = parser.parse_args()
    if arguments.side:
        requests = requests_of(LENGTHS[arguments.lengths], arguments.requests)
        print(json.dumps(SIDES[arguments.side](requests, arguments.passes)))
        return
    table = Table(title=f"{arguments.requests} requests: medians (min-max)", title_justify="left")
    for column in ("output lengths", "side", "output tokens/s", "of raw", "CPU s a pass", "raw CPU of its", "tail"):
        table.add_column(column, justify="left" if column in ("output lengths", "side") else "right")
    for lengths in [arguments.lengths] if arguments.lengths else LENGTHS:
        found: dict[str, dict[str, list[float]]] = {side: {} for side in arguments.sides}
        for turn in range(arguments.turns):
            for side, figures in found.items():
                print(f"{lengths}: turn {turn + 1}, {side}", file=sys.stderr, flush=True)
                for name, values in in_own_process(side, lengths, arguments).items():
                    figures.setdefault(name, []).extend(values)
        for side, figures in found.items():
            table.add_row(lengths, side, *cells_of(figures, found.get("raw", figures)))
    Console(width=120).print(table)
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")


def cells_of(figures: dict[str, list[float]], raw: dict[str, list[float]]) -> list[str]:
    """The cells of a side: its medians, and their ratios to those of raw vLLM."""
    rates, cpu, tails = figures["rates"], figures["cpu_seconds"], figures["tails"]
    rate = statistics.median(rates)
    return [
        f"{rate:,.0f} ({min(rates):,.0f}-{max(rates):,.0f})",
        f"{rate / statistics.median(raw['rates']):.3f}",
        f"{statistics.median(cpu):.1f}" if cpu else "-",
        f"{statistics.median(raw['cpu_seconds']) / statistics.median(cpu):.3f}" if cpu else "-",
        f"{statistics.median(tails):.1%}" if tails else "-",
    ]


if __name__ == "__main__":
    main()
