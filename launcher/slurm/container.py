"""What srun needs to run a step inside an image.

The launcher leaves the settings in the run folder, and the job's script finds them by the file that
TUNESMITH_CONTAINER names: the script of a job knows it at once, without the slow reading of a recipe.
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
    """An image and what is seen inside it. `mounts` are outside:inside."""

    runtime: str
    image: str
    mounts: tuple[str, ...]
    python: str

    def srun_options(self) -> list[str]:
        """pyxis adds these options to srun; apptainer is a command of the step instead."""
        if self.runtime != "pyxis":
            return []
        return [f"--container-image={self.image}", f"--container-mounts={','.join(self.mounts)}"]

    def command(self) -> list[str]:
        """What goes before `-m module`: Python, and the command that enters the image."""
        if self.runtime == "pyxis":
            return [self.python]
        binds = [word for mount in self.mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", *binds, self.image, self.python]

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def configured(config: "ContainerConfig", folders: tuple[Path, ...]) -> Container:
    """The container of a recipe, with folders that are the same inside.

    /tmp is among them: the steps of a node meet there, as Ray's driver does its raylet.
    """
    own = tuple(f"{folder}:{folder}" for folder in dict.fromkeys((*folders, Path("/tmp"))))
    return Container(config.runtime, config.image, (*own, *config.mounts), config.python)


def of_job(environ: Mapping[str, str] = os.environ) -> Container | None:
    """The container of the job that this process belongs to, or None."""
    if not (path := environ.get(ENVIRONMENT)):
        return None
    values = json.loads(Path(path).read_text())
    return Container(**values | {"mounts": tuple(values["mounts"])})


def step_options() -> list[str]:
    """What srun needs for a step of this job inside its container, if it has one."""
    inside = of_job()
    return inside.srun_options() if inside else []


def python_module(module: str, *arguments: str) -> list[str]:
    """The command line of one of our modules, inside the job's container if it has one.

    -P: a folder of the same name in the working directory is not ours.
    """
    inside = of_job()
    return [*(inside.command() if inside else [sys.executable]), "-P", "-m", module, *arguments]
