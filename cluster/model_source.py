"""Where a model comes from, and the fingerprint of its weights, which is part of the id of every request."""

import hashlib
from pathlib import Path

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.files import MIB, sha256_file

MAX_TOY_BYTES = 64 * MIB  # the toy world's models have 3, the smallest that speak English 270


def locate_model(model: ModelConfig) -> ModelConfig:
    """The model with an absolute path if it is a folder. A name on the hub stays as it is.

    A path is a folder if it exists or starts with `.`, `/` or `~`. Raises InputError if this folder holds no model.
    """
    folder = Path(model.path).expanduser()
    if not folder.exists() and not model.path.startswith((".", "/", "~")):
        if model.path.count("/") > 1:
            raise InputError(
                f"model.path: {Path.cwd()} has no folder {model.path}, and a name on the hub has the form org/name."
            )
        return model
    if not folder.is_dir():
        raise InputError(f"model.path: there is no folder {folder.absolute()}. Check the path, or give org/name.")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model.path: {folder.absolute()} holds no config.json, so it is not a model in Hugging Face's format."
        )
    return ModelConfig(path=str(folder.resolve()), revision=model.revision)


def is_toy(model: ModelConfig) -> bool:
    """Whether the model is so small that a second thread gives no speed. A name on the hub is never one."""
    folder = Path(model.path)
    weights = (file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    return folder.is_dir() and sum(weights) < MAX_TOY_BYTES


def find_config(model: ModelConfig) -> Path | None:
    """The model's config.json in its folder or in the hub's cache. None means that it is not on this machine."""
    located = locate_model(model)
    if Path(located.path).is_dir():
        return Path(located.path) / "config.json"
    from huggingface_hub import try_to_load_from_cache  # slow to import, and most runs use a folder

    found = try_to_load_from_cache(located.path, "config.json", revision=located.revision)
    return Path(found) if isinstance(found, str) else None


def model_revision(model: ModelConfig) -> str:
    """The identity of the model's weights: the commit on the hub, or a hash of the folder's files.

    Raises InputError if the hub is not reachable and its cache does not hold the model.
    """
    folder = Path(model.path)
    if folder.is_dir():
        return f"sha256:{fingerprint_folder(folder)}"
    from huggingface_hub import snapshot_download  # slow to import, and most runs use a folder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # One small file is enough to resolve a branch to its commit, and offline it comes from the cache.
        snapshot = snapshot_download(model.path, revision=model.revision, allow_patterns=["config.json"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        refusal = "does not answer" if isinstance(error, LocalEntryNotFoundError) else "does not give it"
        raise InputError(
            f"model.path: there is no folder {model.path}, and the hub {refusal} (revision "
            f"{model.revision or 'main'}: {reason}). Check the path or the name. If the model is gated, log in with "
            "`hf auth login`."
        ) from error
    return Path(snapshot).name


def fingerprint_folder(folder: Path) -> str:
    """SHA-256 over names and contents of a model's top-level JSON and safetensors files: 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()[:16]
