"""Where a model comes from, and the fingerprint that goes into the id of every request it answers."""

import hashlib
from pathlib import Path

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.files import sha256_file


def locate_model(model: ModelConfig) -> ModelConfig:
    """The model with an absolute path if it is a folder; a name on the hub stays as it is.

    Raises InputError for what looks like a folder (it exists, or starts with `.`, `/` or `~`) and holds no model.
    """
    folder = Path(model.path).expanduser()
    if not folder.exists() and not model.path.startswith((".", "/", "~")):
        if model.path.count("/") > 1:
            raise InputError(
                f"model.path: {model.path} is no folder here, and a name on the hub has the form org/name. "
                f"Looked in {Path.cwd()}."
            )
        return model
    if not folder.is_dir():
        raise InputError(f"model.path: there is no folder {folder.absolute()}. Check the path, or give org/name.")
    if not (folder / "config.json").is_file():
        raise InputError(f"model.path: {folder.absolute()} holds no config.json, so it is not a model in HF's form.")
    return ModelConfig(path=str(folder.resolve()), revision=model.revision)


def find_config(model: ModelConfig) -> Path | None:
    """The model's config.json if it is on this machine: in its folder, or in the hub's cache. Asks nobody."""
    located = locate_model(model)
    if Path(located.path).is_dir():
        return Path(located.path) / "config.json"
    from huggingface_hub import try_to_load_from_cache  # slow to import, and most runs use a folder

    found = try_to_load_from_cache(located.path, "config.json", revision=located.revision)
    return Path(found) if isinstance(found, str) else None


def model_revision(model: ModelConfig) -> str:
    """What tells this model's weights from any others: the commit on the hub, or a hash of a folder's files.

    Raises InputError if the hub cannot be asked and its cache does not hold the model.
    """
    folder = Path(model.path)
    if folder.is_dir():
        return f"sha256:{fingerprint_folder(folder)}"
    from huggingface_hub import snapshot_download  # slow to import, and most runs use a folder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # The one small file both resolves a branch to its commit and works offline from the cache.
        snapshot = snapshot_download(model.path, revision=model.revision, allow_patterns=["config.json"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model.path: cannot find {model.path} (revision {model.revision or 'main'}) on the hub: {reason} "
            "Check the name, log in with `hf auth login` if it is gated, or give a folder."
        ) from error
    return Path(snapshot).name


def fingerprint_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's top-level JSON and safetensors files, 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()[:16]
