"""The loss on held-out data equals that of a plain loop, comes when it is due, and does not change the training."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cluster.errors import InputError
from tests.trainer.tools import chat_documents, trace, train_here, weights, write_chats, write_job
from trainer.data.mixture import held_out_documents
from trainer.data.tokens import load_tokens
from trainer.job import read_job
from trainer.model.load import load_model
from trainer.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_rank")
SETTINGS = {
    "global_batch_size": 4,
    "num_epochs": 2,
    "max_steps": 5,
    "neftune_noise_alpha": 5.0,
    "loss_chunk_tokens": 64,
}


def validated(run: Path) -> dict[int, float]:
    """Step -> validation loss."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["stage"] == "validation"}


def plain_loss(run: Path, tokens, documents: list[int]) -> float:
    """Mean loss per label of `documents`, computed one by one with the trained weights of a run."""
    job = read_job(run)
    tokenizer, num_added = load_tokenizer(job.model, None)
    lm = load_model(job.model, job.config, tokenizer, num_added)
    lm.load_state_dict(weights(run), strict=False)
    total, count = 0.0, 0
    for document in documents:
        span = tokens.span(document)
        ids, labels = (torch.tensor(array[span].astype("int64")) for array in (tokens.input_ids, tokens.labels))
        with torch.no_grad():
            logits = lm.eval()(input_ids=ids[None], use_cache=False).logits[0]
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_a_share_is_held_out_and_its_loss_is_exact(tmp_path: Path, chat_model: Path, chat_data: Path, capsys) -> None:
    run = write_job(tmp_path / "run", chat_model, chat_data, validation={"fraction": 0.2, "every_steps": 2}, **SETTINGS)
    result = train_here(run)
    losses = validated(run)
    assert list(losses) == [2, 4, 5], "every two steps, and at the end"
    assert result["validation_loss"] == losses[5]
    assert f"step 5 | validation loss {losses[5]:.4f}" in capsys.readouterr().out
    job = read_job(run)
    (cache,) = (run / "tokens").iterdir()
    tokens = load_tokens(cache)
    documents = held_out_documents(tokens, job.config, job.seed).tolist()
    assert len(documents) == 8
    assert losses[5] == pytest.approx(plain_loss(run, tokens, documents), rel=1e-5)


def test_validation_does_not_change_the_training(tmp_path: Path, chat_model: Path, chat_data: Path) -> None:
    other = write_chats(tmp_path / "other.jsonl", chat_documents(7, seed=5))
    plain, watched = (
        write_job(tmp_path / name, chat_model, chat_data, **SETTINGS, **more)
        for name, more in (
            ("plain", {}),
            ("watched", {"validation": {"path": str(other), "every_steps": 1, "max_examples": 3}}),
        )
    )
    train_here(plain)
    train_here(watched)
    assert trace(watched) == trace(plain)
    assert list(validated(watched)) == [1, 2, 3, 4, 5]
    rows = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    assert {row["num_documents"] for row in rows if row["stage"] == "validation"} == {3}
    assert read_job(plain).identity("tokens") == read_job(watched).identity("tokens")


def test_an_unusable_validation_dataset_is_named_before_training(
    tmp_path: Path, chat_model: Path, chat_data: Path
) -> None:
    absent = write_job(tmp_path / "absent", chat_model, chat_data, validation={"path": str(tmp_path / "no.jsonl")})
    with pytest.raises(InputError, match=r"train\.validation\.path: .*no\.jsonl does not exist"):
        train_here(absent)
    unanswered = write_chats(tmp_path / "unanswered.jsonl", [[{"role": "user", "content": "fig"}]])
    useless = write_job(tmp_path / "useless", chat_model, chat_data, validation={"path": str(unanswered)})
    with pytest.raises(InputError, match=r"train\.validation\.path: no row of .*unanswered"):
        train_here(useless)
    assert not (useless / "checkpoints").exists()
