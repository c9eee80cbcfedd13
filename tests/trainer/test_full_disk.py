"""A full disk ends a stage with one clear error and damages nothing. The same command resumes afterwards."""

from pathlib import Path

import pytest
import yaml

from cluster.errors import EXIT_BAD_INPUT, EXIT_DONE, InputError
from cluster.files import MIB
from cluster.run.manifest import verify_manifest
from tests.conftest import SmallDisk
from tests.trainer.tools import chat_documents, command, train_here, write_chats, write_job
from trainer import export
from trainer.checkpoint.state import newest_checkpoint, read_state
from trainer.config.data import DataSource
from trainer.config.export import ExportConfig
from trainer.config.train import TrainConfig
from trainer.data.tokens import load_tokens, prepare_tokens
from trainer.export_job import ExportJob
from trainer.job import read_job


@pytest.fixture(scope="module")
def four_mib_model(tmp_path_factory, tokenizer) -> Path:
    """A model whose checkpoints have about 16 MiB: two copies of the weights, and two moments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("four-mib-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_training_survives_a_full_disk(
    tmp_path: Path, four_mib_model: Path, chat_data: Path, small_disk: SmallDisk
) -> None:
    run = small_disk.path / "run"
    train = {
        "data": str(chat_data), "precision": "fp32", "zero_stage": 1, "max_seq_len": 128, "micro_batch_size": 2,
        "global_batch_size": 8, "max_steps": 2, "checkpoint": {"every_steps": 1, "keep_last": 1},
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "full-disk", "model": {"path": str(four_mib_model)}, "train": train}))

    def tunesmith(*arguments: object) -> tuple[int, str]:
        return command(*arguments, "--run-dir", run, cwd=tmp_path)

    small_disk.resize(36 * MIB)  # room for the first checkpoint and half of the second
    code, output = tunesmith("train", recipe)
    assert code == EXIT_BAD_INPUT, output
    assert one_error(output).startswith(f"error: {run}"), output
    assert "the disk is full" in output
    assert "Traceback" not in output
    first = newest_checkpoint(run / "checkpoints")
    assert read_state(first).step == 1
    verify_manifest(first)

    small_disk.resize(100 * MIB)
    code, output = tunesmith("train", recipe)
    assert code == EXIT_DONE, output
    assert "step 1 of 2" in output
    assert read_state(newest_checkpoint(run / "checkpoints")).step == 2


def test_export_survives_a_full_disk(
    tmp_path: Path, one_rank, four_mib_model: Path, chat_data: Path, small_disk: SmallDisk
) -> None:
    small_disk.resize(100 * MIB)
    run = write_job(small_disk.path / "run", four_mib_model, chat_data, max_steps=1)
    train_here(run)
    job = read_job(run)

    def export_as(dtype: str) -> None:
        export.run(ExportJob(job.run, "full-disk", job.model, job.config, ExportConfig(dtype=dtype)))

    export_as("same")
    earlier = (run / "export" / "manifest.json").read_text()
    small_disk.fill(leave_bytes=MIB)
    with pytest.raises(InputError, match=f"{run}: the disk is full"):
        export_as("bf16")
    assert (run / "export" / "manifest.json").read_text() == earlier
    verify_manifest(run / "export")
    small_disk.resize(200 * MIB)
    export_as("bf16")
    assert (run / "export" / "manifest.json").read_text() != earlier


def one_error(output: str) -> str:
    """The only line of `output` that is an error."""
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    return line


def test_encoding_survives_a_full_disk(chatml, tmp_path: Path, small_disk: SmallDisk) -> None:
    data = write_chats(tmp_path / "chats.jsonl", chat_documents(600))
    cache = small_disk.path / "tokens"
    with pytest.raises(InputError, match=f"{small_disk.path}.*: the disk is full"):
        prepare_tokens(TrainConfig(), chatml, [DataSource(path=str(data))], cache)
    small_disk.resize(8 * MIB)
    assert load_tokens(prepare_tokens(TrainConfig(), chatml, [DataSource(path=str(data))], cache)).num_documents == 600
