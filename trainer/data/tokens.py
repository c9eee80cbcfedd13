"""Sources to token arrays on disk. Rank 0 writes them once, and every rank maps the files into memory.

tokens = load_tokens(prepare_tokens(config, tokenizer, sources, cache_folder))
tokens.input_ids[tokens.offsets[d]:tokens.offsets[d + 1]]     # document d
"""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from cluster.data.rows import find_files, is_dataset
from cluster.data.turns import UnusableRow
from cluster.errors import InputError
from cluster.files import explain_full_disk, sha256_file, sha256_json, write_json
from cluster.run.fence import own_token, verify
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig
from trainer.data.chat import IGNORE, Encoded, check_template, encode_chat, encode_text
from trainer.data.sources import Examples
from trainer.data.template import ChatTemplate

TOKENIZER_BATCH = 1000  # texts
ENCODING = 4  # increment it if the same rows give other tokens or labels, so that older caches are not used


@dataclass(frozen=True)
class SourceFacts:
    """How many rows of one source were encoded, and why others were dropped."""

    path: str
    format: str
    num_documents: int
    dropped: dict[str, int]  # reason -> number of rows
    notes: dict[str, int] = field(default_factory=dict)  # what is special about rows that are kept -> number of rows
    first_dropped: dict[str, str] = field(default_factory=dict)  # reason -> place of the first such row


@dataclass(frozen=True)
class Tokens:
    """All documents of a job, joined end to end, source by source. Document d starts at `offsets[d]`."""

    input_ids: np.ndarray  # int32 [N], a memory map
    labels: np.ndarray  # int32 [N], a memory map
    offsets: np.ndarray  # int64 [D + 1]
    sources: tuple[SourceFacts, ...]
    rows: np.ndarray | None = None  # int64 [D]: the first document of the same row. None: every row is one document

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def trained_lengths(self) -> np.ndarray:
        """Number of labels of every document. int64 [D]"""
        return np.add.reduceat(self.labels != IGNORE, self.offsets[:-1], dtype=np.int64)

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> number of dropped rows, over all sources."""
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source.dropped)
        return dict(total)

    @property
    def notes(self) -> dict[str, int]:
        """What is special about examples that are kept -> number of examples, over all sources."""
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source.notes)
        return dict(total)

    @property
    def num_trained(self) -> int:
        """Number of tokens with a label."""
        return int((self.labels != IGNORE).sum())

    def span(self, document: int) -> slice:
        return slice(int(self.offsets[document]), int(self.offsets[document + 1]))


def cache_key(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, sources: Sequence[DataSource], key: str = "train.data"
) -> str:
    """A hash of everything that the tokens depend on: data, its columns, tokenizer, chat template, max_seq_len.

    Raises InputError, which names the recipe's `key`, if a source does not exist.
    """
    facts = []
    for source in sources:
        path = Path(source.path).expanduser()
        sealed = path / "manifest.json"
        if sealed.is_file():
            content: object = sha256_file(sealed)
        else:
            files = sorted(path.rglob("*")) if is_dataset(path) else find_files(path, key)
            content = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
        facts.append([content, source.format, source.columns])
    tokenizer_state = sha256_json(json.loads(tokenizer.backend_tokenizer.to_str()))
    ends = [tokenizer.eos_token, tokenizer.chat_template]
    settings = [config.max_seq_len, config.objective, config.fold_system, config.chat_template_kwargs]
    return sha256_json([ENCODING, facts, tokenizer_state, ends, *settings])[:16]


def prepare_tokens(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerFast,
    sources: Sequence[DataSource],
    cache_folder: Path,
    key: str = "train.data",
) -> Path:
    """Encode every row of `sources` into a folder below `cache_folder`, unless it exists. Returns that folder.

    Rows that cannot be masked correctly are dropped and counted by reason. Raises InputError, which names the recipe's
    `key`, if a source cannot be read or none of its rows is left.
    """
    folder = cache_folder / cache_key(config, tokenizer, sources, key)
    if (folder / "tokens.json").is_file():
        return folder
    partial = cache_folder / f".{folder.name}.partial{own_token() or ''}"
    facts: list[SourceFacts] = []
    offsets, rows = [0], []
    with explain_full_disk(cache_folder.parent):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    with (
        explain_full_disk(partial),
        open(partial / "input_ids.bin", "wb") as ids,
        open(partial / "labels.bin", "wb") as labels,
    ):
        for source in sources:
            examples = Examples(source, config.objective, key)
            notes: Counter[str] = Counter()
            before = len(offsets)
            for documents in _encode(config, tokenizer, examples, notes):
                if any(encoded.is_cut for encoded in documents):
                    notes[f"cut at train.max_seq_len={config.max_seq_len}"] += 1
                rows += [len(offsets) - 1] * len(documents)
                for encoded in documents:
                    refuse_unembedded(tokenizer, encoded, f"{key}: {source.path}")
                    ids.write(encoded.input_ids.tobytes())
                    labels.write(encoded.labels.tobytes())
                    offsets.append(offsets[-1] + len(encoded.input_ids))
            num_documents, formats = len(offsets) - before, ", ".join(examples.formats)
            if not num_documents:
                raise examples.dropped.untrainable(source.path, key)
            counts, first = dict(examples.dropped.counts), examples.dropped.first
            facts.append(SourceFacts(source.path, formats, num_documents, counts, dict(notes), first))
        (partial / "offsets.bin").write_bytes(np.asarray(offsets, dtype=np.int64).tobytes())
        (partial / "rows.bin").write_bytes(np.asarray(rows, dtype=np.int64).tobytes())
    write_json(partial / "tokens.json", {"num_tokens": offsets[-1], "sources": [asdict(source) for source in facts]})
    verify(cache_folder.parent)
    os.rename(partial, folder)
    return folder


def refuse_unembedded(tokenizer: PreTrainedTokenizerFast, encoded: Encoded, place: str) -> None:
    """Raise InputError if a document has a token that the model has no embedding for: see `load_tokenizer`."""
    num_embeddings = getattr(tokenizer, "num_embeddings", len(tokenizer))
    if (last := int(encoded.input_ids.max())) >= num_embeddings:
        raise InputError(
            f"{place} contains the token {tokenizer.convert_ids_to_tokens(last)!r} (id {last}), and model.path has "
            f"embeddings for {num_embeddings} tokens only. Remove the token, or resize the model's embedding."
        )


def require_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise InputError if the tokenizer has no token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "train.objective=text needs a tokenizer with an eos token, so that a text can end. Set `eos_token` in the "
            "tokenizer_config.json of model.path, or use another model."
        )


def load_tokens(folder: Path) -> Tokens:
    """Map the files that `prepare_tokens` wrote."""
    facts = json.loads((folder / "tokens.json").read_text())
    return Tokens(
        np.memmap(folder / "input_ids.bin", dtype=np.int32, mode="r"),
        np.memmap(folder / "labels.bin", dtype=np.int32, mode="r"),
        np.fromfile(folder / "offsets.bin", dtype=np.int64),
        tuple(SourceFacts(**source) for source in facts["sources"]),
        np.fromfile(folder / "rows.bin", dtype=np.int64),
    )


def _encode(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, examples: Examples, notes: Counter
) -> Iterator[list[Encoded]]:
    """The documents of every example that is kept. The others are counted in `examples.dropped`."""
    if config.objective == "text":
        yield from _encode_texts(config, tokenizer, examples)
        return
    template = ChatTemplate(tokenizer, config.chat_template_kwargs, config.fold_system)
    check_template(template)
    for conversation in examples:
        try:
            documents = encode_chat(template, conversation, config.max_seq_len)
        except UnusableRow as reason:
            examples.dropped.add(str(reason), examples.place)
            continue
        notes.update(f"with {part} that the chat template leaves out" for part in template.left_out(conversation))
        if len(documents) > 1:
            notes["in several examples, because the chat template writes earlier turns otherwise"] += 1
        yield documents


def _encode_texts(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, examples: Examples
) -> Iterator[list[Encoded]]:
    require_eos(tokenizer)
    texts = ((text, examples.place) for text in examples)
    while batch := list(itertools.islice(texts, TOKENIZER_BATCH)):
        encoded = tokenizer([text for text, _ in batch], return_special_tokens_mask=True, verbose=False)
        masks = encoded["special_tokens_mask"]
        for ids, is_added, (_, place) in zip(encoded["input_ids"], masks, batch, strict=True):
            if all(is_added):
                examples.dropped.add("no text", place)  # such as spaces that the tokenizer drops
            else:
                yield [encode_text(ids, tokenizer.eos_token_id, config.max_seq_len)]
