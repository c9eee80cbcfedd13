"""What the scripts in slurm/ do before Python starts, with a scontrol and a Python that stand in for the real ones."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.slurm.snapshot import PROJECT

# In the shell of `salloc --mem --cpus-per-task --gpus-per-node`, and of `srun --pty` and torchrun inside it.
OUTER = {
    "SLURM_MEM_PER_NODE": "1000", "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2",
    "SLURM_NTASKS": "3", "SLURM_NPROCS": "3", "SLURM_STEP_ID": "5", "SLURM_STEP_NODELIST": "n9", "SLURM_EXACT": "1",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SRUN_CPUS_PER_TASK": "8", "SLURM_TRES_PER_TASK": "cpu:8",
    "SLURM_RESTART_COUNT": "4", "PMIX_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n9",
    "TUNESMITH_FENCING_TOKEN": "7", "TUNESMITH_CODE": "/elsewhere", "TUNESMITH_HOSTS": "5 n9",
}  # fmt: skip
OWN = {"SLURM_SUBMIT_DIR": "/work", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


def start(folder: Path, shown: str, project: Path = PROJECT, **environ: str) -> subprocess.CompletedProcess:
    """Run train.sbatch as Slurm does. `shown` is a script that prints what scontrol shows."""
    folder.mkdir(exist_ok=True)
    command = f"Command={project}/slurm/train.sbatch recipe.yaml"
    programs = {"scontrol": f'command="{command}"\n{shown}', "python": "env", "sleep": ""}
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["bash", shutil.copy(project / "slurm/train.sbatch", folder / "slurm_script"), "recipe.yaml"],
        env={"PATH": f"{folder}:/usr/bin:/bin", "TUNESMITH_PYTHON": f"{folder}/python", **environ, **OWN},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def variables(done: subprocess.CompletedProcess) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("JobId=7 Requeue=0 Restarts=0 CPUs/Task=1", {}),
        ("JobId=7 Requeue=0 Restarts=0 CPUs/Task=4", {"SLURM_CPUS_PER_TASK": "4"}),
        ("Restarts=1 CPUs/Task=1 TresPerNode=gres:gpu:2", {"SLURM_GPUS_ON_NODE": "2", "SLURM_RESTART_COUNT": "4"}),
    ],
)
def test_nothing_of_a_job_around_sbatch_gets_into_the_new_one(tmp_path: Path, shown: str, expected: dict) -> None:
    found = variables(start(tmp_path, f'echo "{shown} $command"'.replace(" $command", "\n   $command"), **OUTER))
    assert {name: found[name] for name in OUTER if name in found} == expected
    assert OWN.items() <= found.items()
    assert found["PYTHONPATH"] == str(PROJECT)


def test_a_slurm_that_does_not_show_the_job_is_asked_until_it_does(tmp_path: Path) -> None:
    """It fails first, and then prints nothing."""
    asked = tmp_path / "asked"
    shown = f'echo >>{asked}\ncase $(wc -l <{asked}) in 1) exit 1;; 2) exit 0;; esac\necho "   $command"'
    done = start(tmp_path / "job", shown)
    assert variables(done)["PYTHONPATH"] == str(PROJECT)
    assert done.stdout.count("Slurm does not show job 7. The job asks again") == 2


def test_a_project_whose_path_python_would_split_is_an_error(tmp_path: Path) -> None:
    project = tmp_path / "12:30"
    shutil.copytree(PROJECT / "slurm", project / "slurm")
    done = start(tmp_path / "job", 'echo "   $command"', project)
    assert done.returncode == 2 and "Python splits a path at a colon" in done.stderr
    assert os.listdir(project) == ["slurm"]
