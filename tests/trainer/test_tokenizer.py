"""What is wrong with a tokenizer or its template is an error before a process of training starts."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.config import ModelConfig
from cluster.errors import InputError
from launcher import recipe as recipes
from launcher.stages import run_all, run_stage
from tests.trainer.tools import IM_END, IM_START, chat_documents, make_tokenizer, save_llama, write_chats, write_job
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig
from trainer.data.tokens import load_tokens, prepare_tokens
from trainer.job import read_job
from trainer.model.load import load_model
from trainer.model.tokenizer import check_tokenizer, load_tokenizer

CONFIG = TrainConfig(max_seq_len=128, precision="fp32", attention="sdpa", packing=False, zero_stage=2)


@pytest.fixture(scope="module")
def larger_tokenizer(tmp_path_factory) -> Path:
    """A model whose tokenizer has a token that the model has no embedding for, as Gemma 3 1B's."""
    tokenizer = make_tokenizer(IM_START, IM_END)
    folder = save_llama(tmp_path_factory.mktemp("larger"), tokenizer, tied=True)
    tokenizer.add_tokens(["<picture>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_without_an_embedding_matters_only_if_it_is_used(larger_tokenizer: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(larger_tokenizer))
    tokenizer, num_added = load_tokenizer(model, None)
    assert (len(tokenizer), num_added) == (tokenizer.num_embeddings + 1, 0)
    check_tokenizer(model, CONFIG)
    path = write_chats(tmp_path / "chats.jsonl", chat_documents(3))
    assert load_tokens(prepare_tokens(CONFIG, tokenizer, [DataSource(path=str(path))], tmp_path)).num_documents == 3
    lm = load_model(model, CONFIG, tokenizer, num_added)
    assert lm.get_input_embeddings().num_embeddings == tokenizer.num_embeddings

    row = [{"role": "user", "content": "What is <picture>?"}, {"role": "assistant", "content": "fig"}]
    path = write_chats(tmp_path / "pictures.jsonl", [row])
    with pytest.raises(
        InputError, match=r"pictures\.jsonl contains the token '<picture>' \(id 3\d+\).*Remove the token"
    ):
        prepare_tokens(CONFIG, tokenizer, [DataSource(path=str(path))], tmp_path)

    template = tmp_path / "pictures.jinja"
    template.write_text(f"<picture>{tokenizer.chat_template}")
    with pytest.raises(
        InputError, match=r"train\.chat_template: what the template writes contains the token '<picture>'"
    ):
        check_tokenizer(model, TrainConfig(chat_template=str(template)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: [file.unlink() for file in folder.glob("*token*")], "no tokenizer that can be read"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version":'), r"no tokenizer that .*Expecting value"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"no tokenizer that can be read .*Copy the"),
    ],
    ids=["absent", "no JSON", "empty"],
)
def test_a_model_without_a_tokenizer_is_named(chat_model: Path, tmp_path: Path, damage, reason: str) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "model")
    damage(folder)
    with pytest.raises(InputError, match=rf"model\.path: .*model has {reason}"):
        load_tokenizer(ModelConfig(path=str(folder)), None)


@pytest.mark.parametrize("run", [lambda recipe: run_stage("train", recipe), run_all], ids=["train", "run"])
def test_a_template_that_cannot_be_used_is_refused_before_a_process_is_started(
    chat_model: Path, chat_data: Path, tmp_path: Path, monkeypatch, run
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jinja").write_text("{% for message in messages %}{{ message.content }")
    train = {"data": str(chat_data), "chat_template": "mine.jinja"}
    recipe = {"name": "t", "model": {"path": str(chat_model)}, "train": train}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    loaded = recipes.load(tmp_path / "recipe.yaml", [])
    with pytest.raises(InputError, match=r"the chat template refuses.*unexpected.*Set train\.chat_template"):
        run(loaded)
    assert not loaded.run.result("train").exists()


def test_the_job_of_a_rank_reads_a_template_by_name(chat_model: Path, chat_data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "model")
    tokenizer, _ = load_tokenizer(ModelConfig(path=str(chat_model)), None)
    chatml = tokenizer.chat_template
    tokenizer.chat_template = {"brief": chatml, "long": "{{ messages }}"}
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="brief, long, and none of them is the default"):
        load_tokenizer(ModelConfig(path=str(folder)), None)
    job = read_job(write_job(tmp_path / "run", folder, chat_data, chat_template="brief"))
    assert load_tokenizer(job.model, job.config.chat_template)[0].chat_template == chatml
