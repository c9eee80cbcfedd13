"""What the backward pass recomputes, and what attention knows about packed documents."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.errors import InputError
from tests.trainer.tools import varlen_attn_on_a_cpu, write_job
from trainer.config.train import TrainConfig
from trainer.data.batches import MicroBatch
from trainer.model import attention
from trainer.model.attention import (
    attend_by_document,
    attend_varlen,
    cumulative_lengths,
    flash_attention_kwargs,
)
from trainer.model.layers import uses_liger
from trainer.model.load import CausalLMWithLoss, load_model
from trainer.model.tokenizer import load_tokenizer


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
    from trainer.resolve import with_choices

    job = read_job(run)
    config = with_choices(job.config.model_copy(update=settings), zero_stage=0, attention="sdpa")
    torch.manual_seed(0)
    return CausalLMWithLoss(load_model(job.model, config, *load_tokenizer(job.model, None))).train()


def batch_of(*lengths: int) -> MicroBatch:
    """One packed row of random documents in which every token has a label."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (1, sum(lengths)), generator=draw)
    return MicroBatch(ids, torch.cat([torch.arange(length) for length in lengths])[None], ids.roll(-1))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_recomputation_changes_no_gradient_and_selective_recomputes_no_product(
    tmp_path: Path, chat_model: Path, tuning: str
) -> None:
    run = write_job(tmp_path / "run", chat_model, None, tuning=tuning)
    batch, found = batch_of(20, 7, 5), {}
    for kind in ("none", "selective", "full"):
        module = load(run, activation_checkpointing=kind)
        module.lm.enable_input_require_grads()  # as recomputing does: frozen layers then pass gradients on
        with Count() as count:
            module(**batch.inputs).backward()
        found[kind] = count, [p.grad for p in module.parameters() if p.requires_grad]
    plain, gradients = found["none"]
    assert gradients
    for kind in ("selective", "full"):
        torch.testing.assert_close(found[kind][1], gradients)
        assert found[kind][0].others > plain.others
    assert found["selective"][0].products == plain.products
    assert found["full"][0].products > plain.products


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_bounds_match_the_documents(lengths: list[int]) -> None:
    bounds = flash_attention_kwargs(batch_of(*lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    assert torch.equal(bounds["cu_seq_lens_q"], ends)
    assert torch.equal(bounds["cu_seq_lens_k"], ends)
    assert bounds["max_length_q"] == bounds["max_length_k"] == max(lengths)
    assert type(bounds["max_length_q"]) is int  # a tensor would be waited for


@given(
    rows=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 4]),
)
@pytest.mark.parametrize("attend", [attend_by_document, attend_varlen])
def test_attention_inside_documents_equals_attention_with_a_mask(
    attend: Callable, rows: list[list[int]], window: int | None
) -> None:
    """Values and gradients, with fewer key heads than query heads. Rows end with documents of padding."""
    width = max(map(sum, rows)) + 1
    filled = [[*lengths, width - sum(lengths)] for lengths in rows]
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in filled])
    number = (position_ids == 0).cumsum(1)
    allowed = (number[:, :, None] == number[:, None, :]) & torch.ones(width, width, dtype=torch.bool).tril()
    if window is not None:
        allowed &= (torch.arange(width)[:, None] - torch.arange(width)[None]) < window
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(len(rows), heads, width, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", varlen_attn_on_a_cpu)
        found, _ = attend(
            SimpleNamespace(num_key_value_groups=2), *states, None, scaling=0.3, sliding_window=window,
            cu_seq_lens_q=cumulative_lengths(position_ids),
        )  # fmt: skip
    query, key, value = (part.repeat_interleave(4 // part.shape[1], dim=1) for part in states)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None], scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=generator)
    gradients = [torch.autograd.grad((output * weight).sum(), states) for output in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_attention_by_document_refuses_masks_and_caches() -> None:
    states = [torch.zeros(1, 2, 4, 8) for _ in range(3)]
    module = SimpleNamespace(num_key_value_groups=1)
    with pytest.raises(InputError, match="does not know a mask or a cache"):
        attend_by_document(module, *states, torch.ones(1, 1, 4, 4))
    with pytest.raises(InputError, match="does not know a mask or a cache"):
        attend_by_document(module, states[0][:, :, :1], *states[1:], None)


def test_attention_gets_the_bounds(tmp_path: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that knows the documents only by their bounds, like flash attention, isolates them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def by_bounds(module, query, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **kwargs):
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        assert max_length_q == max_length_k == int(cu_seq_lens_q.diff().max())
        spans = [slice(a, b) for a, b in cu_seq_lens_q.unfold(0, 2, 1).tolist()]
        parts = [plain(module, query[:, :, s], key[:, :, s], value[:, :, s], None, **kwargs)[0] for s in spans]
        return torch.cat(parts, 1), None

    module, batch = load(write_job(tmp_path / "run", chat_model, None)), batch_of(9, 14, 3)
    expected = module(**batch.inputs)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", by_bounds)
    found = module(**batch.inputs, **flash_attention_kwargs(batch))
    torch.testing.assert_close(found, expected)


class Waits(TorchDispatchMode):
    """Records operations whose result or size the CPU needs. On a GPU each of them waits for all queued work."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_forward_pass_never_waits_for_the_gpu(
    tmp_path: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module, batch = load(write_job(tmp_path / "run", chat_model, None)), batch_of(9, 14, 3)
    module.lm.config._attn_implementation = "bounds_only"  # like flash attention: no mask is computed
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._local_mapping,
        "bounds_only",
        lambda module, query, *_, **__: (query.transpose(1, 2), None),
    )
    with Waits() as waits:
        module(**batch.inputs, **flash_attention_kwargs(batch))
    assert waits.found, "the CPU itself finds the labels; this checks that it would be seen"
    inputs = batch.inputs | flash_attention_kwargs(batch)
    with Waits() as waits:
        module(**inputs).backward()
    assert not waits.found


def test_liger_is_used_if_possible_and_its_absence_is_an_error_if_required() -> None:
    assert uses_liger(TrainConfig()) is False
    assert uses_liger(TrainConfig(liger=False)) is False
    with pytest.raises(InputError, match=r"train\.liger=true does not work"):
        uses_liger(TrainConfig(liger=True))
