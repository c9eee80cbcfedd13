"""What happens to engines and requests while a run lasts, reported once each."""

from collections.abc import Sequence

from cluster.engines.pool import EnginePool
from cluster.engines.pool_stats import EngineStats
from cluster.log import stage_logger
from cluster.run.rundir import RunDir

STAGE = "synthesize"
log = stage_logger(STAGE)


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
                log.info(f"request {request_id[:16]} is set aside: every engine that had it died: {reason}")
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
