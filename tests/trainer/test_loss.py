"""The chunked loss equals the plain loss with less memory. Its options change the gradient, not the logged loss."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.tools import num_steps_shown, trace, train_here, weights, write_job
from trainer.config.train import TrainConfig
from trainer.model.loss import EmbeddingNoise, LossSettings, chunked_loss, document_lengths, loss_settings

VOCABULARY, HIDDEN = 3000, 4


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def example(
    num_labels: int, bias: bool = False, vocabulary: int = VOCABULARY
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A head, hidden states [L, D] and labels [L]."""
    generator = torch.Generator().manual_seed(num_labels)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, vocabulary, bias=bias)
    hidden = torch.randn(num_labels, HIDDEN, generator=generator, requires_grad=True)
    return head, hidden, torch.randint(vocabulary, (num_labels,), generator=generator)


def gradients(loss: torch.Tensor, head: nn.Linear, hidden: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss * 0.25, [hidden, *head.parameters()]))


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 1e-2]), st.booleans())
def test_value_and_gradients_equal_those_of_the_plain_loss(
    num_labels: int, num_chunks: int, z_loss: float, bias: bool
) -> None:
    head, hidden, labels = example(num_labels, bias, vocabulary=50)
    found = chunked_loss(head, hidden, labels, LossSettings(num_chunks, z_loss))
    logits = head(hidden)
    plain = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(found, plain)
    bent = plain + z_loss * torch.logsumexp(logits, -1).square().sum()
    torch.testing.assert_close(gradients(found, head, hidden), gradients(bent, head, hidden))


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_no_tensor_is_as_large_as_the_logits_of_all_labels(z_loss: float) -> None:
    head, hidden, labels = example(256)
    shapes = []
    head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    with LargestTensor() as largest:
        gradients(chunked_loss(head, hidden, labels, LossSettings(8, z_loss)), head, hidden)
    assert largest.numel == 256 // 8 * VOCABULARY
    assert shapes == [(32, VOCABULARY)] * 16, "eight chunks forward, and again on the way back"
    with LargestTensor() as largest:
        gradients(chunked_loss(head, hidden, labels, LossSettings(1)), head, hidden)
    assert largest.numel == 256 * VOCABULARY, "the measurement sees what it should"


@pytest.mark.parametrize("num_labels", [1, 3, 8, 9, 100])
def test_the_head_is_called_as_often_for_few_labels_as_for_many(num_labels: int) -> None:
    head, hidden, labels = example(num_labels)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        chunked_loss(head, hidden, labels, LossSettings(5))
    assert len(calls) == 5


def test_dropout_in_the_head_is_the_same_in_the_backward_pass() -> None:
    """An adapter of the head may have dropout. If the passes dropped different values, the gradient would be wrong."""
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(HIDDEN, VOCABULARY))
    _, hidden, labels = example(32)
    torch.manual_seed(1)
    found = torch.autograd.grad(chunked_loss(head, hidden, labels, LossSettings(4)), hidden)[0]
    torch.manual_seed(1)
    plain = sum(F.cross_entropy(head(hidden[i : i + 8]), labels[i : i + 8], reduction="sum") for i in range(0, 32, 8))
    torch.testing.assert_close(found, torch.autograd.grad(plain, hidden)[0])


def test_there_are_chunks_for_the_largest_micro_batch() -> None:
    config = TrainConfig(micro_batch_size=3, max_seq_len=1000, loss_chunk_tokens=1024)
    assert loss_settings(config).num_chunks == 3
    assert loss_settings(config.model_copy(update={"loss_chunk_tokens": 1 << 20})).num_chunks == 1


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4))
def test_every_position_has_the_length_of_its_document(rows: list[list[int]]) -> None:
    width = max(map(sum, rows))
    rows = [[*row, width - sum(row)] if sum(row) < width else row for row in rows]  # padding is a document too
    positions = torch.tensor([[position for length in row for position in range(length)] for row in rows])
    assert document_lengths(positions).tolist() == [[length for length in row for _ in range(length)] for row in rows]


def test_noise_depends_on_the_document_length_and_is_added_only_in_training() -> None:
    """The length of the packed row and its padding do not count, and the noise covers its whole range."""
    embedding, width = nn.Embedding(10, 64), 64
    noise = EmbeddingNoise(embedding, alpha=5.0)
    positions = torch.tensor([[*range(100), *range(25), *range(3)], [*range(128)]])
    noise.set_documents(positions)
    ids = torch.zeros_like(positions)
    embedding.requires_grad_(False)
    plain = embedding.eval()(ids)
    torch.testing.assert_close(plain, embedding.weight[ids])
    moved = (embedding.train()(ids) - plain).abs()
    for part, length in ((moved[0, :100], 100), (moved[0, 100:125], 25), (moved[0, 125:], 3), (moved[1], 128)):
        bound = 5.0 / math.sqrt(length * width)
        assert 0.9 * bound < float(part.max()) <= bound * 1.0001
    assert not torch.equal(embedding(ids), embedding(ids))


class StopsAfter:
    def __init__(self, run: Path, step: int):
        self.run, self.step = run, step

    @property
    def is_set(self) -> bool:
        return num_steps_shown(self.run) >= self.step


def test_noise_resumes_after_a_stop(tmp_path: Path, one_rank, chat_model: Path, chat_data: Path) -> None:
    from trainer.job import read_job
    from trainer.train import train

    options = {"neftune_noise_alpha": 5.0, "global_batch_size": 4, "max_steps": 4, "loss_chunk_tokens": 32}
    whole, halves = (write_job(tmp_path / name, chat_model, chat_data, **options) for name in ("whole", "halves"))
    train_here(whole)
    assert train(read_job(halves), StopsAfter(halves, 2))["status"] == "preempted"
    assert num_steps_shown(halves) == 2
    train_here(halves)
    assert trace(halves) == trace(whole)
    found, wanted = weights(halves), weights(whole)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    quiet = write_job(tmp_path / "quiet", chat_model, chat_data, **options | {"neftune_noise_alpha": 0.0})
    train_here(quiet)
    assert trace(quiet)[1] != trace(whole)[1]


def test_the_logged_loss_is_plain_cross_entropy(tmp_path: Path, one_rank, chat_model: Path, chat_data: Path) -> None:
    runs = [
        write_job(tmp_path / str(z_loss), chat_model, chat_data, max_steps=2, z_loss=z_loss, max_grad_norm=0.0)
        for z_loss in (0.0, 0.1)
    ]
    plain, bent = ((train_here(run), trace(run))[1] for run in runs)
    assert bent[1][0] == plain[1][0]
    assert bent[1][1] != pytest.approx(plain[1][1], rel=1e-3), "the gradient is not the plain one"
    assert bent[2][0] != plain[2][0]


def test_the_number_of_labels_does_not_change_the_order_of_modules_for_zero_3(
    tmp_path: Path, one_rank, chat_model: Path, chat_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise ZeRO-3 stops prefetching. The checks before the first step run the modules in other orders."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    run = write_job(
        tmp_path / "run", chat_model, chat_data, zero_stage=3, packing=False, global_batch_size=4, max_steps=6,
        loss_chunk_tokens=48,
    )  # fmt: skip
    forgotten_at, forget = [], Coordinator._invalidate_trace
    monkeypatch.setattr(
        Coordinator, "_invalidate_trace", lambda self: (forgotten_at.append(num_steps_shown(run)), forget(self))[1]
    )
    train_here(run)
    assert num_steps_shown(run) == 6
    assert max(forgotten_at, default=0) == 0
