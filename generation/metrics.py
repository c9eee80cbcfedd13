"""What a run reports about itself: a progress line a second, a row of metrics.jsonl every ten, figures in its result.

Two breakdowns say where time goes: where requests waited (in the queue, in an engine, on an engine that died), and what
the driver process spent its own time on (parse, filter, write, log). They overlap in time and are not to be added. A
driver near 100 % slows the engines down; a long queue with a driver near 0 % means that all engines are busy.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from cluster.engines.pool import EnginePool
from cluster.engines.pool_stats import EngineStats
from cluster.files import append_jsonl
from cluster.log import Progress, stage_logger
from cluster.run.fence import Fence
from cluster.run.rundir import RunDir
from generation.config.common import SynthesisConfig
from generation.driver import Driver
from generation.method import Method
from generation.requester import Requester
from generation.state import Snapshot, Timers

STAGE = "synthesize"
LINE_SECONDS = 1.0
ROW_SECONDS = 10.0
WINDOW_SECONDS = 300.0  # of a forecast: filters for novelty reject more and more

log = stage_logger(STAGE)


class Reporter:
    """Reports every snapshot of the driver."""

    def __init__(
        self,
        run: RunDir,
        progress: Progress,
        driver: Driver,
        method: Method,
        config: SynthesisConfig,
        requester: Requester,
        timers: Timers,
    ) -> None:
        self._run = run
        self._fence = Fence(run.root)
        self._progress = progress
        self._driver = driver
        self._num_wanted = method.num_wanted or method.max_proposals
        self._models = requester.names()
        self._pools = requester.pools()
        self._timers = timers
        self._forecaster = Forecaster(method, config)
        self._engine_events = EngineEvents(run, self._pools)
        self._start_cpu_seconds = time.process_time()

    async def report(self) -> None:
        """Report until cancelled."""
        last_row = time.monotonic()
        while True:
            self._engine_events.report()
            snapshot = self._driver.snapshot()
            forecast = self._forecaster.update(snapshot)
            self._progress.update(self._line(snapshot, forecast))
            if time.monotonic() - last_row >= ROW_SECONDS and not self._fence.is_superseded:
                last_row = time.monotonic()
                append_jsonl(self._run.metrics, {"stage": STAGE, **self._row(snapshot, forecast)})
            await asyncio.sleep(LINE_SECONDS)

    def _line(self, snapshot: Snapshot, forecast: "Forecast | None") -> str:
        of = f"/{self._num_wanted}" if self._num_wanted else ""
        reasons = f" ({list_counts(snapshot.rejected)})" if snapshot.rejected else ""
        seconds = self._time(snapshot.seconds)
        waiting, driver = seconds["of_waiting"], sum(seconds["of_driver"].values())
        return (
            f"{snapshot.num_accepted}{of} instructions accepted, {snapshot.num_rows} rows, "
            f"{sum(snapshot.rejected.values())} rejected{reasons}, "
            f"{self._tokens_per_second(snapshot.seconds):,.0f} tok/s; waiting: engine {waiting['engine']:.0%} "
            f"queue {waiting['queue']:.0%}; driver {driver:.0%}{f'; {forecast}' if forecast else ''}"
        )

    def _row(self, snapshot: Snapshot, forecast: "Forecast | None") -> dict:
        return {
            "num_accepted": snapshot.num_accepted,
            "num_rows": snapshot.num_rows,
            "tokens_per_second": self._tokens_per_second(snapshot.seconds),
            "forecast": forecast and asdict(forecast),
            "time": self._time(snapshot.seconds),
            "pools": [asdict(pool.stats) for pool in self._pools],
        }

    def result(self) -> dict:
        """The part of the stage's result that depends on the machine."""
        self._engine_events.report()
        seconds = self._driver.snapshot().seconds
        stats = [pool.stats for pool in self._pools]
        return {
            "models": self._models,
            "num_engine_restarts": sum(each.num_restarts for each in stats),
            "num_engine_restarts_hung": sum(each.num_restarts_hung for each in stats),
            "num_quarantined": sum(each.num_quarantined for each in stats),
            "engines": [
                {name: getattr(engine, name) for name in ("node", "num_requests", "num_completion_tokens")}
                for each in stats
                for engine in each.engines
            ],
            "tokens_per_second": self._tokens_per_second(seconds),
            "driver_seconds": {name: round(value, 3) for name, value in sorted(self._timers.seconds.items())},
            "time": self._time(seconds),
        }

    def _tokens_per_second(self, seconds: float) -> float:
        return round(sum(pool.stats.num_completion_tokens for pool in self._pools) / max(seconds, 1e-9), 1)

    def _time(self, seconds: float) -> dict:
        """Where time went since the start, as the head of this file describes."""
        stats = [pool.stats for pool in self._pools]
        waited = {
            "queue": sum(each.seconds_queued for each in stats),
            "engine": sum(each.seconds_in_engine for each in stats),
            "lost_engine": sum(each.seconds_lost for each in stats),
        }
        total = sum(waited.values()) or 1.0
        of_driver = sorted(self._timers.seconds.items())
        num_requests = sum(each.num_requests for each in stats)
        num_queries = sum(each.num_prefix_queries for each in stats)
        num_hits = sum(each.num_prefix_hits for each in stats)
        return {
            "of_waiting": {name: round(value / total, 4) for name, value in waited.items()},
            "seconds_per_request": {name: round(value / max(num_requests, 1), 4) for name, value in waited.items()},
            "of_driver": {name: round(value / max(seconds, 1e-9), 4) for name, value in of_driver},
            "driver_cpu": round((time.process_time() - self._start_cpu_seconds) / max(seconds, 1e-9), 4),
            "num_preemptions": sum(each.num_preemptions for each in stats),
            "prefix_hit_rate": round(num_hits / num_queries, 4) if num_queries else None,
        }


def list_counts(counts: Mapping[str, int]) -> str:
    """Counts by reason, the largest first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ranked)


# -- when the run will end


@dataclass(frozen=True, slots=True)
class Forecast:
    """num_rows and num_completion_tokens are totals at the end of the run."""

    num_rows: int
    num_completion_tokens: int
    seconds_left: int

    def __str__(self) -> str:
        hours, minutes, seconds = self.seconds_left // 3600, self.seconds_left // 60 % 60, self.seconds_left % 60
        left = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"about {left} left, {self.num_rows:,} rows and {self.num_completion_tokens:,} tokens then"


class Forecaster:
    """Extrapolates the last minutes of a run, up to WINDOW_SECONDS, to the first limit that ends it."""

    def __init__(self, method: Method, config: SynthesisConfig) -> None:
        budget = config.budget
        limits = {
            "num_instructions": method.num_wanted,
            "num_proposals": method.max_proposals,
            "num_rows": budget.max_rows,
            "num_completion_tokens": budget.max_completion_tokens,
            "seconds": None if budget.max_minutes is None else 60 * budget.max_minutes,
        }
        self._limits = {name: limit for name, limit in limits.items() if limit is not None}  # by field of Snapshot
        self._window: deque[Snapshot] = deque()

    def update(self, now: Snapshot) -> Forecast | None:
        """Add a snapshot. None means that no limit is in sight at the rate so far."""
        self._window.append(now)
        while self._window[0].seconds < now.seconds - WINDOW_SECONDS:
            self._window.popleft()
        first = self._window[0]
        seconds = max(now.seconds - first.seconds, 1e-9)
        left = []
        for name, limit in self._limits.items():
            if rate := (getattr(now, name) - getattr(first, name)) / seconds:
                left.append(max(limit - getattr(now, name), 0) / rate)
        if not left or now.num_rows == first.num_rows:
            return None
        factor = min(left) / seconds
        num_new_rows = (now.num_rows - first.num_rows) * factor
        num_new_tokens = (now.num_completion_tokens - first.num_completion_tokens) * factor
        return Forecast(
            round(now.num_rows + num_new_rows), round(now.num_completion_tokens + num_new_tokens), round(min(left))
        )


# -- engines


class EngineEvents:
    """Compares the pools' counts with those of the last call: restarts, slow engines, quarantined requests."""

    def __init__(self, run: RunDir, pools: Sequence[EnginePool]) -> None:
        self._run = run
        self._pools = pools
        self._num_restarts = [0] * len(pools)
        self._slow: set[tuple[int, int]] = set()  # pool, engine
        self._quarantined: set[str] = set()

    def report(self) -> None:
        """Print and record in events.jsonl what is new since the last call."""
        for place, pool in enumerate(self._pools):
            stats = pool.stats
            if stats.num_restarts > self._num_restarts[place]:
                self._num_restarts[place] = stats.num_restarts
                log.info(f"an engine died ({stats.last_death}); restart {stats.num_restarts}")
                self._run.event(STAGE, "engine_restarted", reason=stats.last_death)
            for number, engine in enumerate(stats.engines):
                self._report_speed((place, number), engine)
            for request_id in stats.quarantined.keys() - self._quarantined:
                self._quarantined.add(request_id)
                reason = stats.quarantined[request_id]
                log.info(f"request {request_id[:16]} is quarantined: every engine that had it died: {reason}")
                self._run.event(STAGE, "request_quarantined", request_id=request_id, reason=reason)

    def _report_speed(self, key: tuple[int, int], engine: EngineStats) -> None:
        if engine.is_slow == (key in self._slow):
            return
        self._slow ^= {key}
        name = f"engine {key[1]} on {engine.node}"
        if engine.is_slow:
            log.info(f"{name} is slow ({engine.tokens_per_second:,.0f} tok/s): it gets fewer requests")
            self._run.event(STAGE, "engine_slow", node=engine.node, tokens_per_second=engine.tokens_per_second)
        elif engine.is_up:
            log.info(f"{name} is as fast as the others again")
