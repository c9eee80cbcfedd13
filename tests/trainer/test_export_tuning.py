"""Every way of tuning a part of a model, from training to an export that answers as the model in the trainer did."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import InputError
from tests.trainer.test_export import export_job, train_and_keep
from tests.trainer.tools import make_tokenizer, save_llama, train_here, weights, write_job
from trainer import export
from trainer.job import read_job
from trainer.model.adapters import load_adapter

pytestmark = pytest.mark.usefixtures("one_rank")

LORA = {"rank": 4, "alpha": 16}
VARIANTS = {
    "rslora": {"tuning": "lora", "lora": LORA | {"rslora": True}},
    "dora": {"tuning": "lora", "lora": LORA | {"dora": True}, "zero_stage": 3},
    "grown-dora": {"tuning": "lora", "lora": LORA | {"dora": True}},  # the base has no tokens for the chat template
    "ia3": {"tuning": "ia3", "zero_stage": 3},
    "prefix": {"tuning": "prefix", "packing": False, "zero_stage": 3},
    "prompt": {"tuning": "prompt", "packing": False, "prompt": {"num_virtual_tokens": 6, "init_text": "Say"}},
    "adapter": {"tuning": "adapter", "adapter": {"bottleneck_size": 8}, "zero_stage": 3},
}
MERGED = ("rslora", "dora", "grown-dora", "ia3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, chat_model: Path, chat_data: Path, one_rank) -> dict[str, tuple[Path, torch.nn.Module]]:
    """Trained runs by name, with the live model of each and a checkpoint of every step."""
    root = tmp_path_factory.mktemp("tuned-runs")
    bare = save_llama(root / "bare", make_tokenizer(), tied=False)
    found = {}
    for name, settings in VARIANTS.items():
        model = bare if name.startswith("grown") else chat_model
        every = {"checkpoint": {"every_steps": 1, "keep_last": 9}, "max_steps": 4, "learning_rate": 0.05}
        run = write_job(root / name, model, chat_data, **every, **settings)
        found[name] = run, train_and_keep(run)
    return found


def logits(lm: torch.nn.Module, run: Path) -> torch.Tensor:
    """For the text without virtual tokens [1, S, V]."""
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    ids = tokenizer("<|im_start|>user\nSay the words cedar dune<|im_end|>\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return lm(input_ids=ids).logits[:, -ids.shape[1] :].float()


def base_of(run: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(read_job(run).model.path)


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"grown-dora"}))
def test_an_adapter_export_answers_as_the_model_in_the_trainer_does(runs, name: str) -> None:
    run, live = runs[name]
    result = export.run(export_job(run, form="adapter"))
    assert result["max_logit_error"] < 1e-4
    if name == "adapter":
        loaded = load_adapter(base_of(run), run / "export")
    else:
        loaded = AutoPeftModelForCausalLM.from_pretrained(run / "export").eval()
    expected = logits(live, run)
    torch.testing.assert_close(logits(loaded, run), expected, rtol=0, atol=2e-4)
    assert (logits(base_of(run), run) - expected).abs().max() > 0.02, "nothing was trained"
    assert sorted(path.name for path in (run / "export").glob("*.safetensors")) == ["adapter_model.safetensors"]


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_export_answers_as_the_model_in_the_trainer_does(runs, name: str) -> None:
    run, live = runs[name]
    assert export.run(export_job(run))["form"] == "merged"
    loaded = AutoModelForCausalLM.from_pretrained(run / "export", use_safetensors=True)
    torch.testing.assert_close(logits(loaded, run), logits(live, run), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - set(MERGED)))
def test_what_cannot_be_merged_is_not_exported_so(runs, name: str) -> None:
    run, _ = runs[name]
    with pytest.raises(InputError, match=r"cannot be merged.*export\.form=adapter"):
        export.run(export_job(run))


@pytest.mark.parametrize("name", ["rslora", "adapter"])
def test_an_adapter_is_not_exported_for_another_base(runs, tmp_path: Path, name: str) -> None:
    """The folder that the recipe names was overwritten by another model since training."""
    run, _ = runs[name]
    base = Path(read_job(run).model.path)
    shutil.copytree(base, tmp_path / "kept")
    tensors = load_file(base / "model.safetensors")
    try:
        save_file({key: tensor * 1.5 for key, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="trained on another base"):
            export.run(export_job(run, form="adapter", max_shard_size="3GB"))
    finally:
        shutil.copy2(tmp_path / "kept" / "model.safetensors", base / "model.safetensors")


@pytest.mark.parametrize("name", VARIANTS)
def test_training_goes_on_from_a_checkpoint_bit_for_bit(runs, tmp_path: Path, name: str) -> None:
    run, _ = runs[name]
    shutil.copytree(run, tmp_path / "run")
    _, *later = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert later
    for folder in later:
        shutil.rmtree(folder)
    assert train_here(tmp_path / "run")["status"] == "done"
    found, wanted = weights(tmp_path / "run"), weights(run)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
