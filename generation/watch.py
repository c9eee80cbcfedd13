"""How far a synthesis is: a line a second, metrics now and then, a forecast after the pilot."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict

from cluster.pool import EnginePool
from cluster.progress import Progress
from cluster.rundir import RunDir, append_jsonl
from generation.attribution import Attribution
from generation.config import BudgetConfig, Role
from generation.driver import Driver
from generation.method import Method
from generation.requester import ServedModel
from generation.sink import DataSink

STAGE = "synthesize"
REPORT_SECONDS = 1.0
METRICS_SECONDS = 10.0


class Watch:
    """Looks at the parts of a run and says what it sees."""

    def __init__(
        self,
        run: RunDir,
        progress: Progress,
        driver: Driver,
        method: Method,
        sink: DataSink,
        models: Mapping[Role, ServedModel],
        attribution: Attribution,
    ) -> None:
        self._run = run
        self._progress = progress
        self._driver = driver
        self._method = method
        self._sink = sink
        self._pools: list[EnginePool] = list({id(model.pool): model.pool for model in models.values()}.values())
        self._attribution = attribution
        self._start = time.monotonic()

    async def report(self) -> None:
        """Report until cancelled."""
        last_metrics = time.monotonic()
        num_restarts = [0] * len(self._pools)
        while True:
            for place, pool in enumerate(self._pools):
                if pool.stats.num_restarts > num_restarts[place]:
                    num_restarts[place] = pool.stats.num_restarts
                    self._progress.line(f"an engine died ({pool.stats.last_death}); restart {num_restarts[place]}")
                    self._run.event(STAGE, "engine_restarted", reason=pool.stats.last_death)
            self._progress.update(self._line())
            if time.monotonic() - last_metrics >= METRICS_SECONDS:
                last_metrics = time.monotonic()
                append_jsonl(self._run.metrics, {"stage": STAGE, **self._metrics()})
            await asyncio.sleep(REPORT_SECONDS)

    def figures(self) -> dict:
        """The part of the verdict that the machine decides."""
        return {
            "num_engine_restarts": sum(pool.stats.num_restarts for pool in self._pools),
            "tokens_per_second": round(self._tokens_per_second(), 1),
            "driver_seconds": {name: round(value, 3) for name, value in sorted(self._attribution.seconds.items())},
        }

    def _line(self) -> str:
        wanted = self._method.num_wanted or self._method.max_proposals
        goal = f"/{wanted}" if wanted else ""
        kept, sink = self._driver.admission.num_kept, self._sink
        return (
            f"{kept}{goal} instructions kept, {sink.num_rows} rows, {sink.rejected.total()} rejected "
            f"({listed(sink.rejected)}), {self._tokens_per_second():,.0f} tok/s"
        )

    def _metrics(self) -> dict:
        return {
            "num_kept": self._driver.admission.num_kept,
            "num_rows": self._sink.num_rows,
            **self.figures(),
            "pools": [asdict(pool.stats) for pool in self._pools],
        }

    def _tokens_per_second(self) -> float:
        tokens = sum(pool.stats.num_completion_tokens for pool in self._pools)
        return tokens / max(time.monotonic() - self._start, 1e-9)


def summary(verdict: dict) -> str:
    """The verdict in a line."""
    text = (
        f"{verdict['num_kept']} of {verdict['num_generated']} instructions kept, {verdict['num_rows']} rows "
        f"({verdict['num_seed_rows']} of them seeds), rejected: {listed(verdict['rejected']) or 'none'}; "
        f"{verdict['tokens_per_second']:,.0f} tok/s, {verdict['seconds']:.0f} s"
    )
    return text if verdict["is_complete"] else f"INCOMPLETE ({verdict['stopped_because']}): {text}"


def how_to_go_on(counts: Mapping[str, object], budget: BudgetConfig) -> str:
    """What to type after a budget was spent; empty if none was."""
    name = counts["spent_budget"]
    if name is None:
        return ""
    higher = 2 * getattr(budget, name)
    return (
        f"To go on, start the same command with a higher one, for example synthesize.budget.{name}={higher:g}, or with "
        f"synthesize.budget.{name}=null for no limit: nothing that is in the log is generated again."
    )


def listed(counts: Mapping[str, int]) -> str:
    """Counts by reason, the largest first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ranked)
