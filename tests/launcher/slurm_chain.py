"""A chain of jobs and a Slurm that takes them, for tests of what is submitted and shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from launcher.recipe import Recipe, load
from launcher.slurm.client import Slurm, SlurmRefused
from launcher.slurm.sbatch import Submission

ENVIRON = {"HOME": "/home/me", "PATH": "/usr/bin", "NCCL_DEBUG": "INFO", "EDITOR": "vi", "MY_TOKEN": "s3cret"}


def recipe_of(folder: Path, slurm: dict | None = None, **sections: object) -> Recipe:
    """A recipe with this `slurm:` section, its run folder below `folder`."""
    values = {"name": "tiny", "model": {"path": "some/model"}, "train": {"precision": "fp32"}, "slurm": slurm or {}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | sections))
    return load(folder / "recipe.yaml", [f"run_dir={folder / 'run'}"])


def submission_of(recipe: Recipe, skip: Sequence[str] = ("synthesize",), environ: dict | None = None) -> Submission:
    return Submission(recipe, Path("/work"), Path("/code/1"), "/opt/python", environ or ENVIRON, frozenset(skip))


@dataclass(frozen=True)
class FakeSlurm(Slurm):
    """Takes jobs and remembers every command. `refuse` is the beginning of a command that fails."""

    said: list[list[str]] = field(default_factory=list)
    queue_lines: dict[str, str] = field(default_factory=dict)
    refuse: tuple[str, ...] = ()
    refuse_at: int = 1  # which of these commands

    def call(self, argv: Sequence[str]) -> str:
        self.said.append(list(argv))
        same = [words for words in self.said if tuple(words[: len(self.refuse)]) == self.refuse]
        if self.refuse and self.said[-1] in same[self.refuse_at - 1 :]:
            raise SlurmRefused(f"{argv[0]}: refused")
        match argv[0]:
            case "sinfo":
                return "gpu*|8|infinite|up\n"
            case "sbatch" if "--test-only" in argv:
                return ""
            case "sbatch":
                job_id = str(100 + sum(words[0] == "sbatch" and "--test-only" not in words for words in self.said))
                parents = [word.partition("=")[2] for word in argv if word.startswith("--dependency")]
                waits = f"{parents[0]}(unfulfilled)" if parents else "(null)"
                self.queue_lines.setdefault(job_id, f"{job_id}|PENDING|0:00|1||{waits}|Dependency")
                return f"{job_id}\n"
            case "squeue":
                ids = argv[3].partition("=")[2].split(",")
                return "".join(f"{self.queue_lines[job_id]}\n" for job_id in ids if job_id in self.queue_lines)
            case "scancel":
                self.queue_lines[argv[1]] = f"{argv[1]}|CANCELLED|0:00|1||(null)|None"
        return ""
