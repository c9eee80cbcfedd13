"""What a run tells: a line a second, metrics now and then, a forecast after the pilot, what happens to engines."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import asdict

from cluster.engines.pool import EnginePool
from cluster.engines.pool_stats import EngineStats
from cluster.files import write_json
from cluster.log import Progress, stage_logger
from cluster.run.fence import Fence
from cluster.run.rundir import RunDir, append_jsonl
from generation.config import BudgetConfig
from generation.driver import Driver
from generation.forecast import Goal, Pace, forecast
from generation.forecast_words import describe_forecast
from generation.method import Method
from generation.requester import Requester
from generation.sink import DataSink
from generation.state import Timers

STAGE = "synthesize"
log = stage_logger(STAGE)
REPORT_SECONDS = 1.0
METRICS_SECONDS = 10.0


class Watch:
    """Looks at the parts of a run and says what it sees.

    Where time goes is told in two kinds of shares that do not add up with each other. A request waits in the queue and
    then in an engine: shares of that waiting, over all requests. The driver parses, filters, writes and logs beside:
    shares of its own process's time. A driver near 100 % holds the engines up; a long queue with a driver near 0 % says
    that the engines are all busy.
    """

    def __init__(
        self,
        run: RunDir,
        progress: Progress,
        driver: Driver,
        method: Method,
        sink: DataSink,
        requester: Requester,
        timers: Timers,
        goal: Goal,
        num_gpus: int,
        inputs_sha: str,
    ) -> None:
        """num_gpus: of all engines together, 0 where there are none."""
        self._run = run
        self._fence = Fence(run.root)
        self._progress = progress
        self._driver = driver
        self._method = method
        self._sink = sink
        self._requester = requester
        self._pools: list[EnginePool] = requester.pools()
        self._timers = timers
        self._goal = goal
        self._num_gpus = num_gpus
        self._identity = {"inputs_sha": inputs_sha, "goal": asdict(goal)}
        self._start = time.monotonic()
        self._start_cpu = time.process_time()
        self._pace: list[tuple[float, int]] = []  # seconds, tokens
        self._forecast = self._load_forecast()
        self._is_forecast_of_this_attempt = False
        self._num_restarts: dict[int, int] = {}
        self._slow: set[tuple[int, int]] = set()
        self._quarantined: set[str] = set()

    async def report(self) -> None:
        """Report until cancelled."""
        last_metrics = time.monotonic()
        while True:
            self._look_at_engines()
            self._pace.append((self._seconds(), self._num_tokens()))
            if self._forecast is None and self._driver.pilot.is_full:
                self._make_forecast()
            self._progress.update(self._line())
            if time.monotonic() - last_metrics >= METRICS_SECONDS and not self._fence.is_superseded:
                last_metrics = time.monotonic()
                append_jsonl(self._run.metrics, {"stage": STAGE, **self._metrics()})
            await asyncio.sleep(REPORT_SECONDS)

    def figures(self, counts: Mapping[str, object]) -> dict:
        """The part of the result that the machine decides. counts: the other part."""
        self._look_at_engines()
        stats = [pool.stats for pool in self._pools]
        return {
            "models": self._requester.names(),
            "num_engine_restarts": sum(each.num_restarts for each in stats),
            "num_engine_restarts_hung": sum(each.num_restarts_hung for each in stats),
            "num_quarantined": sum(each.num_quarantined for each in stats),
            "engines": [
                {name: getattr(engine, name) for name in ("node", "num_requests", "num_completion_tokens")}
                for each in stats
                for engine in each.engines
            ],
            "tokens_per_second": round(self._tokens_per_second(), 1),
            "driver_seconds": {name: round(value, 3) for name, value in sorted(self._timers.seconds.items())},
            "time": self.time_shares(),
            "forecast": self._against_result(counts),
        }

    def time_shares(self) -> dict:
        """Where time went; see above."""
        stats = [pool.stats for pool in self._pools]
        waited = {
            "queue": sum(each.seconds_queued for each in stats),
            "engine": sum(each.seconds_in_engine for each in stats),
            "lost_engine": sum(each.seconds_lost for each in stats),  # on engines that died
        }
        total = sum(waited.values()) or 1.0
        num_requests = sum(each.num_requests for each in stats)
        num_queries = sum(each.num_prefix_queries for each in stats)
        return {
            "of_waiting": {name: round(value / total, 4) for name, value in waited.items()},
            "seconds_per_request": {name: round(value / max(num_requests, 1), 4) for name, value in waited.items()},
            "of_driver": self._timers.shares(self._seconds()),
            "driver_cpu": round((time.process_time() - self._start_cpu) / max(self._seconds(), 1e-9), 4),
            "num_preemptions": sum(each.num_preemptions for each in stats),
            "prefix_hit_rate": (
                round(sum(each.num_prefix_hits for each in stats) / num_queries, 4) if num_queries else None
            ),
        }

    def _look_at_engines(self) -> None:
        """Say once what has happened to an engine or a request."""
        for place, pool in enumerate(self._pools):
            stats = pool.stats
            if stats.num_restarts > self._num_restarts.get(place, 0):
                self._num_restarts[place] = stats.num_restarts
                log.info(f"an engine died ({stats.last_death}); restart {stats.num_restarts}")
                self._run.event(STAGE, "engine_restarted", reason=stats.last_death)
            for number, engine in enumerate(stats.engines):
                self._look_at_speed((place, number), engine)
            for request_id in stats.quarantined.keys() - self._quarantined:
                self._quarantined.add(request_id)
                why = stats.quarantined[request_id]
                log.info(f"request {request_id[:16]} is set aside, every engine that had it died: {why}")
                self._run.event(STAGE, "request_quarantined", request_id=request_id, reason=why)

    def _look_at_speed(self, key: tuple[int, int], engine: EngineStats) -> None:
        if engine.is_slow == (key in self._slow):
            return
        self._slow ^= {key}
        name = f"engine {key[1]} on {engine.node}"
        if engine.is_slow:
            log.info(f"{name} is slow ({engine.tokens_per_second:,.0f} tok/s): it gets fewer requests")
            self._run.event(STAGE, "engine_slow", node=engine.node, tokens_per_second=engine.tokens_per_second)
        elif engine.is_up:
            log.info(f"{name} is as fast as the others again")

    # -- the forecast

    def _make_forecast(self) -> None:
        """Say what the run will come to, and write it down for the end and for later attempts."""
        driver = self._driver
        ahead = max(self._requester.num_completion_tokens - driver.pilot.num_tokens, 0)
        pace = Pace(ahead, self._seconds(), self._speeds())
        made = forecast(driver.pilot, self._goal, pace)
        self._is_forecast_of_this_attempt = True
        self._forecast = {}
        if made is not None:
            self._forecast = {
                "num_rows": asdict(made.num_rows),
                "num_completion_tokens": asdict(made.num_completion_tokens),
                "seconds": made.seconds and asdict(made.seconds),
                self._hours_name: made.seconds and asdict(made.seconds.times(self._num_devices() / 3600)),
            }
            log.info(describe_forecast(self._forecast))
            self._run.event(STAGE, "forecast", num_rows_of_pilot=driver.pilot.num_rows, **self._forecast)
        write_json(self._run.forecast, {**self._identity, "forecast": self._forecast})

    def _load_forecast(self) -> dict | None:
        """What an earlier attempt at the same goal forecast."""
        if not self._run.forecast.is_file():
            return None
        saved = json.loads(self._run.forecast.read_text())
        return saved.pop("forecast") if saved | {"forecast": None} == {**self._identity, "forecast": None} else None

    def _against_result(self, counts: Mapping[str, object]) -> dict | None:
        """Each forecast beside what it came to. Time is that of one attempt: unknown if an earlier one forecast it."""
        if not self._forecast:
            return None
        seconds = round(self._seconds(), 1) if self._is_forecast_of_this_attempt else None
        results = {
            "num_rows": counts["num_rows"],
            "num_completion_tokens": counts["num_completion_tokens"],
            "seconds": seconds,
            self._hours_name: seconds and round(seconds * self._num_devices() / 3600, 3),
        }
        return {name: {**made, "result": results.get(name)} for name, made in self._forecast.items() if made}

    def _speeds(self) -> tuple[float, float]:
        """Tokens per second so far: over all of the time, and over its later half."""
        seconds, tokens = self._pace[-1]
        middle = next((entry for entry in self._pace if entry[0] >= seconds / 2), self._pace[0])
        overall = tokens / max(seconds, 1e-9)
        later = (tokens - middle[1]) / (seconds - middle[0]) if seconds > middle[0] else overall
        return min(overall, later), max(overall, later)

    @property
    def _hours_name(self) -> str:
        return "gpu_hours" if self._num_gpus else "engine_hours"

    def _num_devices(self) -> int:
        return self._num_gpus or sum(len(pool.stats.engines) for pool in self._pools)

    # -- figures

    def _line(self) -> str:
        wanted = self._method.num_wanted or self._method.max_proposals
        goal = f"/{wanted}" if wanted else ""
        kept, sink, shares = self._driver.state.num_accepted, self._sink, self.time_shares()
        waiting, driver = shares["of_waiting"], sum(shares["of_driver"].values())
        reasons = f" ({listed(sink.rejected)})" if sink.rejected else ""
        return (
            f"{kept}{goal} instructions accepted, {sink.num_rows} rows, {sink.rejected.total()} rejected{reasons}, "
            f"{self._tokens_per_second():,.0f} tok/s; waiting: engine "
            f"{waiting['engine']:.0%} queue {waiting['queue']:.0%}; driver {driver:.0%}"
        )

    def _metrics(self) -> dict:
        return {
            "num_accepted": self._driver.state.num_accepted,
            "num_rows": self._sink.num_rows,
            "tokens_per_second": round(self._tokens_per_second(), 1),
            "time": self.time_shares(),
            "pools": [asdict(pool.stats) for pool in self._pools],
        }

    def _num_tokens(self) -> int:
        return sum(pool.stats.num_completion_tokens for pool in self._pools)

    def _tokens_per_second(self) -> float:
        return self._num_tokens() / max(self._seconds(), 1e-9)

    def _seconds(self) -> float:
        return time.monotonic() - self._start


def summary(result: dict) -> str:
    """The result in a line."""
    text = (
        f"{result['num_accepted']} of {result['num_generated']} instructions accepted, {result['num_rows']} rows "
        f"({result['num_seed_rows']} of them seeds), rejected: {listed(result['rejected']) or 'none'}; "
        f"{result['tokens_per_second']:,.0f} tok/s, {result['seconds']:.0f} s"
    )
    return text if result["is_complete"] else f"INCOMPLETE ({result['stopped_because']}): {text}"


def how_to_go_on(counts: Mapping[str, object], budget: BudgetConfig) -> str:
    """What to type after a budget was spent; empty if none was."""
    name = counts["spent_budget"]
    if name is None:
        return ""
    limit = 2 * getattr(budget, name)
    higher = limit if isinstance(limit, int) else f"{limit:g}"
    return (
        f"To go on, start the same command with a higher one, for example synthesize.budget.{name}={higher}, or with "
        f"synthesize.budget.{name}=null for no limit: nothing that is in the log is generated again."
    )


def listed(counts: Mapping[str, int]) -> str:
    """Counts by reason, the largest first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ranked)
