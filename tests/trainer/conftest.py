"""Fixtures of the trainer's tests: tokenizer and models of a few kilobytes, and one rank inside this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.trainer.tools import IM_END, IM_START, chat_documents, make_tokenizer, save_llama, write_chats

settings.register_profile("untimed", deadline=None)  # a busy machine is not a failure
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads do not speed up models of a few kilobytes, and slow them down a lot on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with ChatML's tokens and no template of its own."""
    return make_tokenizer(IM_START, IM_END)


@pytest.fixture(scope="session")
def chatml(tokenizer):
    """The same with the ChatML template, as the trainer sets it."""
    from trainer.data.template import set_chat_template

    own = make_tokenizer(IM_START, IM_END)
    assert set_chat_template(own, None) == 0
    return own


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory, tokenizer) -> Path:
    """A random Llama of two layers with tied embeddings, whose vocabulary has ChatML's tokens."""
    return save_llama(tmp_path_factory.mktemp("chat-model"), tokenizer, tied=True)


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory) -> Path:
    """36 conversations of very different lengths."""
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_documents(36))


@pytest.fixture(scope="package")
def one_rank(tmp_path_factory) -> Iterator[None]:
    """A process group of this process alone, so that `trainer.train.train` runs without torchrun."""
    from trainer.runtime import load_comm_kernel, quieten_libraries, set_accelerator_env

    set_accelerator_env()
    import deepspeed
    import torch.distributed as dist

    quieten_libraries()
    store = tmp_path_factory.mktemp("store") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        load_comm_kernel()
        deepspeed.init_distributed(
            dist_backend="gloo", init_method=f"file://{store}", rank=0, world_size=1, auto_mpi_discovery=False
        )
        yield
        dist.destroy_process_group()
