"""Adapters of every kind: merged as they were unmerged, loaded as they were saved, and onto their own base alone."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.config import ModelConfig
from cluster.errors import InputError
from trainer.config.train import TrainConfig
from trainer.model.adapters import adapt, is_adapted, load_adapter, save_adapter
from trainer.model.bottleneck import add_bottlenecks

IDS = torch.arange(40).reshape(2, 20)
METHODS = {
    "lora": {"lora": {"rank": 4}},
    "ia3": {},
    "prefix": {"prefix": {"num_virtual_tokens": 3}, "packing": False},
    "prompt": {"prompt": {"num_virtual_tokens": 3}, "packing": False},
    "adapter": {"adapter": {"bottleneck_size": 6, "activation": "silu"}},
}
SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def adapted(base: Path, seed: int, **train: object) -> torch.nn.Module:
    """The model in `base` with an adapter of random weights."""
    torch.manual_seed(seed)  # of what the adapter begins with
    lm = AutoModelForCausalLM.from_pretrained(base)
    lm = adapt(lm, ModelConfig(path=str(base)), TrainConfig(precision="fp32", **train), []).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return lm


def logits(lm: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=ids).logits


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@settings(max_examples=20, deadline=None)
@given(
    rank=st.integers(1, 40), alpha=st.floats(0.5, 64), rslora=st.booleans(), dora=st.booleans(),
    targets=st.sampled_from(["all-linear", ("q_proj", "v_proj"), ("down_proj",)]), seed=st.integers(0, 99),
)  # fmt: skip
def test_merged_lora_answers_as_unmerged_lora_does(
    chat_model: Path, rank: int, alpha: float, rslora: bool, dora: bool, targets: str | tuple, seed: int
) -> None:
    lora = {"rank": rank, "alpha": alpha, "rslora": rslora, "dora": dora, "target_modules": targets}
    lm = adapted(chat_model, seed, tuning="lora", lora=lora).double()  # large weights make much of float32's rounding
    expected = logits(lm)
    assert_alike(logits(lm.merge_and_unload()), expected)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_merged_ia3_answers_as_unmerged_ia3_does(chat_model: Path, seed: int) -> None:
    lm = adapted(chat_model, seed, tuning="ia3")
    expected = logits(lm)
    assert_alike(logits(lm.merge_and_unload()), expected)


@settings(max_examples=10, deadline=None)
@given(rank=st.integers(1, 64), alpha=st.floats(0.5, 64), rslora=st.booleans())
def test_lora_is_scaled_as_its_paper_says(chat_model: Path, rank: int, alpha: float, rslora: bool) -> None:
    lora = {"rank": rank, "alpha": alpha, "rslora": rslora, "target_modules": ("q_proj",)}
    lm = adapted(chat_model, 0, tuning="lora", lora=lora)
    layer = lm.get_base_model().model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale = alpha / (rank**0.5 if rslora else rank)
    torch.testing.assert_close(layer.get_delta_weight("default"), scale * up @ down)


@pytest.mark.parametrize("tuning", METHODS)
def test_an_adapter_loads_as_it_was_saved(tmp_path: Path, chat_model: Path, tuning: str) -> None:
    lm = adapted(chat_model, 1, tuning=tuning, **METHODS[tuning])
    assert is_adapted(lm)
    save_adapter(lm, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(chat_model)
    assert (logits(lm)[:, -20:] - logits(plain)).abs().max() > 0.05
    torch.testing.assert_close(logits(load_adapter(plain, tmp_path / "adapter")), logits(lm))


def copy_of(model: Path, folder: Path, change: str) -> Path:
    """The same model with another training, number of shards, precision or name."""
    lm = AutoModelForCausalLM.from_pretrained(model)
    if change == "tuned":
        with torch.no_grad():
            lm.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    lm = lm.to(torch.bfloat16) if change == "bf16" else lm
    lm.save_pretrained(folder, max_shard_size="30KB" if change == "shards" else "4GB")
    return folder


@pytest.mark.parametrize("change", ["tuned", "shards", "bf16", "name"])
@pytest.mark.parametrize("tuning", ["lora", "prompt", "adapter"])
def test_an_adapter_loads_onto_its_own_base_alone(tmp_path: Path, chat_model: Path, tuning: str, change: str) -> None:
    save_adapter(adapted(chat_model, 1, tuning=tuning, **METHODS[tuning]), tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(copy_of(chat_model, tmp_path / "other", change))
    if change == "shards":
        assert len(list((tmp_path / "other").glob("model-*.safetensors"))) > 1
    if change == "tuned":
        with pytest.raises(InputError, match=r"trained on another base.*Use the model that it was trained on"):
            load_adapter(other, tmp_path / "adapter")
        return
    assert is_adapted(load_adapter(other, tmp_path / "adapter"))


def test_a_base_from_the_hub_is_told_by_its_revision(
    tmp_path: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--base"
    (repository / "refs").mkdir(parents=True)
    for branch, commit, change in (("main", "a" * 40, "name"), ("later", "b" * 40, "tuned")):
        copy_of(chat_model, repository / "snapshots" / commit, change)
        (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    save_adapter(adapted(chat_model, 1, tuning="adapter"), tmp_path / "adapter")

    def from_hub(branch: str) -> torch.nn.Module:
        commit = (repository / "refs" / branch).read_text()
        lm = AutoModelForCausalLM.from_pretrained(repository / "snapshots" / commit)
        lm.name_or_path = "org/base"
        return lm

    assert is_adapted(load_adapter(from_hub("main"), tmp_path / "adapter"))
    with pytest.raises(InputError, match="trained on another base"):
        load_adapter(from_hub("later"), tmp_path / "adapter", revision="later")


def test_an_adapter_without_a_record_of_its_base_is_refused(tmp_path: Path, chat_model: Path) -> None:
    save_adapter(adapted(chat_model, 1, tuning="adapter"), tmp_path)
    (tmp_path / "base_model.json").unlink()
    with pytest.raises(InputError, match=r"base_model\.json is missing"):
        load_adapter(AutoModelForCausalLM.from_pretrained(chat_model), tmp_path)


def test_what_is_no_whole_adapter_is_refused(tmp_path: Path, chat_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load_adapter(base, tmp_path)
    save_adapter(adapted(chat_model, 1, tuning="adapter"), tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"found 15 tensors, expected 16"):
        load_adapter(base, tmp_path / "half")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_bottlenecks_go_after_attention_and_feed_forward_and_start_near_the_identity(family: str) -> None:
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE)).eval()
    before = logits(lm)
    num_weights = sum(parameter.numel() for parameter in lm.parameters())
    add_bottlenecks(lm, 8, "gelu")
    trained = {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in lm.parameters()) - num_weights == 2 * 2 * (2 * 32 * 8 + 32 + 8)
    assert all(".bottleneck." in name for name in trained)
    assert {name.split(".bottleneck.")[0].split(".", 3)[3] for name in trained} == {"self_attn.o_proj", "mlp.down_proj"}
    after = logits(lm)
    assert 0 < float((after - before).abs().max() / before.abs().max()) < 0.01
    with torch.no_grad():
        for name, parameter in trained.items():
            if ".up." in name:
                parameter.zero_()
    torch.testing.assert_close(logits(lm), before)  # what is left is the residual


def test_a_model_with_other_layers_is_refused_by_name() -> None:
    config = AutoConfig.for_model(
        "gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    with pytest.raises(InputError, match=r"not work with GPT2LMHeadModel, which has 0 of the 4.*train\.tuning=lora"):
        add_bottlenecks(AutoModelForCausalLM.from_config(config), 8, "gelu")


@pytest.mark.parametrize("tuning", ["lora", "ia3"])
def test_layers_that_are_not_there_are_an_error_of_the_recipe(chat_model: Path, tuning: str) -> None:
    section = {"lora": {"target_modules": ("c_attn",)}, "ia3": {"attention_modules": ("c_attn",)}}[tuning]
    if tuning == "ia3":
        section["feedforward_modules"] = ("c_proj",)
    with pytest.raises(InputError, match=rf"train\.{tuning}: LlamaForCausalLM has no module c_attn"):
        adapted(chat_model, 0, tuning=tuning, **{tuning: section})


def test_a_prompt_starts_as_the_text_asked_for(chat_model: Path, tokenizer) -> None:
    prompt = {"num_virtual_tokens": 9, "init_text": "Say the words"}
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    config = TrainConfig(tuning="prompt", packing=False, prompt=prompt)
    lm = adapt(base, ModelConfig(path=str(chat_model)), config, [])
    ids = tokenizer("Say the words")["input_ids"]
    ids = (ids * 9)[:9]
    torch.testing.assert_close(lm.get_prompt(1)[0].detach(), base.get_input_embeddings().weight[ids].detach())


def test_an_adapters_folder_says_what_it_is(tmp_path: Path, chat_model: Path) -> None:
    save_adapter(adapted(chat_model, 1, tuning="adapter", **METHODS["adapter"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["bottleneck_size"], config["activation"]) == ("BOTTLENECK", 6, "silu")
    assert json.loads((tmp_path / "base_model.json").read_text())["model_type"] == "llama"
