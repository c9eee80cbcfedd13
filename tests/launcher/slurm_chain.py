"""A chain of jobs and a Slurm that takes them, for tests of what is submitted and shown."""

import re
import time
from collections.abc import Callable, Sequence
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


def queue_line(job_id: str, state: str = "PENDING", name: str = "", rest: str = "0:00|1||(null)|None") -> str:
    """A line of squeue, of a job that was submitted now."""
    return f"{job_id}|{state}|{rest}|{time.strftime('%Y-%m-%dT%H:%M:%S')}|{name}"


@dataclass(frozen=True)
class FakeSlurm(Slurm):
    """Takes jobs and remembers every command. `refuse` is the beginning of a command that fails.

    `sbatch` changes what sbatch prints for a job. If it raises, Slurm has taken the job all the same.
    """

    said: list[list[str]] = field(default_factory=list)
    queue_lines: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)  # of squeue and scontrol, by the last word of the command
    refuse: tuple[str, ...] = ()
    refuse_at: int = 1  # which of these commands
    sbatch: Callable[[str], str] = "{}\n".format
    num_silent: list[int] = field(default_factory=lambda: [0])  # how often squeue prints nothing

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
                [name] = [word.partition("=")[2] for word in argv if word.startswith("--job-name=")]
                parents = [word.partition("=")[2] for word in argv if word.startswith("--dependency")]
                waits = f"{parents[0]}(unfulfilled)" if parents else "(null)"
                line = queue_line(job_id, name=name, rest=f"0:00|1||{waits}|Dependency")
                self.queue_lines.setdefault(job_id, line)
                return self.sbatch(job_id)
            case "squeue" | "scontrol" if argv[-1] in self.answers:
                return self.answers[argv[-1]]
            case "squeue" if self.num_silent[0]:
                self.num_silent[0] -= 1
            case "squeue":
                wanted = argv[3].partition("=")[2].split(",")
                is_named = argv[3].startswith("--name=")
                known = [
                    (line.split("|")[8] if is_named else job_id, line) for job_id, line in self.queue_lines.items()
                ]
                return "".join(f"{line}\n" for key, line in known if key in wanted)
            case "scancel":
                self.queue_lines[argv[1]] = re.sub("PENDING|RUNNING", "CANCELLED", self.queue_lines[argv[1]])
            case "scontrol" if "show" in argv:
                if argv[-1] not in self.queue_lines:
                    raise SlurmRefused("scontrol: slurm_load_jobs error: Invalid job id specified")
                return f"JobId={argv[-1]} JobState={self.queue_lines[argv[-1]].split('|')[1]}"
        return ""
