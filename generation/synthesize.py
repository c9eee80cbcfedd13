"""The synthesis stage: from a recipe's `synthesize`, `model` and `engine` to `data/synthesized` in the run folder.

run/requests.log          every finished request; resuming is reading it again
run/data/synthesized/     the dataset, sealed by its manifest
run/data/rejected/        what did not pass, each with its reason
run/data/instructions.jsonl   the machine's instructions with their nearest neighbors
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.config import ModelConfig
from cluster.engine_config import EngineConfig
from cluster.errors import InputError, Preempted, TunesmithError
from cluster.files import exclusive_lock, sha256_file, sha256_json, write_atomic, write_json
from cluster.manifest import is_sealed, verify_manifest
from cluster.model_source import locate_model, model_revision
from cluster.pool import EnginePool
from cluster.progress import Progress
from cluster.ray_cluster import ray_session
from cluster.rundir import RunDir, append_jsonl
from cluster.stop_signals import StopRequest, stop_signals
from generation.config import SynthesizeConfig
from generation.methods.self_instruct import METHOD, PROMPTS, Instances, SelfInstruct
from generation.records import REJECTED_SCHEMA, SCHEMA, Record, RejectedRecord
from generation.request_log import RequestLog
from generation.requester import Requester
from generation.seed_tasks import SeedTask, load_seed_tasks
from generation.store import DatasetWriter
from generation.templates import Prompt, load_prompts

STAGE = "synthesize"
PACKAGE = Path(__file__).parent
REPORT_SECONDS = 1.0
METRICS_SECONDS = 10.0


@dataclass(frozen=True)
class Inputs:
    """All that decides the data, read and checked. sha: the hash of it."""

    config: SynthesizeConfig
    seeds: list[SeedTask]
    prompts: dict[str, Prompt]
    model: ModelConfig  # with an absolute path
    model_name: str  # as the recipe has it
    model_revision: str
    seed: int
    sha: str


def run(config: SynthesizeConfig, model: ModelConfig, engine: EngineConfig, run: RunDir, seed: int) -> dict:
    """Synthesize the dataset and return the verdict, which is also in `verdict-synthesize.json`.

    A dataset that is sealed and sound is left as it is. Interrupted work goes on: finished requests are read from
    the log. Raises InputError for bad input, Preempted after SIGTERM or SIGINT, TunesmithError if the engines fail or
    nothing could be kept.
    """
    run.create()
    with exclusive_lock(run.root / ".lock-synthesize", str(run.root)), Progress(STAGE) as progress:
        inputs = load_inputs(config, model, engine, seed)
        if is_sealed(run.data / "synthesized"):
            return _skip(inputs, run, progress)
        run.event(STAGE, "started", num_replicas=engine.num_replicas, inputs_sha=inputs.sha)
        try:
            with stop_signals() as stop, RequestLog(run.root / "requests.log") as log, ray_session(run.root):
                stop.install()  # again: ray.init has taken SIGTERM
                verdict = asyncio.run(_until_stopped(Synthesis(inputs, engine, run, log, progress), stop))
        except Preempted as stopped:
            run.event(STAGE, "preempted", reason=str(stopped))
            raise
        except TunesmithError as error:
            run.event(STAGE, "failed", reason=str(error))
            raise
        write_json(run.verdict(STAGE), verdict)
        append_jsonl(run.metrics, {"stage": STAGE, **verdict})
        run.event(STAGE, "finished", num_rows=verdict["num_rows"])
        progress.line(summary(verdict))
        return verdict


def load_inputs(config: SynthesizeConfig, model: ModelConfig, engine: EngineConfig, seed: int) -> Inputs:
    """Find and check seeds, prompts and model. `auto` means the model's own where it brings some."""
    located = locate_model(model)
    own = Path(located.path) / "tunesmith"
    packaged_seeds, packaged_prompts = PACKAGE / "seeds" / "seed_tasks.jsonl", PACKAGE / "prompts" / METHOD
    own_seeds, own_prompts = own / "seed_tasks.jsonl", own / "prompts"
    seeds_path, prompts_path = Path(config.seeds).expanduser(), Path(config.prompts).expanduser()
    if config.seeds == "auto":
        seeds_path = own_seeds if own_seeds.is_file() else packaged_seeds
    if config.prompts == "auto":
        prompts_path = own_prompts if own_prompts.is_dir() else packaged_prompts
    seeds = load_seed_tasks(seeds_path)
    prompts = load_prompts(prompts_path, PROMPTS)
    revision = model_revision(located)
    identity = {
        "synthesize": config.model_dump(exclude={"seeds", "prompts"}),
        "seeds": sha256_file(seeds_path),
        "prompts": {name: prompt.sha for name, prompt in prompts.items()},
        "model_revision": revision,
        "max_model_len": engine.max_model_len,
        "seed": seed,
    }
    return Inputs(config, seeds, prompts, located, model.path, revision, seed, sha256_json(identity))


class DataSink:
    """The files of one synthesis, and the counts of what went into them."""

    def __init__(self, run: RunDir, rows_per_shard: int) -> None:
        # The manifest of `synthesized` vouches for all three, so it goes first when begun and comes last when sealed.
        self._rows = DatasetWriter(run.data / "synthesized", SCHEMA, rows_per_shard)
        self._rejected = DatasetWriter(run.data / "rejected", REJECTED_SCHEMA, rows_per_shard)
        self._instructions_path = run.data / "instructions.jsonl"
        self._instructions: list[str] = []
        self.num_rows_by_method: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()

    def add_row(self, record: Record) -> None:
        self.num_rows_by_method[record.method] += 1
        self._rows.add(record.to_row())

    def add_rejected(self, record: RejectedRecord) -> None:
        self.rejected[record.rejection.reason] += 1
        self._rejected.add(record.to_row())

    def add_instruction(self, instances: Instances) -> None:
        instruction = instances.instruction
        row = {
            "id": instruction.id,
            "instruction": instruction.text,
            "is_classification": instances.is_classification,
            "request_id": instruction.request_id,
            "nearest": [asdict(neighbor) for neighbor in instruction.nearest],
        }
        self._instructions.append(json.dumps(row, ensure_ascii=False) + "\n")

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    def seal(self, **fields: object) -> None:
        self._rejected.seal(**fields)
        write_atomic(self._instructions_path, "".join(self._instructions))
        self._rows.seal(**fields)


class Synthesis:
    """One attempt at the stage."""

    def __init__(self, inputs: Inputs, engine: EngineConfig, run: RunDir, log: RequestLog, progress: Progress) -> None:
        self.log = log
        self._inputs = inputs
        self._engine = engine
        self._run = run
        self._progress = progress
        self._start = time.monotonic()

    async def make(self) -> dict:
        """Start the engines, run the method, seal the data, and return the verdict."""
        inputs, progress = self._inputs, self._progress
        if self.log.num_dropped_bytes:
            progress.line(f"the last record of requests.log was half-written: {self.log.num_dropped_bytes} bytes cut")
        if len(self.log):
            progress.line(f"resuming: {len(self.log)} finished requests found, none will be generated again")
        progress.update(f"starting {self._engine.num_replicas} engine(s) of {inputs.model_name}")
        async with EnginePool.start(self._engine, inputs.model) as pool:
            self._start_generating = time.monotonic()
            requester = Requester(pool, self.log, inputs.model_name, inputs.model_revision, inputs.seed)
            sink = DataSink(self._run, inputs.config.rows_per_shard)
            method = SelfInstruct(inputs.config, inputs.seeds, inputs.prompts, requester, sink, inputs.seed)
            reporter = asyncio.create_task(self._report(pool, method, sink))
            try:
                await method.run()
            except* TunesmithError as errors:
                raise _first(errors) from errors
            finally:
                reporter.cancel()
        counts = self._counts(method, sink)
        if method.num_kept == 0:
            raise TunesmithError(
                f"nothing was kept of {method.num_generated} instructions: {method.stopped_because}; rejected "
                f"{_listed(sink.rejected) or 'nothing'}. See what the model writes in {self._run.root}/requests.log; "
                "a base model that follows the prompts is needed."
            )
        sink.seal(inputs_sha=inputs.sha, counts=counts)
        seconds = time.monotonic() - self._start
        return {
            **counts,
            "resumed_requests": requester.num_resumed,
            "num_engine_restarts": pool.stats.num_restarts,
            "tokens_per_second": round(self._tokens_per_second(pool), 1),
            "seconds": round(seconds, 1),
        }

    def _counts(self, method: SelfInstruct, sink: DataSink) -> dict:
        """The part of the verdict that the data decides, not the machine."""
        return {
            "is_complete": not method.stopped_because,
            "stopped_because": method.stopped_because,
            "num_requests": method.num_requests,
            "num_generated": method.num_generated,
            "num_kept": method.num_kept,
            "num_rows": sink.num_rows,
            "num_seed_rows": sink.num_rows_by_method["seed"],
            "rejected": dict(sorted(sink.rejected.items())),
            "num_prompt_tokens": method.num_prompt_tokens,
            "num_completion_tokens": method.num_completion_tokens,
        }

    def _tokens_per_second(self, pool: EnginePool) -> float:
        return pool.stats.num_completion_tokens / max(time.monotonic() - self._start_generating, 1e-9)

    async def _report(self, pool: EnginePool, method: SelfInstruct, sink: DataSink) -> None:
        """Say how far it is, every second, and put it in metrics.jsonl now and then."""
        last_metrics = time.monotonic()
        num_restarts = 0
        while True:
            if pool.stats.num_restarts > num_restarts:
                num_restarts = pool.stats.num_restarts
                self._progress.line(f"an engine died ({pool.stats.last_death}); restart {num_restarts}")
                self._run.event(STAGE, "engine_restarted", reason=pool.stats.last_death)
            speed = self._tokens_per_second(pool)
            self._progress.update(
                f"{method.num_kept}/{self._inputs.config.num_instructions} instructions kept, {sink.num_rows} rows, "
                f"{sink.rejected.total()} rejected ({_listed(sink.rejected)}), {speed:,.0f} tok/s"
            )
            if time.monotonic() - last_metrics >= METRICS_SECONDS:
                last_metrics = time.monotonic()
                row = {"num_kept": method.num_kept, "num_rows": sink.num_rows, "tokens_per_second": round(speed, 1)}
                append_jsonl(self._run.metrics, {"stage": STAGE, **row, **asdict(pool.stats)})
            await asyncio.sleep(REPORT_SECONDS)


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
            f"stopped by {stop.signal_name}; {len(synthesis.log)} finished requests are saved. Start the same command "
            "again to go on: none of them will be generated again."
        )
    return work.result()


def _skip(inputs: Inputs, run: RunDir, progress: Progress) -> dict:
    """Leave a finished dataset alone, if it is sound and made of the same inputs."""
    verify_manifest(run.data / "rejected")
    manifest = verify_manifest(run.data / "synthesized")
    if manifest["inputs_sha"] != inputs.sha:
        raise InputError(
            f"{run.data / 'synthesized'} was made with other settings, seeds, prompts or another model. Choose another "
            "folder with `--run-dir`, or remove this one to make it anew; requests that are the same stay in "
            "requests.log and are not generated again."
        )
    progress.line(f"already done: {manifest['rows']} rows in {run.data / 'synthesized'}, skipped")
    run.event(STAGE, "skipped", num_rows=manifest["rows"])
    if run.verdict(STAGE).is_file():
        return json.loads(run.verdict(STAGE).read_text())
    write_json(run.verdict(STAGE), manifest["counts"])  # killed between the manifest and the verdict
    return manifest["counts"]


def summary(verdict: dict) -> str:
    """The verdict in a line."""
    text = (
        f"{verdict['num_kept']} of {verdict['num_generated']} instructions kept, {verdict['num_rows']} rows "
        f"({verdict['num_seed_rows']} of them seeds), rejected: {_listed(verdict['rejected']) or 'none'}; "
        f"{verdict['tokens_per_second']:,.0f} tok/s, {verdict['seconds']:.0f} s"
    )
    return text if verdict["is_complete"] else f"INCOMPLETE ({verdict['stopped_because']}): {text}"


def _listed(counts: dict[str, int]) -> str:
    """Counts by reason, the largest first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ranked)


def _first(errors: BaseExceptionGroup) -> BaseException:
    """The first single error of a group."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
