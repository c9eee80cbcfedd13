"""Datasets of every kind become the same tokens; what is broken is named, what cannot be masked is counted."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from cluster.errors import InputError
from cluster.run.manifest import write_manifest
from tests.trainer.tools import chat_documents, make_tokenizer, write_chats
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig
from trainer.data import tokens as data
from trainer.data.mixture import Mixture
from trainer.data.sources import Examples
from trainer.data.tokens import Tokens, load_tokens

CHATS = chat_documents(9)
CONFIG = TrainConfig(max_seq_len=512)


def as_jsonl(folder: Path) -> Path:
    return write_chats(folder / "chats.jsonl", CHATS)


def as_parquet(folder: Path) -> Path:
    Dataset.from_list([{"messages": chat, "id": number} for number, chat in enumerate(CHATS)]).to_parquet(
        folder / "chats.parquet"
    )
    return folder / "chats.parquet"


def as_arrow_folder(folder: Path) -> Path:
    Dataset.from_list([{"messages": chat} for chat in CHATS]).save_to_disk(folder / "saved")
    return folder / "saved"


def as_sealed_folder(folder: Path) -> Path:
    """As synthesis leaves it: an Arrow folder under a manifest."""
    path = as_arrow_folder(folder).rename(folder / "sealed")
    write_manifest(path, sorted(file.name for file in path.iterdir()), rows=len(CHATS))
    return path


def prepare(config: TrainConfig, tokenizer, paths: Iterable[Path], cache: Path) -> Path:
    return data.prepare_tokens(config, tokenizer, [DataSource(path=str(path)) for path in paths], cache)


def encode(tokenizer, cache: Path, *paths: Path, config: TrainConfig = CONFIG) -> Tokens:
    return load_tokens(prepare(config, tokenizer, paths, cache))


@pytest.mark.parametrize("make", [as_jsonl, as_parquet, as_arrow_folder, as_sealed_folder])
def test_every_kind_of_dataset_gives_the_same_tokens(chatml, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    tokens = encode(chatml, tmp_path / "cache", make(tmp_path))
    assert tokens.num_documents == len(CHATS)
    for document, chat in enumerate(CHATS):
        span = slice(tokens.offsets[document], tokens.offsets[document + 1])
        text = chatml.apply_chat_template(chat, tokenize=False)
        assert chatml.decode(tokens.input_ids[span].tolist()) == text
        labels = tokens.labels[span]
        trained = chatml.decode(labels[labels != -100].tolist())
        assert trained == "".join(turn["content"] + "<|im_end|>" for turn in chat if turn["role"] == "assistant")


def test_several_datasets_are_read_in_order(chatml, tmp_path: Path) -> None:
    one = write_chats(tmp_path / "one.jsonl", CHATS[:4])
    two = write_chats(tmp_path / "two.jsonl", CHATS[4:])
    both = encode(chatml, tmp_path / "cache", one, two)
    whole = encode(chatml, tmp_path / "cache", as_jsonl(tmp_path))
    assert both.input_ids.tolist() == whole.input_ids.tolist()
    assert both.offsets.tolist() == whole.offsets.tolist()


def broken_json(folder: Path) -> Path:
    path = as_jsonl(folder)
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:-5]
    path.write_text("\n".join(lines))
    return path


def flipped_byte(folder: Path) -> Path:
    path = as_sealed_folder(folder)
    shard = next(path.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return path


def cut_shard(folder: Path) -> Path:
    """Without a manifest only the Arrow reader can notice."""
    path = as_arrow_folder(folder)
    shard = next(path.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:100])
    return path


def file_of(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def empty_folder(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: folder / "absent.jsonl", r"train\.data: .*absent\.jsonl does not exist"),
        (file_of("empty.jsonl", ""), r"empty\.jsonl: the dataset has no rows"),
        (file_of("other.jsonl", '{"prompt": "a"}\n'), r"other\.jsonl: the columns \(`prompt`\) fit no format"),
        (broken_json, r"chats\.jsonl:4: not JSON"),
        (file_of("data.txt", "a,b\n"), r"data\.txt: the type of the file is unknown"),
        (file_of("bad.parquet", "not parquet"), r"bad\.parquet: the file cannot be read as parquet"),
        (empty_folder, r"train\.data: .*nothing is no dataset folder"),
        (flipped_byte, r"sealed/data-00000-of-00001\.arrow: corrupt"),
        (cut_shard, r"saved: the dataset folder cannot be read"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_named(chatml, tmp_path: Path, make, complaint: str) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError, match=complaint):
        encode(chatml, tmp_path / "cache", path)


def test_rows_that_cannot_be_masked_are_left_out_and_counted(chatml, tmp_path: Path) -> None:
    question = {"role": "user", "content": "fig"}
    odd = [[question], [question, {"role": "assistant", "content": None}], [question], []]
    path = write_chats(tmp_path / "chats.jsonl", [*CHATS[:2], *odd, CHATS[2]])
    tokens = encode(chatml, tmp_path / "cache", path)
    assert tokens.num_documents == 3
    assert tokens.dropped == {"no assistant turn": 2, "an answer is empty": 1, NOT_TURNS: 1}


@pytest.mark.parametrize("objective", ["chat", "text"])
def test_examples_that_are_cut_are_counted(chatml, tmp_path: Path, objective: str) -> None:
    texts = ["fig", "apple brook " * 100, "plum " * 100]
    turns = [[{"role": "user", "content": "Say"}, {"role": "assistant", "content": text}] for text in texts]
    column, cells = ("text", texts) if objective == "text" else ("messages", turns)
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({column: cell}) + "\n" for cell in cells))
    tokens = encode(chatml, tmp_path / "cache", path, config=TrainConfig(objective=objective, max_seq_len=64))
    assert tokens.lengths.max() == 64
    assert tokens.notes == {"cut at train.max_seq_len=64": 2}
    assert (
        "long.jsonl: 3 examples, 2 cut at train.max_seq_len=64"
        in Mixture(tokens, TrainConfig(), 0).shares[0].describe()
    )


NOT_TURNS = "`messages` is not a list of turns"


def test_a_dataset_of_which_nothing_is_left_is_an_error_with_the_reasons(chatml, tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chats.jsonl", [[{"role": "user", "content": "fig"}]] * 3)
    with pytest.raises(
        InputError, match=r"no row of .*chats\.jsonl can be trained on \(no assistant turn: 3, .*chats\.jsonl:1\)"
    ):
        encode(chatml, tmp_path / "cache", path)


def test_plain_text_is_encoded_with_its_end_and_rows_without_text_are_counted(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("apple brook", "", None, "cedar")))
    tokens = encode(tokenizer, tmp_path / "cache", path, config=TrainConfig(objective="text"))
    assert tokenizer.decode(tokens.input_ids.tolist()) == "apple brook<|endoftext|>cedar<|endoftext|>"
    assert tokens.dropped == {"no text": 2}
    assert tokens.num_trained == len(tokens.input_ids) - tokens.num_documents


def test_text_that_the_tokenizer_drops_is_counted(tmp_path: Path) -> None:
    from tokenizers import normalizers

    stripping = make_tokenizer()
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "apple"}\n{"text": "  "}\n')
    tokens = encode(stripping, tmp_path / "cache", path, config=TrainConfig(objective="text"))
    assert (tokens.num_documents, tokens.dropped) == (1, {"no text": 1})


def test_plain_text_needs_an_end_token(tmp_path: Path) -> None:
    endless = make_tokenizer()
    endless.eos_token = None
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "apple"}\n')
    with pytest.raises(InputError, match="needs a tokenizer with an eos token"):
        encode(endless, tmp_path / "cache", path, config=TrainConfig(objective="text"))


def test_what_is_encoded_already_is_not_encoded_again(chatml, tmp_path: Path, monkeypatch) -> None:
    path = as_jsonl(tmp_path)
    first = prepare(CONFIG, chatml, [path], tmp_path / "cache")
    monkeypatch.setattr(data, "encode_chat", None)  # calling it would fail
    assert prepare(CONFIG, chatml, [path], tmp_path / "cache") == first


def test_the_cache_is_not_used_for_other_data_template_cut_or_end_token(tmp_path: Path) -> None:
    def key(config: TrainConfig = CONFIG, **changes: str) -> str:
        own = make_tokenizer("<|im_start|>", "<|im_end|>")
        own.chat_template = "{{ messages }}"
        for name, value in changes.items():
            setattr(own, name, value)
        return data.cache_key(config, own, [DataSource(path=str(path))])

    path = as_jsonl(tmp_path)
    keys = [
        key(), key(TrainConfig(max_seq_len=64)), key(TrainConfig(max_seq_len=512, objective="text")),
        key(chat_template="{{ messages[0] }}"), key(eos_token="<|im_end|>"),
    ]  # fmt: skip
    assert key(TrainConfig(max_seq_len=512, learning_rate=1.0)) == keys[0]
    write_chats(path, CHATS[1:])
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_half_written_tokens_are_not_taken_for_whole_ones(chatml, tmp_path: Path) -> None:
    path = as_jsonl(tmp_path)
    whole = prepare(CONFIG, chatml, [path], tmp_path / "cache")
    partial = tmp_path / "cache" / f".{whole.name}.partial"
    shutil.copytree(whole, partial)
    (partial / "input_ids.bin").write_bytes(b"torn")
    expected = np.array(load_tokens(whole).input_ids)
    shutil.rmtree(whole)
    assert (encode(chatml, tmp_path / "cache", path).input_ids == expected).all()


def test_splits_have_to_be_told_apart(tmp_path: Path) -> None:
    from datasets import DatasetDict

    part = Dataset.from_list([{"messages": CHATS[0]}])
    DatasetDict(train=part, test=part).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"splits: (there are several splits|this is no dataset folder)"):
        list(Examples(DataSource(path=str(tmp_path / "splits")), "chat"))
