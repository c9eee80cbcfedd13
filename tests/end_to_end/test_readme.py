"""Every command of the README runs: here on the finished demo, or in the test that is named.

So do those of the guides that are named here; tests/test_docs.py checks that the arguments of the others are accepted.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT

COMMAND = re.compile(r"^\$ (.+)$", flags=re.MULTILINE)
README = (ROOT / "README.md").read_text()
COMMANDS = COMMAND.findall(README)
GUIDES = [command for guide in (ROOT / "docs/guides").glob("*.md") for command in COMMAND.findall(guide.read_text())]
DEMO = "recipes/demo/self_instruct.yaml"
(APT_INSTALL,) = (command for command in COMMANDS if command.startswith("sudo apt install "))
RUN_ELSEWHERE = {
    APT_INSTALL: "tests/bare_machine.py:sudo (apt install",
    "make demo": "tests/end_to_end/conftest.py:attempt",
    "make test": ".ci/run:make test",
    f"tunesmith run {DEMO} --on slurm": 'tests/slurm/test_demo_chain.py:"--on", "slurm"',
    f"sbatch --nodes 2 slurm/synthesize.sbatch {DEMO} engine.num_replicas=2": (
        "tests/slurm/test_ray_job.py:def test_vllm_engines_on_two_nodes"
    ),
    f"sbatch --nodes 2 slurm/train.sbatch {DEMO}": "tests/slurm/test_train_sbatch.py:def test_two_nodes",
    f"ray job submit -- tunesmith synthesize {DEMO}": "tests/end_to_end/test_ray_job.py:ray job submit",
    "tunesmith synthesize recipes/demo/evol_instruct.yaml": (
        "tests/end_to_end/test_methods.py:recipes/demo/evol_instruct.yaml"
    ),
    f"tunesmith train {DEMO} train.data=my.jsonl --run-dir runs/mine": "test_readme.py:own_file",
}
NEEDS_A_HUB = [command for command in COMMANDS if "<org/name>" in command]


def tunesmith(command: str) -> subprocess.CompletedProcess:
    argv = command.split()
    argv[0] = str(ROOT / ".venv" / "bin" / argv[0])
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_the_readme_names_commands():
    assert len(COMMANDS) >= 8 and len(NEEDS_A_HUB) == 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in RUN_ELSEWHERE and c not in NEEDS_A_HUB])
@pytest.mark.timeout(1200)
def test_command_works_on_the_finished_demo(demo, command):
    done = tunesmith(f"{command} {' '.join(demo.overrides)} --run-dir {demo.run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", NEEDS_A_HUB)
def test_command_of_a_real_model_has_a_plan(command):
    planned = command.replace("tunesmith run", "tunesmith plan").replace("<org/name>", "models/world-base")
    done = tunesmith(f"{planned} train.gpu_memory_gib=80")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chosen" in done.stdout


@pytest.mark.parametrize(("command", "place"), RUN_ELSEWHERE.items())
def test_the_other_commands_are_run_where_it_says(command, place):
    path, _, needle = place.partition(":")
    file = ROOT / path if (ROOT / path).is_file() else Path(__file__).parent / path
    assert command in COMMANDS + GUIDES
    assert needle in file.read_text()


def test_own_file(tmp_path):
    data = tmp_path / "my.jsonl"
    row = '{"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "hello"}]}\n'
    data.write_text(row * 16)
    done = tunesmith(
        f"tunesmith train {DEMO} train.data={data} train.num_epochs=1 train.num_processes=1 "
        f"--run-dir {tmp_path / 'mine'}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mine" / "result-train.json").is_file()


def test_the_folders_it_draws_exist():
    drawn = re.findall(r"^(\w+)/ {2,}", README, flags=re.MULTILINE)
    assert len(drawn) >= 8 and all((ROOT / folder).is_dir() for folder in drawn)
