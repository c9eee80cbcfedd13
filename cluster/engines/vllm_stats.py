"""Sums of vLLM's counters, which vLLM reports once per step of an engine: nothing is added per token."""

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from cluster.engines.config import EngineReport


class ReportingLogger(StatLoggerBase):
    """Keeps the sums that an EngineReport needs. vLLM calls `record` once per step of the engine."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._num_tokens = 0
        self._num_running = 0
        self._num_waiting = 0
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
    ) -> None:
        if iteration_stats is not None:
            self._num_tokens += iteration_stats.num_generation_tokens
            self._num_preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is not None:
            self._num_running = scheduler_stats.num_running_reqs
            self._num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._num_prefix_queries += scheduler_stats.prefix_cache_stats.queries
            self._num_prefix_hits += scheduler_stats.prefix_cache_stats.hits

    def log_engine_initialized(self) -> None:
        """vLLM calls it when the engine is up. There is nothing to log."""

    def report(self) -> EngineReport:
        return EngineReport(
            self._num_tokens,
            self._num_running,
            self._num_waiting,
            self._num_preemptions,
            self._num_prefix_queries,
            self._num_prefix_hits,
        )
