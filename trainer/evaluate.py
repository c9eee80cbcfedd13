"""Exact match and ROUGE-L on held-out tasks: the model before tuning against the tuned one.

The base model answers every question twice: in chat form, as the tuned model does, and in the plain-text form that it
may know from pretraining. The plain-text figures show what the base could do before tuning. The difference between the
two models in chat form shows what tuning changed.
"""

import asyncio
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerFast

from cluster.config import ModelConfig
from cluster.data.conversations import user_turn
from cluster.data.rows import Rows
from cluster.data.turns import UnusableRow, parse_json, require_text
from cluster.engines.config import EngineConfig, GenerationRequest, Sampling
from cluster.engines.placement import fit_to_cluster
from cluster.engines.pool import EnginePool
from cluster.errors import InputError
from cluster.files import append_jsonl, sha256_json, write_json
from cluster.log import Progress, stage_logger
from cluster.model_source import model_revision
from cluster.processes.signals import interrupt_on_sigterm
from cluster.ray.cluster import ray_session
from cluster.run.fence import verify
from cluster.run.manifest import is_sealed
from cluster.run.rundir import RunDir
from trainer.config.evaluate import EvaluateConfig
from trainer.model.tokenizer import load_tokenizer

log = stage_logger("evaluate")
EVALUATION_KEYS = {"id", "task", "group", "instruction", "input", "references"}


@dataclass(frozen=True)
class EvaluateJob:
    run: RunDir
    model: ModelConfig  # before tuning
    engine: EngineConfig
    config: EvaluateConfig
    sets: tuple[Path, ...]
    plain_prompt: Path  # Jinja template of the plain-text form: variables `instruction` and `input`
    chat_template: str | None  # the recipe's, for the base; the tuned model carries its own
    chat_template_kwargs: dict[str, Any]  # the recipe's, for both models


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with one form of prompt."""

    name: str  # of the file of its predictions
    title: str
    source: ModelConfig
    is_plain: bool  # plain-text form instead of chat form


def run(job: EvaluateJob) -> dict:
    """Evaluate and return the result: figures by model and group. Predictions that exist are not generated again.

    Raises InputError if a set cannot be read or no exported model exists.
    """
    rows = [row for path in job.sets for row in read_set(path)]
    models = models_of(job)
    figures = {}
    with Progress(log) as progress:
        for source in dict.fromkeys(model.source for model in models):
            same_source = [model for model in models if model.source == source]
            figures |= asyncio.run(_evaluate(job, same_source, rows, progress))
    result = {"status": "done", "num_rows": len(rows), "models": figures}
    verify(job.run.root)
    write_json(job.run.result("evaluate"), result)
    append_jsonl(job.run.metrics, {"stage": "evaluate", **result})
    return result


def models_of(job: EvaluateJob) -> list[EvaluatedModel]:
    """The models to compare. Raises InputError if no exported model exists."""
    if not is_sealed(job.run.export):
        raise InputError(f"{job.run.export}: there is no exported model. Run `tunesmith export` first.")
    tuned = EvaluatedModel("tuned", "tuned", ModelConfig(path=str(job.run.export)), is_plain=False)
    if not job.config.compare_base:
        return [tuned]
    base = EvaluatedModel("base", "base, chat", job.model, is_plain=False)
    return [base, EvaluatedModel("base-plain", "base, plain text", job.model, is_plain=True), tuned]


async def _evaluate(
    job: EvaluateJob, models: list[EvaluatedModel], rows: list[dict], progress: Progress
) -> dict[str, dict]:
    """Figures by title of models with the same source. Starts no engine if all predictions exist."""
    source, sampling = models[0].source, job.config.sampling
    tokenizer, num_added = load_tokenizer(source, job.chat_template if source == job.model else None)
    scored: dict[str, list[dict]] = {}
    missing = []
    for model in models:
        if num_added and not model.is_plain:
            log.info(f"{model.title}: skipped, because its vocabulary lacks tokens of the chat template")
            continue
        plain_prompt = job.plain_prompt if model.is_plain else None
        prompts = [render(tokenizer, row, plain_prompt, job.chat_template_kwargs) for row in rows]
        key = sha256_json([model_revision(source), prompts, sampling.model_dump(mode="json")])
        file = job.run.answers(model.name)
        done = json.loads(file.read_text()) if file.is_file() else {}
        if done.get("key") == key:
            log.info(f"{model.title}: {len(done['rows'])} predictions exist already")
            scored[model.title] = done["rows"]
        else:
            missing.append((model, prompts, key, file))
    if missing:
        with ray_session(job.run.root):
            interrupt_on_sigterm()
            engine = fit_to_cluster(job.engine)
            if engine.num_replicas < job.engine.num_replicas:
                log.info(f"of {job.engine.num_replicas} engines {engine.num_replicas} run, as Ray has room for no more")
            async with EnginePool.start(engine, source) as pool:
                for model, prompts, key, file in missing:
                    answers = await _generate(pool, model, prompts, sampling, progress)
                    predictions = [score(row, answer) for row, answer in zip(rows, answers, strict=True)]
                    file.parent.mkdir(exist_ok=True)
                    verify(job.run.root)
                    write_json(file, {"key": key, "rows": predictions})
                    scored[model.title] = predictions
                    log.info(f"{model.title}: {describe(summarise(predictions))}")
    return {model.title: summarise(scored[model.title]) for model in models if model.title in scored}


async def _generate(
    pool: EnginePool, model: EvaluatedModel, prompts: list[list[int]], sampling: Sampling, progress: Progress
) -> list[str]:
    """The answers to `prompts`, in their order."""
    if model.is_plain:
        sampling = sampling.model_copy(update={"stop": (*sampling.stop, "\n")})
    num_done = 0

    async def answer(number: int, prompt: list[int]) -> str:
        nonlocal num_done
        completion = await pool.generate(GenerationRequest(f"{model.name}-{number}", prompt, sampling))
        num_done += 1
        progress.update(f"{model.title}: {num_done}/{len(prompts)} answers")
        return completion.text

    return await asyncio.gather(*(answer(number, prompt) for number, prompt in enumerate(prompts)))


def read_set(path: Path) -> list[dict]:
    """Read an evaluation file. Raises InputError if it is missing or empty, or naming a row that is wrong."""
    rows = []
    for place, row in Rows(path, "evaluate.sets"):
        if missing := EVALUATION_KEYS - set(row):
            raise InputError(
                f"{place}: the row lacks {', '.join(sorted(missing))}. It needs {', '.join(sorted(EVALUATION_KEYS))}."
            )
        try:
            texts = {column: require_text(row[column], column) for column in ("instruction", "input")}
            references = parse_json(row["references"], "references")
        except UnusableRow as error:
            raise InputError(f"{place}: {error}. Fix or remove this row.") from error
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references) or not references:
            raise InputError(f"{place}: `references` is not a list of texts. Fix or remove this row.")
        rows.append({**row, **texts, "references": references})
    if not rows:
        raise InputError(f"evaluate.sets: {path} is empty. Give a file with at least one task, or leave it out.")
    return rows


def render(
    tokenizer: PreTrainedTokenizerFast, row: dict, plain_prompt: Path | None, chat_template_kwargs: dict[str, Any]
) -> list[int]:
    """Token ids of a row's prompt: in chat form, or in the plain-text form if `plain_prompt` is given."""
    if plain_prompt is not None:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(plain_prompt.read_text())
        text = template.render(instruction=row["instruction"], input=row["input"])
        return tokenizer(text)["input_ids"]  # with a begin token, as in pretraining, if the tokenizer has one
    messages = [{"role": "user", "content": user_turn(row["instruction"], row["input"])}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **chat_template_kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def score(row: dict, answer: str) -> dict:
    """The row with its answer and two metrics, each against the reference that fits best.

    exact_match: whether both texts are equal, except for the amount of white space.
    rouge_l: F-measure with stemming, as in Super-NaturalInstructions (Wang et al. 2022, section 6). From 0 to 1.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    normalized = " ".join(answer.split())
    return {
        "id": row["id"], "task": row["task"], "group": row["group"],
        "question": user_turn(row["instruction"], row["input"]), "answer": answer, "references": row["references"],
        "exact_match": any(normalized == " ".join(reference.split()) for reference in row["references"]),
        "rouge_l": max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in row["references"]),
    }  # fmt: skip


def summarise(scored: list[dict]) -> dict[str, dict]:
    """Means by group and, below it, by task."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in scored:
        groups[row["group"]].append(row)
    return {
        group: {
            **_means(rows),
            "tasks": {
                task: _means([r for r in rows if r["task"] == task]) for task in sorted({r["task"] for r in rows})
            },
        }
        for group, rows in groups.items()
    }


def _means(rows: list[dict]) -> dict:
    return {
        "num_rows": len(rows),
        "exact_match": round(sum(row["exact_match"] for row in rows) / len(rows), 4),
        "rouge_l": round(sum(row["rouge_l"] for row in rows) / len(rows), 4),
    }


def describe(groups: dict[str, dict]) -> str:
    return "; ".join(f"{group} {figures['exact_match']:.1%} exact" for group, figures in groups.items())
