"""The code that a run's jobs execute: a copy in the run folder, so that edits after submission change nothing.

<run>/code/<hash>/ holds the four packages, the scripts of slurm/ and pyproject.toml. The hash is of names and contents.
"""

import hashlib
import os
import secrets
import shutil
from pathlib import Path

from cluster.errors import InputError
from cluster.files import explain_full_disk

PROJECT = Path(__file__).resolve().parents[2]
CODE_VARIABLE = "TUNESMITH_CODE"  # the folder of the code that the supervisor of a job runs, for the job's steps
RUNNING_CODE = Path(os.path.abspath(__file__)).parents[2]  # as Python found it; inside a container links may differ
PARTS = ("cluster", "generation", "launcher", "trainer", "slurm", "pyproject.toml")


def code_files(project: Path) -> list[Path]:
    """Every file of the snapshot, relative to the project, in a fixed order."""
    files = [
        path.relative_to(project)
        for part in PARTS
        for path in ([project / part] if (project / part).is_file() else (project / part).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    ]
    return sorted(files)


def read_code(project: Path) -> tuple[dict[Path, bytes], str]:
    """Every file of the code with its content, and a hash of both."""
    digest = hashlib.sha256()
    contents = {file: (project / file).read_bytes() for file in code_files(project)}
    for file, content in contents.items():
        digest.update(f"{file}\0{len(content)}\0".encode() + content)
    return contents, digest.hexdigest()[:16]


def code_hash() -> str:
    """The hash of the code that this process runs. A copy in a run folder is named after it."""
    return read_code(PROJECT)[1]


def check_code_of_step() -> None:
    """Raise InputError if this process is part of a job whose supervisor runs other code."""
    wanted = os.environ.get(CODE_VARIABLE)
    if wanted is not None and Path(wanted) != RUNNING_CODE:
        raise InputError(
            f"the job runs the code in {wanted}, and this part of it that in {RUNNING_CODE}. Look for settings of "
            "PYTHONPATH on the nodes or in the container."
        )


def take_snapshot(folder: Path, project: Path = PROJECT) -> Path:
    """Copy the project's code to `folder`/<hash> unless it is there, and return that place."""
    if not (project / "slurm").is_dir():
        raise InputError(
            f"{project} has no folder slurm/ with the scripts of the jobs. Install the project from its repository "
            "(pip install -e), and submit from there."
        )
    contents, name = read_code(project)
    snapshot = folder / name
    if snapshot.is_dir():
        if read_code(snapshot)[1] == name:
            return snapshot
        shutil.rmtree(snapshot)  # it was changed
    # Folders and files get the rights that the user's umask and the run folder give, so no temporary folder of Python.
    partial = folder / f".partial-{name}-{secrets.token_hex(4)}"
    with explain_full_disk(folder):
        partial.mkdir(parents=True)
        try:
            for file, content in contents.items():
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                (partial / file).write_bytes(content)
                if os.access(project / file, os.X_OK):  # whoever may read it may execute it
                    mode = (partial / file).stat().st_mode
                    (partial / file).chmod(mode | (mode & 0o444) >> 2)
            os.rename(partial, snapshot)
        except OSError:
            if not snapshot.is_dir():  # else another process has made it; the same hash is the same code
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return snapshot
