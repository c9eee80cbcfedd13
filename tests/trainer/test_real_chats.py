"""Real conversations: the labels are those of a walk over the tokens, or over the file, that knows no template."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.config import ModelConfig
from tests.trainer.test_tool_templates import TAGGED, tokenizer_with
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig
from trainer.data.chat import IGNORE
from trainer.data.tokens import load_tokens, prepare_tokens
from trainer.model.tokenizer import load_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not REAL.is_dir(), reason="the real files are not beside this checkout (../shared/data)"
)


def prepare(tokenizer, name: str, folder: Path):
    config = TrainConfig(max_seq_len=1 << 16)
    return load_tokens(prepare_tokens(config, tokenizer, [DataSource(path=str(REAL / name))], folder))


@pytest.mark.real
def test_labels_of_a_real_template_are_those_between_its_markers(english_model: Path, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(ModelConfig(path=str(english_model)), None)
    tokens = prepare(tokenizer, "fastchat/dummy_conversation.json", tmp_path)
    start, end, line_break = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "Ċ"])
    assert (tokens.num_documents, tokens.dropped) == (500, {})
    for document in range(tokens.num_documents):
        ids = tokens.input_ids[tokens.span(document)].tolist()
        expected = [IGNORE] * len(ids)
        for opening in [place for place, token in enumerate(ids) if token == start]:
            first = ids.index(line_break, opening) + 1
            if tokenizer.decode(ids[opening + 1 : first]) == "assistant\n":
                last = ids.index(end, first)
                expected[first - 1 : last] = ids[first : last + 1]
        assert tokens.labels[tokens.span(document)].tolist() == expected


def test_real_calls_are_trained_as_the_file_has_them(tmp_path: Path) -> None:
    name = "tools/glaive_toolcall_en_demo.json"
    tokenizer = tokenizer_with(TAGGED)
    tokens = prepare(tokenizer, name, tmp_path)
    rows = json.loads((REAL / name).read_text())
    assert (tokens.num_documents, tokens.dropped) == (len(rows), {})
    num_calls = 0
    for document, row in enumerate(rows):
        said = ""
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                num_calls += 1
                said += f"<call>{json.dumps(json.loads(turn['value']), ensure_ascii=False)}</call><|im_end|>"
            elif turn["from"] == "gpt":
                said += turn["value"] + "<|im_end|>"
        labels = tokens.labels[tokens.span(document)]
        assert tokenizer.decode(labels[labels != IGNORE].tolist()) == said
        text = tokenizer.decode(tokens.input_ids[tokens.span(document)].tolist())
        assert np.all([tool["name"] in text.partition("<|im_end|>")[0] for tool in json.loads(row["tools"])])
    assert num_calls > 100
