"""What looks like a token is refused wherever it is written, and is not repeated in the refusal."""

from pathlib import Path

import pytest

from cluster.errors import InputError
from launcher.recipe import load
from launcher.secrets import looks_like_a_token

RECIPE = "name: tiny\nmodel: {path: some/model, revision: 0123456789abcdef0123456789abcdef01234567}\n"
HUB, WANDB = "hf_" + "aB3" * 11, "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"export.to=hub:me/{HUB}", "export.to"),
        (f"export.hub_token={HUB}", "export.hub_token"),
        (f"slurm.options=[--comment={HUB}]", "slurm.options"),
        (f"slurm.environment=[WANDB_API_KEY={WANDB}]", "slurm.environment"),
        (f"slurm.options=[--comment={WANDB}]", "slurm.options"),
        (f"slurm.{HUB}=1", "slurm"),
        ("train.data=sk-" + "a1" * 20, "train.data"),
    ],
)
def test_a_literal_token_is_refused_with_the_fix(tmp_path: Path, override: str, key: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(InputError) as raised:
        load(tmp_path / "recipe.yaml", [override])
    message = str(raised.value)
    assert message.startswith(f"{key}: this looks like a secret") and "export.hub_token={env: HF_TOKEN}" in message
    assert HUB not in message and WANDB not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.revision", WANDB), ("model.path", "org/hf_model-7b"), ("model.path", f"/cache/snapshots/{WANDB}"),
        ("train.data", "task-1-sk-learn"),
    ],
)  # fmt: skip
def test_what_only_looks_a_little_like_one_is_not(key: str, value: str) -> None:
    assert not looks_like_a_token(key, value)


def test_a_secret_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE + "export: {to: 'hub:me/x', hub_token: {env: MY_TOKEN}}\n")
    assert load(tmp_path / "recipe.yaml", []).export.hub_token.env == "MY_TOKEN"
