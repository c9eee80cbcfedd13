"""Packed documents do not see each other. A model for which this fails is not trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.errors import InputError
from tests.trainer.tools import (
    make_tokenizer,
    save_llama,
    trace,
    train_here,
    varlen_attn_on_a_cpu,
    weights,
    write_job,
)
from trainer.data.batches import Batches
from trainer.data.tokens import load_tokens, prepare_tokens
from trainer.job import read_job
from trainer.model.load import CausalLMWithLoss, load_model
from trainer.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_rank")


def packed_job(tmp_path: Path, model: Path, data: Path, **train: object) -> tuple[CausalLMWithLoss, Batches]:
    """The model as training loads it, and the rows of its data."""
    job = read_job(write_job(tmp_path / "run", model, data, **train))
    tokenizer, num_added = load_tokenizer(job.model, None)
    tokens = load_tokens(prepare_tokens(job.config, tokenizer, job.sources, tmp_path / "tokens"))
    module = CausalLMWithLoss(load_model(job.model, job.config, tokenizer, num_added)).eval()
    return module, Batches(tokens, job.config, job.seed, 0, 1)


def logits_of(module: CausalLMWithLoss, batches: Batches, rows: list[list[int]]) -> torch.Tensor:
    batch = batches.collate(rows)
    with torch.no_grad():
        return module(**batch.inputs, return_logits=True)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_by_document", "eager"])
def test_a_batch_of_packed_rows_gives_the_logits_of_its_documents_alone(
    tmp_path: Path, chat_model: Path, chat_data: Path, attention: str
) -> None:
    module, batches = packed_job(tmp_path, chat_model, chat_data, attention=attention)
    rows = sorted(batches.rows, key=len)[-3:]  # of different lengths, so two of them are padded
    assert min(map(len, rows)) > 1
    assert len({sum(batches.tokens.lengths[d] for d in row) for row in rows}) > 1
    together = logits_of(module, batches, rows)
    alone = torch.cat([logits_of(module, batches, [[document]]) for row in rows for document in row])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_training_with_varlen_attention_is_training_by_document(
    tmp_path: Path, chat_model: Path, chat_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole trainings, their checks of logits included. The kernel's place is taken by its definition."""
    by_document = write_job(tmp_path / "by-document", chat_model, chat_data, max_steps=2)
    train_here(by_document)
    monkeypatch.setattr("trainer.model.attention.varlen_attn", varlen_attn_on_a_cpu)
    read = AutoModelForCausalLM.from_pretrained

    def read_with_varlen(*arguments: object, **settings: object) -> torch.nn.Module:
        return read(*arguments, **settings | {"attn_implementation": "varlen"})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read_with_varlen)
    by_bounds = write_job(tmp_path / "by-bounds", chat_model, chat_data, max_steps=2)
    train_here(by_bounds)
    assert np.allclose(list(trace(by_bounds).values()), list(trace(by_document).values()), rtol=1e-5)


def test_the_loss_is_the_sum_over_labels_of_the_models_own_logits(
    tmp_path: Path, chat_model: Path, chat_data: Path
) -> None:
    module, batches = packed_job(tmp_path, chat_model, chat_data, packing=False)
    batch = batches.collate([[3]])
    with torch.no_grad():
        found = module(**batch.inputs)
        logits = module.lm(input_ids=batch.input_ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="sum", ignore_index=-100)
    torch.testing.assert_close(found, expected)


def test_a_model_whose_packed_documents_see_each_other_is_refused(
    tmp_path: Path, chat_model: Path, chat_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(self, input_ids, position_ids, bounds):
        return self.lm.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state

    monkeypatch.setattr(CausalLMWithLoss, "_hidden", leaking)
    run = write_job(tmp_path / "run", chat_model, chat_data)
    with pytest.raises(InputError, match="packed documents see each other"):
        train_here(run)
    assert not (run / "checkpoints").exists()
    unpacked = write_job(tmp_path / "unpacked", chat_model, chat_data, packing=False, max_steps=1)
    assert train_here(unpacked)["status"] == "done"


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path, tokenizer, chat_data: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=8.0, initializer_range=0.1,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    tokenizer.save_pretrained(tmp_path / "granite")
    with pytest.raises(InputError, match="changes its logits"):
        train_here(write_job(tmp_path / "run", tmp_path / "granite", chat_data))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_the_template_adds_are_trained_by_an_adapter(tmp_path: Path, chat_data: Path, tied: bool) -> None:
    """The token that ends a turn is new to this model: its embedding and its row of the head both have to move."""
    from safetensors.torch import load_file

    model = save_llama(tmp_path / "bare", make_tokenizer(), tied=tied)
    run = write_job(tmp_path / "run", model, chat_data, tuning="lora", lora={"rank": 2}, max_steps=2)
    assert train_here(run)["status"] == "done"
    rows = {key: tensor for key, tensor in weights(run).items() if "trainable_tokens" in key}
    assert len(rows) == (1 if tied else 2)
    base = load_file(model / "model.safetensors")
    mean = {key: tensor.mean(0) for key, tensor in base.items() if "embed_tokens" in key or "lm_head" in key}
    for key, tensor in rows.items():
        start = mean["lm_head.weight" if "lm_head" in key else "model.embed_tokens.weight"]
        assert tensor.shape == (2, 32)
        assert float((tensor - start).abs().max()) > 1e-4
    assert not [key for key, tensor in weights(run).items() if len(tensor) > 300], "whole embeddings were saved"


@pytest.mark.parametrize(
    "settings", [{"tuning": "prefix", "packing": False}, {"tuning": "ia3"}, {"tuning": "lora", "zero_stage": 3}]
)
def test_tokens_the_template_adds_and_nothing_would_train_are_an_error(
    tmp_path: Path, chat_data: Path, settings: dict
) -> None:
    model = save_llama(tmp_path / "bare", make_tokenizer(), tied=False)
    with pytest.raises(InputError, match="lacks 2 tokens of the chat template"):
        train_here(write_job(tmp_path / "run", model, chat_data, **settings))


@pytest.mark.parametrize("settings", [{"tuning": "prefix", "packing": False}, {"zero_stage": 3}, {"tuning": "lora"}])
def test_the_other_ways_of_tuning_pass_the_checks_and_train(
    tmp_path: Path, chat_model: Path, chat_data: Path, settings: dict
) -> None:
    result = train_here(
        write_job(tmp_path / "run", chat_model, chat_data, num_epochs=4, learning_rate=0.02, **settings)
    )
    assert result["status"] == "done"
    losses = [loss for loss, _ in trace(tmp_path / "run").values()]
    assert losses[-1] < losses[0]


def test_tokens_that_no_text_contains_need_no_embeddings(tmp_path: Path, tokenizer, chat_data: Path) -> None:
    model = save_llama(tmp_path / "model", tokenizer, tied=True)
    larger = make_tokenizer("<|im_start|>", "<|im_end|>")
    larger.add_tokens(["<|one|>", "<|more|>"])
    larger.save_pretrained(model)
    run = write_job(tmp_path / "run", model, chat_data)
    assert train_here(run)["status"] == "done"
    assert weights(run)["model.embed_tokens.weight"].shape[0] == len(tokenizer)
