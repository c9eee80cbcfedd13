"""Where the English model comes from: the cache, and what fills it."""

from pathlib import Path

import pytest

from cluster.errors import InputError
from english import model


@pytest.fixture
def origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache, a hub that does not answer, and a package; the list names what was asked."""
    asked: list[str] = []

    def no_hub(folder: Path) -> None:
        asked.append("hub")

    def package(folder: Path) -> str:
        asked.append("package")
        (folder / "config.json").write_text("{}")
        return "package"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "_from_hub", no_hub)
    monkeypatch.setattr(model, "_from_package", package)
    return asked


def test_a_second_call_finds_the_model_in_the_cache(origins: list[str], tmp_path: Path) -> None:
    assert model.cached_model() is None
    folder = model.get_model()
    assert folder.is_relative_to(tmp_path) and (folder / "config.json").is_file()
    assert model.get_model() == model.cached_model() == folder
    assert origins == ["hub", "package"]


def test_a_damaged_model_is_not_taken_but_made_again(origins: list[str]) -> None:
    folder = model.get_model()
    (folder / "config.json").write_text("[]")
    assert model.cached_model() is None
    assert model.get_model() == folder and model.cached_model() == folder
    assert origins == ["hub", "package"] * 2


def test_what_a_killed_process_left_is_no_model(origins: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "_from_package", killed)
        model.get_model()
    assert model.cached_model() is None
    assert not (model.get_model() / "half").exists()


def test_without_any_network_the_error_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "_from_hub", lambda folder: None)
    monkeypatch.setattr(model.shutil, "which", lambda *args, **kwargs: "false")
    with pytest.raises(InputError, match=r"neither the hub nor the package index .* set model\.path"):
        model.get_model()
    assert model.cached_model() is None
