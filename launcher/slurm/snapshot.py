"""The code that a run's jobs execute: a copy in the run folder, so that edits after submission change nothing.

<run>/code/<hash>/ holds the four packages, the scripts of slurm/ and pyproject.toml. The hash is of names and contents.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from cluster.errors import InputError
from cluster.files import explain_full_disk

PROJECT = Path(__file__).resolve().parents[2]
PARTS = ("cluster", "generation", "launcher", "trainer", "slurm", "pyproject.toml")


def code_files(project: Path) -> list[Path]:
    """Every file of the snapshot, relative to the project, in a fixed order."""
    files = [
        path.relative_to(project)
        for part in PARTS
        for path in ([project / part] if (project / part).is_file() else (project / part).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return sorted(files)


def take_snapshot(folder: Path, project: Path = PROJECT) -> Path:
    """Copy the project's code to `folder`/<hash> unless it is there, and return that place."""
    if not (project / "slurm").is_dir():
        raise InputError(
            f"{project} has no folder slurm/ with the scripts of the jobs. Install the project from its repository "
            "(pip install -e), and submit from there."
        )
    files = code_files(project)
    digest = hashlib.sha256()
    contents = {file: (project / file).read_bytes() for file in files}
    for file, content in contents.items():
        digest.update(f"{file}\0{len(content)}\0".encode() + content)
    snapshot = folder / digest.hexdigest()[:16]
    if snapshot.is_dir():
        return snapshot
    folder.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(folder):
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            for file, content in contents.items():
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                (partial / file).write_bytes(content)
                shutil.copymode(project / file, partial / file)
            partial.chmod(0o755)
            os.rename(partial, snapshot)
        except OSError:
            if not snapshot.is_dir():  # else another process has made it; the same hash is the same code
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return snapshot
