"""The synthesis stage: from a recipe's `synthesize`, `model` and `engine` to `data/synthesized` in the run folder.

`request_log.py` and `sink.py` describe the files that it writes.
"""

import asyncio
import gc
import json
import time
from collections.abc import Coroutine, Mapping

from cluster.config import ModelConfig
from cluster.engines.config import EngineConfig
from cluster.errors import InputError, Preempted, TunesmithError
from cluster.files import append_jsonl, write_json
from cluster.log import Progress, stage_logger
from cluster.processes.signals import StopRequest
from cluster.ray.cluster import ray_session
from cluster.run.fence import Superseded, run_lock, verify
from cluster.run.manifest import is_sealed, verify_manifest
from cluster.run.rundir import RunDir
from generation.config.common import BudgetConfig, SynthesisConfig
from generation.driver import Driver
from generation.inputs import Inputs, check_inputs, load_inputs
from generation.judge import Judge
from generation.method import MethodInputs
from generation.metrics import STAGE, Reporter, list_counts
from generation.request_log import RequestLog
from generation.requester import Requester
from generation.serving import serving
from generation.sink import DataSink, remove_checkpoint
from generation.state import Timers, from_json

NUM_EXAMPLES = 3  # of what was rejected, in the message that nothing was kept
MAX_EXAMPLE_CHARS = 200
log = stage_logger(STAGE)


def run(config: SynthesisConfig, model: ModelConfig, engine: EngineConfig, run: RunDir, seed: int) -> dict:
    """Synthesize the dataset and return the result, which is also in `result-synthesize.json`.

    A dataset that is complete and undamaged stays as it is. Interrupted work continues from the last checkpoint, and
    the requests after it are answered by the log. Raises InputError for bad input, Preempted after SIGTERM or SIGINT,
    TunesmithError if the engines fail or no row was made.
    """
    run.create()
    with run_lock(run.synthesis_lock), Progress(log) as progress:
        inputs = load_inputs(config, model, engine, seed)
        check_inputs(run, inputs)
        if is_sealed(run.synthesized) and (done := _skip(inputs, run)):
            return done
        run.event(STAGE, "started", method=inputs.method.NAME, num_engines=inputs.num_engines, inputs_sha=inputs.sha)
        try:
            with StopRequest() as stop, RequestLog(run.requests) as request_log, ray_session(run.root):
                stop.install()  # again: ray.init has taken SIGTERM
                result = asyncio.run(_until_stopped(_synthesize(inputs, run, request_log, progress), request_log, stop))
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
        if hint := budget_hint(result, config.budget):
            log.info(hint)
        return result


def _skip(inputs: Inputs, run: RunDir) -> dict | None:
    """The result of a complete dataset. None means that a budget cut the dataset short and has been raised since."""
    verify_manifest(run.rejected)
    verify_manifest(run.instructions)
    manifest = verify_manifest(run.synthesized)
    counts, budget = manifest["counts"], inputs.config.budget.model_dump()
    if spent := counts["spent_budget"]:
        old, new = manifest["budget"][spent], budget[spent]
        if new is None or new > old:
            log.info(f"{manifest['rows']} rows were made before {counts['stopped_because']}; continuing")
            (run.synthesized / "manifest.json").unlink()
            remove_checkpoint(run)
            return None
    remove_checkpoint(run)
    log.info(f"already done: {manifest['rows']} rows in {run.synthesized}, skipped")
    if hint := budget_hint(counts, inputs.config.budget):
        log.info(f"INCOMPLETE ({counts['stopped_because']}). {hint}")
    run.event(STAGE, "skipped", num_rows=manifest["rows"])
    if run.result(STAGE).is_file():
        return json.loads(run.result(STAGE).read_text())
    result = {"status": "done", **counts}  # killed after the manifest was written and before the result was
    verify(run.root)
    write_json(run.result(STAGE), result)
    return result


async def _until_stopped(work: Coroutine[None, None, dict], request_log: RequestLog, stop: StopRequest) -> dict:
    """Run `work` to its end. Raises Preempted if a signal comes before."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise Preempted(
            f"stopped by {stop.names[0]}; {len(request_log)} finished requests are saved. Start the same command "
            "again to continue: none of them will be generated again."
        )
    return task.result()


async def _synthesize(inputs: Inputs, run: RunDir, request_log: RequestLog, progress: Progress) -> dict:
    """Start the engines, run the method, seal the data, and return the result."""
    start = time.monotonic()
    config, timers = inputs.config, Timers()
    sink, checkpoint = open_sink(run, config, inputs.sha)
    _report_resume(sink, checkpoint, request_log)
    progress.update(f"starting {inputs.num_engines} engine(s) of {inputs.model_names}")
    async with serving(inputs.models) as served_models:
        gc.freeze()  # the garbage collector need not scan what exists by now, a million objects, again and again
        spent = from_json(checkpoint)[1] if checkpoint else None
        requester = Requester(served_models, request_log, inputs.seed, config.budget, timers, spent)
        method = inputs.method(config, MethodInputs(inputs.seeds, inputs.prompts, requester, timers, inputs.seed))
        judge = Judge(config.judge, inputs.prompts["row_judge"], requester) if config.judge else None
        driver = Driver(method, config, sink, judge, timers)
        reporter = Reporter(run, progress, driver, method, config, requester, timers)
        reporting = asyncio.create_task(reporter.report())
        try:
            await driver.run(checkpoint)
        except* TunesmithError as errors:
            raise errors.exceptions[0] from errors  # that of the driver's only task group
        finally:
            reporting.cancel()
        figures = reporter.result()
    counts = data_counts(driver, sink)
    fields = {"inputs_sha": inputs.sha, "counts": counts, "budget": config.budget.model_dump()}
    if counts["num_rows"] == counts["num_seed_rows"]:
        sink.seal_rejected(**fields)
        raise _no_row(counts, config.budget, sink, run)
    sink.seal(**fields)
    return {
        "status": "done",
        "method": method.NAME,
        **counts,
        "resumed_requests": requester.num_resumed,
        **figures,
        "seconds": round(time.monotonic() - start, 1),
    }


def open_sink(run: RunDir, config: SynthesisConfig, inputs_sha: str) -> tuple[DataSink, dict | None]:
    """As DataSink.open. If the checkpoint has more rows than max_rows allows now, it is dropped: the log has all."""
    sink, checkpoint = DataSink.open(run, config.rows_per_shard, inputs_sha)
    limit = config.budget.max_rows
    if checkpoint is None or limit is None or sink.num_rows < limit:
        return sink, checkpoint
    remove_checkpoint(run)
    return DataSink.open(run, config.rows_per_shard, inputs_sha)


def _report_resume(sink: DataSink, checkpoint: dict | None, request_log: RequestLog) -> None:
    if request_log.num_dropped_bytes:
        log.info(f"the last record of the request log was half-written: {request_log.num_dropped_bytes} bytes cut")
    if len(request_log):
        rows = f"{sink.num_rows} rows and " if checkpoint else ""
        log.info(f"resuming: {rows}{len(request_log)} finished requests found, none will be generated again")


def data_counts(driver: Driver, sink: DataSink) -> dict:
    """The part of the result that depends on the data, not on the machine."""
    committed = driver.committed
    return {
        "is_complete": not driver.stopped_because,
        "stopped_because": driver.stopped_because,
        "spent_budget": driver.spent_budget,
        "num_requests": committed.num_requests,
        "num_generated": committed.num_generated,
        "num_accepted": sink.num_instructions,
        "num_rows": sink.num_rows,
        "num_seed_rows": sink.num_rows_by_method["seed"],
        "rejected": dict(sorted(sink.rejected.items())),
        "num_prompt_tokens": committed.num_prompt_tokens,
        "num_completion_tokens": committed.num_completion_tokens,
    }


def _no_row(counts: Mapping, budget: BudgetConfig, sink: DataSink, run: RunDir) -> TunesmithError:
    if counts["spent_budget"]:
        return InputError(
            f"{counts['stopped_because']} before a single row was made (there are {counts['num_seed_rows']} seed rows)."
            f" {budget_hint(counts, budget)} What was generated is saved."
        )
    return TunesmithError(
        f"no row was made from {counts['num_generated']} generated instructions: "
        f"{counts['stopped_because'] or 'all were rejected'}; rejected: {list_counts(counts['rejected']) or 'none'}. "
        f"{_most_rejected(counts['rejected'], sink)}All that was rejected is in {run.rejected}, and all that the "
        f"models wrote in {run.requests}. If these texts are good, change what rejects them; if not, take a model that "
        "follows the prompts."
    )


def _most_rejected(rejected: Mapping[str, int], sink: DataSink) -> str:
    """What rejected the most, with examples."""
    if not rejected:
        return ""
    reason = max(rejected, key=rejected.__getitem__)
    examples = sink.rejected_examples(reason, NUM_EXAMPLES)
    texts = [row["output"] or row["instruction"] for row in examples]
    if examples[0]["filter"]:
        filters = "row_filters" if examples[0]["kind"] == "row" else "instruction_filters"
        texts = [row["instruction"] if filters == "instruction_filters" else row["output"] for row in examples]
        by = f"by the filter `{examples[0]['filter']}` of synthesize.{filters}"
    else:
        by = f"as {reason}"
    shown = [
        f"{text[:MAX_EXAMPLE_CHARS]!r}{f' ({detail})' if detail else ''}"
        for text, detail in zip(texts, (row["detail"] for row in examples), strict=True)
    ]
    return f"Most, {rejected[reason]}, were rejected {by}: {'; '.join(shown)}. "


def summary(result: dict) -> str:
    """The result in a line."""
    text = (
        f"{result['num_accepted']} of {result['num_generated']} instructions accepted, {result['num_rows']} rows "
        f"({result['num_seed_rows']} of them seeds), rejected: {list_counts(result['rejected']) or 'none'}; "
        f"{result['tokens_per_second']:,.0f} tok/s, {result['seconds']:.0f} s"
    )
    return text if result["is_complete"] else f"INCOMPLETE ({result['stopped_because']}): {text}"


def budget_hint(counts: Mapping[str, object], budget: BudgetConfig) -> str:
    """What to type after a budget was spent; empty if none was."""
    name = counts["spent_budget"]
    if name is None:
        return ""
    limit = 2 * getattr(budget, name)
    higher = limit if isinstance(limit, int) else f"{limit:g}"
    return (
        f"To continue, start the same command with a higher limit, for example synthesize.budget.{name}={higher}, or "
        f"without a limit, synthesize.budget.{name}=null. No finished request is generated again."
    )
