"""The rows that training sees, in its order: which text is trained, and which is only read."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from cluster.errors import InputError
from cluster.model_source import locate_model
from launcher.recipe import Recipe
from trainer.data.batches import Batches
from trainer.data.chat import IGNORE
from trainer.data.template import ChatTemplate
from trainer.data.tokens import Tokens, cache_key, load_tokens, prepare_tokens
from trainer.job import TrainJob
from trainer.model.tokenizer import load_tokenizer

STYLES = {"masked": "dim", "trained": "green", "end": "reverse green"}


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one document that are of one kind."""

    text: str
    kind: str  # masked, trained, or end: a trained token that ends a turn


def print_rows(recipe: Recipe, num_rows: int, console: Console) -> None:
    """Print the first rows of a recipe's first epoch, then figures of all rows. Writes nothing into the run folder.

    Raises InputError for what training would refuse.
    """
    job = TrainJob(recipe.run, locate_model(recipe.model), recipe.train, recipe.seed)
    if not recipe.train.data and not Path(job.sources[0].path).exists():
        raise InputError(f"{recipe.run.root} has no dataset yet. Run `tunesmith synthesize` first, or set train.data.")
    tokenizer, _ = load_tokenizer(job.model, recipe.train.chat_template)
    ends = {tokenizer.eos_token_id}
    if recipe.train.objective == "chat":
        ends = set(ChatTemplate(tokenizer).ends.values())
    with _tokens(job, tokenizer) as tokens:
        batches = Batches(tokens, recipe.train, recipe.seed, 0, recipe.train.num_processes)
        rows = itertools.chain.from_iterable(map(batches.rows_of_step, range(batches.steps_per_epoch)))
        for number, row in enumerate(itertools.islice(rows, num_rows), 1):
            _print_row(number, row, tokens, tokenizer, ends, recipe.train.max_seq_len, console)
        for line in batches.describe():
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _tokens(job: TrainJob, tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokens]:
    """The run's own tokens if there are any, else tokens that are made now and removed afterwards."""
    cached = job.run.tokens / cache_key(job.config, tokenizer, job.sources)
    if (cached / "tokens.json").is_file():
        yield load_tokens(cached)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield load_tokens(prepare_tokens(job.config, tokenizer, job.sources, Path(folder)))


def spans(tokenizer: PreTrainedTokenizerFast, input_ids: np.ndarray, labels: np.ndarray, ends: set[int]) -> list[Span]:
    """One document as spans of text. A token is trained if the position before it has it as its label."""
    trained = np.concatenate([[False], labels[:-1] != IGNORE])
    kinds = [
        "masked" if not is_trained else "end" if int(token) in ends else "trained"
        for token, is_trained in zip(input_ids, trained, strict=True)
    ]
    found, begin = [], 0
    for kind, group in itertools.groupby(kinds):
        end = begin + len(list(group))
        found.append(Span(tokenizer.decode(input_ids[begin:end].tolist(), skip_special_tokens=False), kind))
        begin = end
    return found


def styled(parts: list[Span], in_color: bool) -> Text:
    """The text in color for a terminal, else with [[ ]] around what is trained."""
    if in_color:
        return Text.assemble(*((part.text, STYLES[part.kind]) for part in parts))
    text = ""
    for is_masked, group in itertools.groupby(parts, lambda part: part.kind == "masked"):
        joined = "".join(part.text for part in group)
        text += joined if is_masked else f"[[{joined}]]"
    return Text(text)


def _print_row(
    number: int, row: list[int], tokens: Tokens, tokenizer: PreTrainedTokenizerFast, ends: set[int], capacity: int,
    console: Console,
) -> None:  # fmt: skip
    used = int(tokens.lengths[row].sum())
    console.print(f"━━ row {number}: {used} of {capacity} tokens, {len(row)} documents", style="bold", highlight=False)
    last_documents = np.cumsum([source.num_documents for source in tokens.sources])
    for document in row:
        source = tokens.sources[int(np.searchsorted(last_documents, document, side="right"))]
        border = (
            f"── document {document} from {source.path}: {tokens.lengths[document]} tokens, "
            f"{tokens.trained_lengths[document]} trained"
        )
        console.print(border, style="cyan", markup=False, highlight=False, soft_wrap=True)
        span = tokens.span(document)
        parts = spans(tokenizer, tokens.input_ids[span], tokens.labels[span], ends)
        console.print(styled(parts, console.is_terminal), soft_wrap=True)
