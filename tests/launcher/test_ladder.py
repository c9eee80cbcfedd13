"""The rungs from one GPU to a cluster: each recipe fits its GPUs as it stands, and its plan has the right figures."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoConfig

from launcher.plan import describe_stages, print_memory
from launcher.recipe import load
from trainer.memory import usable_bytes

RECIPES = Path(__file__).parents[2] / "recipes"
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_8B = LLAMA_8B | {
    "model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
OLMO2_1B = LLAMA_8B | {
    "model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100352,
}  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """A recipe, its GPUs, and figures worked out by hand."""

    shape: dict  # of the published config.json
    gpu_gib: int
    num_ranks: int
    parameters: str  # trained of all. LoRA of rank 16 trains 16 x (inputs + outputs) of every linear layer
    states: tuple[str, str, str]  # weights 2 bytes, gradients 4 / ranks, AdamW 12 / ranks, in the stage that is chosen
    batch: str
    duration: str


RUNGS = {
    "lora_1gpu": Rung(
        QWEN3_8B, 24, 1, "43,646,976 of 8,190,735,360", ("15.3 GiB", "249.8 MiB", "499.5 MiB"),  # ZeRO-1: 6 bytes
        "128 examples a step.*4 rows per micro batch x 1 rank; up to 65,536 tokens", "3 epochs, 120 steps",
    ),
    "full_1gpu": Rung(
        OLMO2_1B, 40, 1, "1,484,916,736 of 1,484,916,736", ("2.8 GiB", "5.5 GiB", "16.6 GiB"),
        "128 examples a step.*4 rows per micro batch x 1 rank; up to 262,144 tokens", "3 epochs",
    ),
    "self_instruct": Rung(
        LLAMA_8B, 80, 8, "8,030,261,248 of 8,030,261,248", ("15.0 GiB", "3.7 GiB", "11.2 GiB"),
        "128 examples a step.*4 rows per micro batch x 8 ranks; up to 65,536 tokens", "3 epochs, 1,221 steps",
    ),
    "tulu3_8b_4nodes": Rung(
        LLAMA_8B, 80, 32, "8,030,261,248 of 8,030,261,248", ("15.0 GiB", "957.3 MiB", "2.8 GiB"),
        "128 examples a step.*1 rows per micro batch x 32 ranks; up to 524,288 tokens", "2 epochs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_fits_its_gpus_and_its_plan_has_the_right_figures(tmp_path: Path, name: str) -> None:
    rung = RUNGS[name]
    AutoConfig.for_model(**rung.shape).save_pretrained(tmp_path)
    recipe = load(RECIPES / f"{name}.yaml", [f"model.path={tmp_path}", f"train.gpu_memory_gib={rung.gpu_gib}"])
    if recipe.slurm.of("train").nodes:
        recipe = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"num_processes": recipe.slurm.of("train").ranks})}
        )
    assert recipe.train.num_processes == rung.num_ranks
    what = {stage: text for stage, text, _ in describe_stages(recipe)}["train"]
    assert re.search(rung.batch, what) and re.search(f"; {rung.duration}( if|$)", what), what
    screen = io.StringIO()
    print_memory(recipe, Console(file=screen, width=200), lambda: usable_bytes(recipe.train, rung.num_ranks))
    (chosen,) = (line for line in screen.getvalue().splitlines() if "chosen" in line)
    assert tuple(cell.strip() for cell in chosen.strip("│ ").split("│"))[1:4] == rung.states
    assert f"{rung.parameters} parameters are trained" in screen.getvalue()
