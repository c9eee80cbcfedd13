"""What srun needs to run a step inside an image.

The launcher writes the settings into the run folder. The variable TUNESMITH_CONTAINER of a job names the file, so the
supervisor has them at once, without reading the recipe, which is slow.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.slurm_config import ContainerConfig

ENVIRONMENT = "TUNESMITH_CONTAINER"


def make_settings(config: "ContainerConfig", folders: tuple[Path, ...]) -> dict[str, list[str]]:
    """Options of srun for a step in the container, and the command line before `-m module`.

    `folders` have the same paths inside as outside. So has /tmp: Ray's driver and its raylet, steps of the same node,
    communicate there.
    """
    own = (f"{folder}:{folder}" for folder in dict.fromkeys((*folders, Path("/tmp"))))
    mounts = [*own, *config.mounts]
    if config.runtime == "pyxis":  # it adds options to srun, and apptainer is a command of the step
        options = [f"--container-image={config.image}", f"--container-mounts={','.join(mounts)}"]
        return {"srun_options": options, "command": [config.python]}
    binds = [argument for mount in mounts for argument in ("--bind", mount)]
    return {"srun_options": [], "command": ["apptainer", "exec", *binds, config.image, config.python]}


def job_container(environ: Mapping[str, str] = os.environ) -> dict[str, list[str]] | None:
    """The settings of the container of the job that this process belongs to. None means that it has no container."""
    path = environ.get(ENVIRONMENT)
    return json.loads(Path(path).read_text()) if path else None


def step_options() -> list[str]:
    """Options of srun for a step of this job inside its container, if it has one."""
    inside = job_container()
    return inside["srun_options"] if inside else []


def python_module(module: str, *arguments: str) -> list[str]:
    """The command line of one of our modules, inside the job's container if it has one.

    With -P Python imports nothing from the working directory, where a folder may have the same name.
    """
    inside = job_container()
    return [*(inside["command"] if inside else [sys.executable]), "-P", "-m", module, *arguments]
