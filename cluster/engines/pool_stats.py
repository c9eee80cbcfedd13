"""What the pool counts, per engine and in total. Everything is added per request or per report, nothing per token."""

from dataclasses import dataclass, field

from cluster.engines.config import Completion, EngineReport


@dataclass(slots=True)
class EngineTotals:
    """Sums since the pool started. A request counts once, on the engine that answered it.

    seconds_queued + seconds_in_engine is how long callers have waited, summed over requests. The first grows if there
    are too few engines or the pool dispatches slowly, the second if engines are slow. `seconds_lost` is the time that
    requests spent on engines which then died.
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    seconds_queued: float = 0.0
    seconds_in_engine: float = 0.0
    seconds_lost: float = 0.0
    num_restarts_dead: int = 0
    num_restarts_hung: int = 0
    num_generated_tokens: int = 0  # also of requests that are unfinished or were lost with an engine
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int = 0

    @property
    def num_restarts(self) -> int:
        return self.num_restarts_dead + self.num_restarts_hung

    def add_answer(self, completion: Completion | None, seconds_queued: float, seconds_in_engine: float) -> None:
        """Count a request that an engine answered, or refused (None)."""
        self.num_requests += 1
        self.seconds_queued += seconds_queued
        self.seconds_in_engine += seconds_in_engine
        if completion is not None:
            self.num_prompt_tokens += completion.num_prompt_tokens
            self.num_completion_tokens += completion.num_completion_tokens

    def add_report(self, old: EngineReport, new: EngineReport) -> None:
        """Count what an engine did between two of its reports."""
        self.num_generated_tokens += new.num_tokens - old.num_tokens
        self.num_preemptions += new.num_preemptions - old.num_preemptions
        self.num_prefix_queries += new.num_prefix_queries - old.num_prefix_queries
        self.num_prefix_hits += new.num_prefix_hits - old.num_prefix_hits

    def add_restart(self, is_hung: bool) -> None:
        self.num_restarts_hung += is_hung
        self.num_restarts_dead += not is_hung


@dataclass(slots=True)
class EngineStats(EngineTotals):
    """One of the `num_replicas` engines, over all its restarts."""

    node: str = ""  # address; empty until the engine is up for the first time
    is_up: bool = False
    is_slow: bool = False
    num_running: int = 0  # sequences in its batch, in its last report
    num_waiting: int = 0
    tokens_per_second: float = 0.0  # in the last window in which it was never idle
    num_slow_windows: int = 0


@dataclass(slots=True)
class PoolStats(EngineTotals):
    """All engines together."""

    num_engines: int = 0  # up now
    num_slow: int = 0  # of these
    num_in_flight: int = 0  # of all engines, now
    max_in_flight: int = 0  # of one engine, ever
    num_quarantined: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)  # request id -> why its last engine died
    last_death: str = ""
    engines: list[EngineStats] = field(default_factory=list)
