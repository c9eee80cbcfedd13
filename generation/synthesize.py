"""The synthesis stage: from a recipe's `synthesize`, `model` and `engine` to `data/synthesized` in the run folder.

run/requests/             every finished request; nothing in it is ever generated again
run/data/synthesized/     the dataset, sealed by its manifest
run/data/rejected/        what did not pass, each with its reason
run/data/instructions/    the instructions that were kept, with their nearest neighbors
run/data/inputs.json      what all of it was made from
"""

import asyncio
import gc
import json
import time

from cluster.config import ModelConfig
from cluster.engines.config import EngineConfig
from cluster.errors import InputError, Preempted, TunesmithError
from cluster.files import write_json
from cluster.log import Progress, stage_logger
from cluster.processes.signals import StopRequest
from cluster.ray.cluster import ray_session
from cluster.run.fence import Superseded, run_lock, verify
from cluster.run.manifest import is_sealed, verify_manifest
from cluster.run.rundir import RunDir, append_jsonl
from generation.config import SynthesisConfig
from generation.driver import Driver
from generation.forecast import Goal
from generation.inputs import Inputs, claim, load_inputs
from generation.judge import Judge
from generation.method import Method, MethodInputs
from generation.request_log import RequestLog
from generation.requester import Requester
from generation.serving import count_gpus, serving
from generation.sink import DataSink, remove_progress
from generation.state import Timers, from_json
from generation.watch import Watch, how_to_go_on, listed, summary

STAGE = "synthesize"
log = stage_logger(STAGE)


def run(config: SynthesisConfig, model: ModelConfig, engine: EngineConfig, run: RunDir, seed: int) -> dict:
    """Synthesize the dataset and return the result, which is also in `result-synthesize.json`.

    A dataset that is sealed and sound is left as it is. Interrupted work goes on: from the last checkpoint, and from
    there on with the finished requests of the log. Raises InputError for bad input, Preempted after SIGTERM or SIGINT,
    TunesmithError if the engines fail or nothing could be kept.
    """
    run.create()
    with run_lock(run.synthesis_lock), Progress(log) as progress:
        inputs = load_inputs(config, model, engine, seed)
        claim(run, inputs)
        if is_sealed(run.synthesized) and (done := _skip(inputs, run)):
            return done
        run.event(STAGE, "started", method=inputs.method.NAME, num_engines=inputs.num_engines, inputs_sha=inputs.sha)
        try:
            with StopRequest() as stop, RequestLog(run.requests) as request_log, ray_session(run.root):
                stop.install()  # again: ray.init has taken SIGTERM
                result = asyncio.run(_until_stopped(Synthesis(inputs, run, request_log, progress), stop))
        except Preempted as stopped:
            run.event(STAGE, "preempted", reason=str(stopped))
            raise
        except Superseded:
            raise
        except TunesmithError as error:
            run.event(STAGE, "failed", reason=str(error))
            raise
        verify(run.root)
        write_json(run.result(STAGE), result)
        append_jsonl(run.metrics, {"stage": STAGE, **result})
        run.event(STAGE, "finished", num_rows=result["num_rows"])
        log.info(summary(result))
        if hint := how_to_go_on(result, config.budget):
            log.info(hint)
        return result


class Synthesis:
    """One attempt at the stage."""

    def __init__(self, inputs: Inputs, run: RunDir, request_log: RequestLog, progress: Progress) -> None:
        self.request_log = request_log
        self._inputs = inputs
        self._run = run
        self._progress = progress
        self._timers = Timers()
        self._start = time.monotonic()

    async def make(self) -> dict:
        """Start the engines, run the method, seal the data, and return the result."""
        inputs, config = self._inputs, self._inputs.config
        sink, checkpoint = open_sink(self._run, config, inputs.sha)
        self._say_what_is_there(sink, checkpoint)
        self._progress.update(f"starting {inputs.num_engines} engine(s) of {inputs.model_names}")
        async with serving(inputs.models) as served_models:
            gc.freeze()  # what is there by now stays: not to be looked through for garbage again and again
            spent = from_json(checkpoint)[1] if checkpoint else None
            requester = Requester(served_models, self.request_log, inputs.seed, config.budget, self._timers, spent)
            method = inputs.method(
                config, MethodInputs(inputs.seeds, inputs.prompts, requester, self._timers, inputs.seed)
            )
            judge = Judge(config.judge, inputs.prompts["row_judge"], requester) if config.judge else None
            driver = Driver(method, config, sink, judge, self._timers)
            watch = Watch(
                self._run, self._progress, driver, method, sink, requester, self._timers,
                goal_of(method, config), count_gpus(inputs.models), inputs.sha,
            )  # fmt: skip
            reporter = asyncio.create_task(watch.report())
            try:
                await driver.run(checkpoint)
            except* TunesmithError as errors:
                raise _first(errors) from errors
            finally:
                reporter.cancel()
            counts = driver_counts(driver, sink)
            measured = watch.figures(counts)
        if counts["num_rows"] == counts["num_seed_rows"]:
            if driver.spent_budget:
                raise InputError(
                    f"{driver.stopped_because} before a single row was made (there are {sink.num_rows} seed rows). "
                    f"{how_to_go_on(counts, config.budget)} What was generated is saved."
                )
            raise TunesmithError(
                f"nothing was kept of {counts['num_generated']} instructions: {driver.stopped_because or 'no row'}; "
                f"rejected {listed(sink.rejected) or 'nothing'}. Look at what the model writes in "
                f"{self.request_log.path}; a model that follows the prompts is needed."
            )
        sink.seal(inputs_sha=inputs.sha, counts=counts, budget=config.budget.model_dump())
        seconds = round(time.monotonic() - self._start, 1)
        return {
            "status": "done",
            "method": method.NAME,
            **counts,
            "resumed_requests": requester.num_resumed,
            **measured,
            "seconds": seconds,
        }

    def _say_what_is_there(self, sink: DataSink, checkpoint: dict | None) -> None:
        if self.request_log.num_dropped_bytes:
            log.info(
                f"the last record of the request log was half-written: {self.request_log.num_dropped_bytes} bytes cut"
            )
        for path in self.request_log.rebuilt:
            log.info(f"{path} was missing or damaged and was made again from the log")
        if len(self.request_log):
            rows = f"{sink.num_rows} rows and " if checkpoint else ""
            log.info(f"resuming: {rows}{len(self.request_log)} finished requests found, none will be generated again")


def open_sink(run: RunDir, config: SynthesisConfig, inputs_sha: str) -> tuple[DataSink, dict | None]:
    """As DataSink.open. A checkpoint with more rows than the budget allows by now is dropped: the log has it all."""
    sink, checkpoint = DataSink.open(run, config.rows_per_shard, inputs_sha)
    limit = config.budget.max_rows
    if checkpoint is None or limit is None or sink.num_rows < limit:
        return sink, checkpoint
    remove_progress(run)
    return DataSink.open(run, config.rows_per_shard, inputs_sha)


def goal_of(method: Method, config: SynthesisConfig) -> Goal:
    """What ends a run of the method."""
    budget = config.budget
    max_seconds = None if budget.max_minutes is None else 60 * budget.max_minutes
    return Goal(
        method.num_wanted, method.max_proposals, budget.max_rows, budget.max_completion_tokens, max_seconds
    )  # fmt: skip


def driver_counts(driver: Driver, sink: DataSink) -> dict:
    """The part of the result that the data decides, not the machine."""
    tally = driver.committed
    return {
        "is_complete": not driver.stopped_because,
        "stopped_because": driver.stopped_because,
        "spent_budget": driver.spent_budget,
        "num_requests": tally.num_requests,
        "num_generated": tally.num_generated,
        "num_accepted": sink.num_instructions,
        "num_rows": sink.num_rows,
        "num_seed_rows": sink.num_rows_by_method["seed"],
        "rejected": dict(sorted(sink.rejected.items())),
        "num_prompt_tokens": tally.num_prompt_tokens,
        "num_completion_tokens": tally.num_completion_tokens,
    }


async def _until_stopped(synthesis: Synthesis, stop: StopRequest) -> dict:
    """Run to the end, or until a signal comes. Raises Preempted then."""
    work = asyncio.create_task(synthesis.make())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not work.done():
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        raise Preempted(
            f"stopped by {stop.names[0]}; {len(synthesis.request_log)} finished requests are saved. Start the same "
            "command again to go on: none of them will be generated again."
        )
    return work.result()


def _skip(inputs: Inputs, run: RunDir) -> dict | None:
    """Leave a finished dataset alone, if it is sound. None: a budget cut it off that is higher by now."""
    for name in ("rejected", "instructions"):
        verify_manifest(run.data / name)
    manifest = verify_manifest(run.synthesized)
    counts, budget = manifest["counts"], inputs.config.budget.model_dump()
    if spent := counts["spent_budget"]:
        old, new = manifest["budget"][spent], budget[spent]
        if new is None or new > old:
            log.info(f"{manifest['rows']} rows were made before {counts['stopped_because']}; going on from the log")
            (run.synthesized / "manifest.json").unlink()
            remove_progress(run)
            return None
    remove_progress(run)
    log.info(f"already done: {manifest['rows']} rows in {run.synthesized}, skipped")
    if hint := how_to_go_on(counts, inputs.config.budget):
        log.info(f"INCOMPLETE ({counts['stopped_because']}). {hint}")
    run.event(STAGE, "skipped", num_rows=manifest["rows"])
    if run.result(STAGE).is_file():
        return json.loads(run.result(STAGE).read_text())
    result = {"status": "done", **counts}
    verify(run.root)
    write_json(run.result(STAGE), result)  # killed between the manifest and the result
    return result


def _first(errors: BaseExceptionGroup) -> BaseException:
    """The first single error of a group."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
