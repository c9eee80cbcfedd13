"""Models of other families than Llama: the default recipe trains them on a CPU, or is refused with place and fix."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cluster.config import ModelConfig
from cluster.errors import InputError
from tests.trainer.tools import chat_documents, names_of, train_here, write_chats, write_job
from trainer.config.train import TrainConfig
from trainer.model.adapters import adapt
from trainer.model.attention import attend_by_document

pytestmark = pytest.mark.usefixtures("one_rank")

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
OLD = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 0}
OWN_SIZES = {
    "gpt2": OLD | {"n_positions": 512},
    "gpt_neox": OLD | {"intermediate_size": 64, "max_position_embeddings": 512},
    "opt": OLD | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0},
    "falcon": OLD | {"new_decoder_architecture": True, "num_kv_heads": 1},
    "gptj": OLD | {"n_positions": 512, "rotary_dim": 8},
    "gpt_neo": {
        "num_layers": 2, "num_heads": 2, "hidden_size": 32, "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0,
    },
    "bloom": OLD,
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 512},
    "mamba": OLD | {"state_size": 4, "num_attention_heads": None},
    "gpt_oss": SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16},
    "gemma2": SIZES | {"sliding_window": 16, "final_logit_softcapping": None, "attn_logit_softcapping": 0.5},
    "mixtral": SIZES | {"num_local_experts": 4},
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "llama4_text": SIZES | {
        "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 16, "num_experts_per_tok": 1,
    },
}  # fmt: skip
# Family -> the attention that auto chooses, and whether rows are packed.
CHOSEN = {
    "mixtral": ("sdpa_by_document", True),
    "gpt2": ("sdpa_by_document", True), "gpt_neox": ("sdpa_by_document", True), "opt": ("sdpa_by_document", True),
    "falcon": ("sdpa", False), "gptj": ("eager", True), "gpt_neo": ("eager", True), "bloom": ("eager", False),
    "mpt": ("eager", False), "mamba": ("eager", False), "gpt_oss": ("eager", False), "gemma2": ("eager", True),
    "llama4_text": ("sdpa", False),
}  # fmt: skip
LONG = ("gpt_neox", "gptj", "gpt_neo", "mpt")
DEFAULTS = {
    "precision": "bf16",
    "batch_unit": "examples",
    "global_batch_size": 128,
    "micro_batch_size": 4,
    "max_seq_len": 512,
}


def save_model(folder: Path, family: str, tokenizer, **changes: object) -> Path:
    """A folder with a random model of this family in float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **OWN_SIZES[family] | changes)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few_chats(tmp_path_factory) -> Path:
    return write_chats(tmp_path_factory.mktemp("few") / "chats.jsonl", chat_documents(6))


@pytest.mark.parametrize("family", names_of(CHOSEN, LONG))
def test_the_default_recipe_trains_a_model_of_another_family(
    tmp_path: Path, tokenizer, few_chats: Path, family: str, capsys
) -> None:
    model = save_model(tmp_path / "model", family, tokenizer)
    result = train_here(write_job(tmp_path / "run", model, few_chats, max_steps=1, **DEFAULTS))
    assert (result["status"], result["step"]) == ("done", 1)
    attention, is_packed = CHOSEN[family]
    output = capsys.readouterr()
    assert f"attention: {attention}" in output.out + output.err
    assert ("packing is off" in output.out + output.err) == (not is_packed)


def test_a_model_that_soft_caps_its_attention_is_not_given_one_that_ignores_it(
    tmp_path: Path, tokenizer, few_chats: Path
) -> None:
    model = save_model(tmp_path / "model", "gemma2", tokenizer)
    for attention in ("sdpa", "sdpa_by_document"):
        run = write_job(tmp_path / attention, model, few_chats, attention=attention)
        with pytest.raises(InputError, match=rf"={attention} does not work: it ignores softcap.*attention=auto"):
            train_here(run)


@pytest.mark.parametrize("given", [{"softcap": 50.0}, {"s_aux": torch.zeros(2)}, {"is_causal": False}])
def test_attention_by_document_refuses_an_argument_that_it_does_not_know(given: dict) -> None:
    states = torch.randn(1, 2, 4, 8)
    attend_by_document(torch.nn.Module(), states, states, states, use_cache=False, position_ids=torch.arange(4))
    with pytest.raises(InputError, match=r"does not know .*train\.attention=eager"):
        attend_by_document(torch.nn.Module(), states, states, states, **given)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_leak_between_packed_documents_is_found_in_every_precision(
    tmp_path: Path, tokenizer, few_chats: Path, precision: str
) -> None:
    """Convolutions cross the border of two documents, by less than bf16 rounds."""
    model = save_model(tmp_path / "model", "lfm2", tokenizer, initializer_range=0.01)
    settings = DEFAULTS | {"precision": precision}
    with pytest.raises(InputError, match=r"packed documents see each other.*train\.packing=false"):
        train_here(write_job(tmp_path / "run", model, few_chats, **settings))
    unpacked = write_job(tmp_path / "unpacked", model, few_chats, max_steps=1, packing=False, **settings)
    assert train_here(unpacked)["status"] == "done"


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
def test_rows_longer_than_a_table_of_positions_are_refused(tmp_path: Path, tokenizer, few_chats, family: str) -> None:
    model = save_model(tmp_path / "model", family, tokenizer)
    with pytest.raises(InputError, match=r"max_seq_len=600 is more than the 512 positions.*train\.max_seq_len=512"):
        train_here(write_job(tmp_path / "run", model, few_chats, max_seq_len=600))


def test_weights_that_are_pickles_are_refused_with_the_command_that_converts_them(
    tmp_path: Path, chat_model: Path, few_chats: Path
) -> None:
    shutil.copytree(chat_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.path: .*pytorch_model\.bin only, a pickle.*save_pretrained"):
        train_here(write_job(tmp_path / "run", tmp_path / "model", few_chats))


def shape(family: str, **changes: object) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **OWN_SIZES.get(family, SIZES) | changes))


@pytest.mark.parametrize(
    ("family", "settings", "absent"),
    [
        ("phi3", {"tuning": "ia3"}, "k_proj, v_proj"),
        ("phi3", {"tuning": "lora", "lora": {"target_modules": ["q_proj", "v_proj", "o_proj"]}}, "q_proj, v_proj"),
        ("gpt2", {"tuning": "lora", "lora": {"target_modules": ["c_attn", "q_proj"]}}, "q_proj"),
    ],
)
def test_modules_that_a_model_lacks_are_named_with_those_that_it_has(family: str, settings: dict, absent: str) -> None:
    had = "down_proj, gate_up_proj, lm_head, o_proj, qkv_proj" if family == "phi3" else "c_attn, c_fc, c_proj, lm_head"
    with pytest.raises(InputError, match=rf"train\.{settings['tuning']}: .* has no module {absent}\. .*: {had}\."):
        adapt(shape(family), ModelConfig(path="unused"), TrainConfig(**settings), [])


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], r".*(lm_head|q_proj)"])
def test_an_adapter_of_one_of_two_tied_weights_is_refused(targets: object) -> None:
    config = TrainConfig(tuning="lora", lora={"target_modules": targets})
    with pytest.raises(InputError, match=r"train\.lora: .* tied weight.* Leave embed_tokens and lm_head out"):
        adapt(shape("llama", tie_word_embeddings=True), ModelConfig(path="unused"), config, [])
    adapt(shape("llama", tie_word_embeddings=False), ModelConfig(path="unused"), config, [])
