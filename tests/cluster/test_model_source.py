"""A model's fingerprint depends on the contents of its folder, not on its path."""

import shutil

import pytest

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.model_source import fingerprint_folder, locate_model, model_revision


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_moving_a_model_keeps_its_revision_and_changing_it_does_not(model, tmp_path):
    before = model_revision(ModelConfig(path=str(model)))
    shutil.copytree(model, tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("says nothing about the weights")
    assert model_revision(ModelConfig(path=str(tmp_path / "moved"))) == before
    for name, content in (("model.safetensors", b"weightz"), ("config.json", b"[]"), ("tokenizer.json", b"{}")):
        shutil.copytree(model, tmp_path / name)
        (tmp_path / name / name).write_bytes(content)
        assert fingerprint_folder(tmp_path / name) != fingerprint_folder(model)


def test_a_relative_folder_becomes_absolute_and_a_hub_name_stays(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    assert locate_model(ModelConfig(path="model")).path == str(model)
    assert locate_model(ModelConfig(path="org/name", revision="v1")) == ModelConfig(path="org/name", revision="v1")


def test_a_model_that_the_hub_does_not_have_is_bad_input(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"there is no folder org/no-such-model, and the hub does not answer \("):
        model_revision(ModelConfig(path="org/no-such-model"))
