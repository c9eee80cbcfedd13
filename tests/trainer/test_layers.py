"""What is made again in the backward pass, and what attention is told of packed documents."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.errors import InputError
from tests.trainer.tools import write_job
from trainer.attention import choose_attention, document_bounds
from trainer.batches import MicroBatch
from trainer.config import TrainConfig
from trainer.layers import uses_liger
from trainer.model import CausalLMWithLoss, load_model, load_tokenizer


class Count(TorchDispatchMode):
    """Counts matrix products and all other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_product = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        self.products += is_product
        self.others += not is_product
        return func(*args, **(kwargs or {}))


def load(run: Path, **settings: object) -> CausalLMWithLoss:
    from trainer.job import read_job
    from trainer.settle import settled

    job = read_job(run)
    config = settled(job.config.model_copy(update=settings), stage=0, attention="sdpa")
    torch.manual_seed(0)
    return CausalLMWithLoss(load_model(job.model, config, *load_tokenizer(job.model, None))).train()


def batch_of(*lengths: int) -> MicroBatch:
    """One packed row of random documents, every token of them labelled."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (1, sum(lengths)), generator=draw)
    return MicroBatch(ids, torch.cat([torch.arange(length) for length in lengths])[None], ids.roll(-1))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_recomputing_changes_no_gradient_and_selective_repeats_no_product(
    tmp_path: Path, chat_model: Path, tuning: str
) -> None:
    run = write_job(tmp_path / "run", chat_model, None, tuning=tuning)
    batch, found = batch_of(20, 7, 5), {}
    for kind in ("none", "selective", "full"):
        module = load(run, activation_checkpointing=kind)
        module.lm.enable_input_require_grads()  # as recomputing does: frozen layers then pass gradients on
        with Count() as count:
            module(batch.input_ids, batch.position_ids, batch.labels).backward()
        found[kind] = count, [p.grad for p in module.parameters() if p.requires_grad]
    plain, gradients = found["none"]
    assert gradients
    for kind in ("selective", "full"):
        torch.testing.assert_close(found[kind][1], gradients)
        assert found[kind][0].others > plain.others
    assert found["selective"][0].products == plain.products
    assert found["full"][0].products > plain.products


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_bounds_are_those_of_the_documents(lengths: list[int]) -> None:
    bounds = document_bounds(batch_of(*lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    assert torch.equal(bounds["cu_seq_lens_q"], ends)
    assert torch.equal(bounds["cu_seq_lens_k"], ends)
    assert bounds["max_length_q"] == bounds["max_length_k"] == max(lengths)
    assert type(bounds["max_length_q"]) is int  # a tensor would be waited for


def test_attention_is_told_the_bounds(tmp_path: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that knows of documents by their bounds alone, as flash attention does, isolates them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def by_bounds(module, query, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **kwargs):
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        assert max_length_q == max_length_k == int(cu_seq_lens_q.diff().max())
        spans = [slice(a, b) for a, b in cu_seq_lens_q.unfold(0, 2, 1).tolist()]
        parts = [plain(module, query[:, :, s], key[:, :, s], value[:, :, s], None, **kwargs)[0] for s in spans]
        return torch.cat(parts, 1), None

    module, batch = load(write_job(tmp_path / "run", chat_model, None)), batch_of(9, 14, 3)
    expected = module(batch.input_ids, batch.position_ids, batch.labels)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", by_bounds)
    found = module(batch.input_ids, batch.position_ids, batch.labels, **document_bounds(batch))
    torch.testing.assert_close(found, expected)


def test_without_a_gpu_attention_is_pytorch_s_own() -> None:
    assert choose_attention(TrainConfig()) == "sdpa"
    assert choose_attention(TrainConfig(attention="eager")) == "eager"
    with pytest.raises(InputError, match="no backward pass of it on CPUs"):
        choose_attention(TrainConfig(attention="flex_attention"))


def test_liger_is_used_where_it_can_be_and_missed_where_it_is_demanded() -> None:
    assert uses_liger(TrainConfig()) is False
    assert uses_liger(TrainConfig(liger=False)) is False
    with pytest.raises(InputError, match=r"train\.liger=true, and"):
        uses_liger(TrainConfig(liger=True))
