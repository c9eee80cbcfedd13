"""What srun needs to run a step inside an image.

The launcher writes the settings into the run folder. The variable TUNESMITH_CONTAINER of a job names the file, so the
supervisor has them at once, without reading the recipe, which is slow.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.slurm_config import ContainerConfig

ENVIRONMENT = "TUNESMITH_CONTAINER"


@dataclass(frozen=True)
class Container:
    """An image and the folders that are mounted in it. `mounts` are OUTSIDE:INSIDE."""

    runtime: str
    image: str
    mounts: tuple[str, ...]
    python: str

    def srun_options(self) -> list[str]:
        """Options that pyxis adds to srun. apptainer needs none: it is a command of the step."""
        if self.runtime != "pyxis":
            return []
        return [f"--container-image={self.image}", f"--container-mounts={','.join(self.mounts)}"]

    def command(self) -> list[str]:
        """The command line before `-m module`: Python, and for apptainer the command that enters the image."""
        if self.runtime == "pyxis":
            return [self.python]
        binds = [argument for mount in self.mounts for argument in ("--bind", mount)]
        return ["apptainer", "exec", *binds, self.image, self.python]

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def make_container(config: "ContainerConfig", folders: tuple[Path, ...]) -> Container:
    """The container of a recipe, in which `folders` have the same paths as outside.

    /tmp is mounted as well: Ray's driver and its raylet, steps of the same node, communicate there.
    """
    own = tuple(f"{folder}:{folder}" for folder in dict.fromkeys((*folders, Path("/tmp"))))
    return Container(config.runtime, config.image, (*own, *config.mounts), config.python)


def job_container(environ: Mapping[str, str] = os.environ) -> Container | None:
    """The container of the job that this process belongs to, or None."""
    if not (path := environ.get(ENVIRONMENT)):
        return None
    values = json.loads(Path(path).read_text())
    return Container(**values | {"mounts": tuple(values["mounts"])})


def step_options() -> list[str]:
    """Options of srun for a step of this job inside its container, if it has one."""
    inside = job_container()
    return inside.srun_options() if inside else []


def python_module(module: str, *arguments: str) -> list[str]:
    """The command line of one of our modules, inside the job's container if it has one.

    With -P Python imports nothing from the working directory, where a folder may have the same name.
    """
    inside = job_container()
    return [*(inside.command() if inside else [sys.executable]), "-P", "-m", module, *arguments]
