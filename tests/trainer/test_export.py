"""An export is loaded by plain transformers and peft, and answers as the model in the trainer does."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.config import ModelConfig
from cluster.errors import InputError, TunesmithError
from cluster.run.rundir import RunDir
from tests.trainer.tools import IM_END, make_tokenizer, save_llama, trace, train_here, write_job
from trainer import export
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config.export import ExportConfig
from trainer.export_job import ExportJob
from trainer.job import read_job

pytestmark = pytest.mark.usefixtures("one_rank")

LORA = {"tuning": "lora", "lora": {"rank": 4, "alpha": 16}, "learning_rate": 0.02}
FULL = {"learning_rate": 0.01}
QUESTION = [{"role": "user", "content": "Say the words cedar dune"}]


def export_job(run: Path, **config: object) -> ExportJob:
    job = read_job(run)
    return ExportJob(RunDir(run), "test-export", job.model, job.config, ExportConfig(**config))


def train_and_keep(run: Path) -> torch.nn.Module:
    """Train; return the live model of the engine, as it was when the last checkpoint was saved."""
    kept = []
    original = Checkpointer.save

    def save(checkpointer, *arguments):
        kept.append(checkpointer.engine.module.lm)
        return original(checkpointer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save", save)
        train_here(run)
    return kept[-1].eval()


def question_ids(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def greedy(lm: torch.nn.Module, ids: torch.Tensor, count: int = 24) -> list[int]:
    """The `count` tokens of highest logit, one after the other, and the logits' sum so that a change shows."""
    with torch.no_grad():
        for _ in range(count):
            best = lm(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, best.reshape(1, 1)], dim=1)
    return ids[0, -count:].tolist()


def logits(lm: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=ids, use_cache=False).logits.float()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, chat_model: Path, chat_data: Path, one_rank) -> dict[str, tuple[Path, torch.nn.Module]]:
    """Trained runs by name, with the live model of each. The base of "grown" has no tokens for the chat template."""
    root = tmp_path_factory.mktemp("export-runs")
    bare = save_llama(root / "bare", make_tokenizer(), tied=False)
    jobs = {"full": (chat_model, FULL), "lora": (chat_model, LORA), "grown": (bare, LORA), "grown-full": (bare, FULL)}
    found = {}
    for name, (model, settings) in jobs.items():
        run = write_job(root / name, model, chat_data, num_epochs=2, **settings)
        found[name] = run, train_and_keep(run)
    return found


@pytest.mark.parametrize("name", ["full", "lora", "grown", "grown-full"])
def test_a_merged_export_answers_as_the_model_in_the_trainer_does(runs, name: str) -> None:
    run, live = runs[name]
    result = export.run(export_job(run))
    folder = run / "export"
    loaded = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert not isinstance(loaded, PeftModel)
    ids = question_ids(folder)
    torch.testing.assert_close(logits(loaded, ids), logits(live, ids), rtol=0, atol=2e-4)
    assert greedy(loaded, ids) == greedy(live, ids)
    base = AutoModelForCausalLM.from_pretrained(read_job(run).model.path)
    known = ids.clamp(max=base.config.vocab_size - 1)
    assert (logits(loaded, known)[..., :100] - logits(base, known)[..., :100]).abs().max() > 0.05, "nothing was trained"
    assert result["max_logit_error"] < 1e-4


def test_an_adapter_export_answers_as_the_model_in_the_trainer_does(runs) -> None:
    run, live = runs["lora"]
    export.run(export_job(run, form="adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(run / "export")
    ids = question_ids(run / "export")
    torch.testing.assert_close(logits(loaded, ids), logits(live, ids), rtol=0, atol=2e-4)
    assert greedy(loaded, ids) == greedy(live, ids)
    assert sorted(path.name for path in (run / "export").glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_prefix_tuning_is_exported_as_an_adapter_alone(tmp_path: Path, chat_model: Path, chat_data: Path) -> None:
    settings = {"tuning": "prefix", "packing": False, "learning_rate": 0.05}
    run = write_job(tmp_path / "run", chat_model, chat_data, **settings)
    live = train_and_keep(run)
    with pytest.raises(InputError, match=r"prefix, which cannot be merged.*export\.form=adapter"):
        export.run(export_job(run))
    export.run(export_job(run, form="adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(run / "export").eval()
    ids = question_ids(run / "export")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, live(input_ids=ids).logits, rtol=0, atol=2e-4)


def test_an_export_holds_nothing_but_weights_settings_tokenizer_and_card(runs) -> None:
    run, _ = runs["lora"]
    for form in ("merged", "adapter"):
        job = export_job(run, form=form)
        export.run(job)
        files = [path for path in (run / "export").rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
        assert {"README.md", "manifest.json", "tokenizer.json"} <= {path.name for path in files}
        with pytest.raises(InputError, match="corrupt"):
            spoil(run / "export" / "README.md", functools.partial(export.run, job))


def spoil(file: Path, action) -> None:
    """Do `action` while a byte of `file` is flipped."""
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    try:
        action()
    finally:
        file.write_bytes(content)


def test_generation_stops_at_the_end_of_a_turn(runs) -> None:
    run, _ = runs["grown"]
    export.run(export_job(run))
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    ends = json.loads((run / "export" / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(ends) == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)])
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False).endswith(f"{IM_END}\n")


def test_the_bases_stop_tokens_and_sampling_are_kept(runs, tmp_path: Path) -> None:
    """Settings that transformers would refuse to save, as some published models have them, are kept as they are."""
    run, _ = runs["full"]
    folder = shutil.copytree(read_job(run).model.path, tmp_path / "model")
    settings = {"eos_token_id": [0, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": False, "bos_token_id": 5}
    derived = {"_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(settings | derived))
    job = export_job(run, max_shard_size="2GB")
    export.run(replace(job, model=ModelConfig(path=str(folder))))
    found = json.loads((run / "export" / "generation_config.json").read_text())
    end = AutoTokenizer.from_pretrained(run / "export").convert_tokens_to_ids(IM_END)
    assert not derived.keys() & found.keys()
    assert found.pop("eos_token_id") == sorted({0, 7, end})
    assert {name: found[name] for name in ("temperature", "top_p", "do_sample", "bos_token_id")} == {
        name: settings[name] for name in ("temperature", "top_p", "do_sample", "bos_token_id")
    }


def test_files_of_checkpoints_and_exports_have_the_permissions_of_new_files(runs) -> None:
    run, _ = runs["lora"]
    (run / "new").touch()
    for form in ("adapter", "merged"):
        export.run(export_job(run, form=form))
        files = [path for folder in ("export", "checkpoints") for path in (run / folder).rglob("*") if path.is_file()]
        assert {path.stat().st_mode for path in files} == {(run / "new").stat().st_mode}


def test_a_merged_model_that_lost_what_training_changed_is_not_exported(runs, monkeypatch) -> None:
    """The difference is far below what bf16 rounds, and still a large part of what training changed."""
    run, _ = runs["lora"]
    merge_and_unload = LoraModel.merge_and_unload

    def forget_a_layer(lm: LoraModel, *arguments: object, **options: object) -> torch.nn.Module:
        next(m for m in lm.modules() if isinstance(m, LoraLayer)).lora_B["default"].weight.data.mul_(0.5)
        return merge_and_unload(lm, *arguments, **options)

    monkeypatch.setattr(LoraModel, "merge_and_unload", forget_a_layer)
    with pytest.raises(TunesmithError, match=r"differ by .*training changed them by .*export\.form=adapter"):
        export.run(export_job(run, dtype="bf16", max_shard_size="2GB"))


def test_peft_loads_an_adapter_with_added_tokens(runs) -> None:
    run, live = runs["grown"]
    export.run(export_job(run, form="adapter"))
    ids = question_ids(run / "export")
    loaded = AutoPeftModelForCausalLM.from_pretrained(run / "export").eval()
    found = logits(loaded, ids)
    torch.testing.assert_close(found, logits(live, ids)[..., : found.shape[-1]], rtol=0, atol=2e-4)


def test_the_card_says_what_was_done_and_names_no_place_on_this_machine(runs) -> None:
    run, _ = runs["full"]
    export.run(export_job(run))
    card = (run / "export" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "# test-export" in card
    assert "chats.jsonl" in card
    assert "ZeRO-0, 1 rank |" in card, "the stage that auto chose"
    assert "cosine schedule, warm-up of 3 % of the steps |" in card
    for place in (run, read_job(run).model.path, Path.cwd(), run.parent):
        assert str(place) not in card


def test_weights_come_in_shards_of_the_size_asked_for(runs) -> None:
    run, live = runs["full"]
    export.run(export_job(run, max_shard_size="50KB"))
    assert len(list((run / "export").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(run / "export", use_safetensors=True)
    ids = question_ids(run / "export")
    assert greedy(loaded, ids) == greedy(live, ids)


def test_an_export_takes_the_memory_of_a_shard_and_not_of_the_model(
    tmp_path: Path, tokenizer, chat_data: Path, runs
) -> None:
    """Twelve layers of 4 MB and embeddings of 0.4 MB: what it allocates stays far below the whole."""
    sizes = {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 12}
    model = save_llama(tmp_path / "model", tokenizer, tied=True, **sizes)
    num_bytes = (model / "model.safetensors").stat().st_size
    assert num_bytes > 45e6
    run = write_job(tmp_path / "run", model, chat_data, max_steps=1)
    train_here(run)
    command = [sys.executable, "-m", "tests.trainer.export_worker", str(runs["full"][0]), str(run), "5MB"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 0.6 * num_bytes
    assert len(list((run / "export").glob("*.safetensors"))) >= 10


def test_the_best_checkpoint_is_exported_where_that_is_asked_for(
    tmp_path: Path, chat_model: Path, chat_data: Path
) -> None:
    keep = {"every_steps": 1, "keep_last": 1, "keep_best": 1, "best": "train_loss"}
    settings = {"learning_rate": 0.5, "warmup_ratio": 0.0, "max_steps": 3, "checkpoint": keep}
    run = write_job(tmp_path / "run", chat_model, chat_data, **settings)
    train_here(run)
    losses = {step: loss for step, (loss, _) in trace(run).items()}
    best = min(losses, key=losses.get)
    assert best != max(losses), "such a learning rate makes it worse"
    assert Path(export.run(export_job(run, checkpoint="best"))["checkpoint"]).name == f"step_{best:06d}"
    assert Path(export.run(export_job(run))["checkpoint"]).name == f"step_{max(losses):06d}"


def test_no_checkpoint_is_the_best_where_nothing_was_validated(runs) -> None:
    run, _ = runs["full"]
    with pytest.raises(InputError, match=r"no checkpoint has a validation_loss.*export\.checkpoint=newest"):
        export.run(export_job(run, checkpoint="best"))


def test_the_same_export_is_made_once_and_another_form_replaces_it(runs, capsys) -> None:
    run, _ = runs["lora"]
    export.run(export_job(run, form="adapter"))
    before = (run / "export" / "adapter_model.safetensors").stat().st_mtime_ns
    assert export.run(export_job(run, form="adapter"))["form"] == "adapter"
    assert (run / "export" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert export.run(export_job(run, dtype="bf16"))["form"] == "merged"
    tensors = load_file(run / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_full_tuning_has_no_adapter(runs) -> None:
    run, _ = runs["full"]
    with pytest.raises(InputError, match="no adapter"):
        export.run(export_job(run, form="adapter"))


def test_a_run_without_a_complete_checkpoint_cannot_be_exported(tmp_path: Path, chat_model: Path, runs) -> None:
    run = write_job(tmp_path / "run", chat_model, None)
    with pytest.raises(InputError, match=r"no complete checkpoint.*tunesmith train"):
        export.run(export_job(run))
    source = next((runs["full"][0] / "checkpoints").glob("step_*"))
    half = run / "checkpoints" / source.name
    half.mkdir(parents=True)
    (half / "state.json").write_bytes((source / "state.json").read_bytes())
    with pytest.raises(InputError, match="no complete checkpoint"):
        export.run(export_job(run))


def test_an_export_that_does_not_load_back_equal_is_not_put_in_place(runs, monkeypatch) -> None:
    run, _ = runs["full"]
    export.run(export_job(run))
    before = (run / "export" / "manifest.json").read_text()
    original = export.write_model

    def save_wrong(*arguments) -> torch.Tensor:
        expected = original(*arguments)
        file = arguments[-1] / "model.safetensors"
        save_file({name: tensor * 1.1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        return expected

    monkeypatch.setattr(export, "write_model", save_wrong)
    with pytest.raises(TunesmithError, match="other logits than the trained one"):
        export.run(export_job(run, max_shard_size="3GB"))
    assert (run / "export" / "manifest.json").read_text() == before


def test_a_corrupt_checkpoint_is_not_exported(runs) -> None:
    run, _ = runs["full"]
    file = next((run / "checkpoints").glob("step_*")) / "weights" / "model.safetensors"
    with pytest.raises(InputError, match=r"weights/model\.safetensors: corrupt"):
        spoil(file, lambda: export.run(export_job(run)))


@pytest.mark.parametrize("target", ["hub:nobody", "org/name", "hub:a/b/c"])
def test_an_upload_needs_a_name_on_the_hub(runs, target: str) -> None:
    run, _ = runs["full"]
    with pytest.raises(InputError, match=r"is not hub:<org>/<name>"):
        export.run(export_job(run, to=target))
