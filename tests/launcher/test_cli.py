"""The command line answers at once, loads only what it needs, and ends with the exit code of what happened."""

import errno
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import InputError
from cluster.files import exclusive_lock
from launcher import cli
from launcher.plan import print_plan
from launcher.recipe import load

RECIPE = "name: test\nmodel: {path: some/model}\ntrain: {data: chats.jsonl}\n"
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "datasets", "peft", "pyarrow", "numpy")


def tunesmith(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", "-m", "launcher.cli", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
    )  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "chats.jsonl").write_text('{"instruction": "Say fig", "output": "fig"}\n')
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["inspect", "tokens", "--help"],
        ["plan", "recipe.yaml", "train.data=[]"],
        ["run", "absent.yaml"],
        ["plan", "recipe.yaml", "train.data=[]", "--on", "slurm"],
        ["status", "."],
        ["list", "."],
    ],
)
def test_answering_loads_no_heavy_library(recipe: Path, arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["tunesmith", *{arguments}]
from launcher.cli import main
try:
    main()
except SystemExit:
    pass
loaded = sorted(set({HEAVY}) & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=recipe.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "synthesize",
        "train",
        "export",
        "evaluate",
        "plan",
        "inspect",
        "status",
        "logs",
        "wait",
        "cancel",
        "resume",
        "list",
    ],
)
def test_help_lists_every_command(tmp_path: Path, command: str) -> None:
    done = tunesmith("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f" {command} " in done.stdout


def test_plan_shows_the_stages_and_their_arithmetic_and_writes_nothing(recipe: Path) -> None:
    arguments = ("train.num_processes=2", "train.global_batch_size=32", "train.micro_batch_size=4", "train.max_steps=9")
    arguments += ("train.batch_unit=rows",)
    done = tunesmith("plan", recipe, *arguments, "--run-dir", "somewhere", cwd=recipe.parent)
    assert done.returncode == 0
    for text in (
        "4 per micro batch x 4 accumulated x 2 ranks",
        "9 steps",
        "somewhere/checkpoints",
        "merged model",
        "Nothing was started",
    ):
        assert text in " ".join(done.stdout.split()), text
    assert "synthesize" not in done.stdout
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["chats.jsonl", "recipe.yaml"]


def test_plan_refuses_a_model_that_is_neither_a_folder_nor_on_the_hub(recipe: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (recipe.parent / "models").mkdir()
    done = tunesmith("plan", recipe, "model.path=models/nope", cwd=recipe.parent)
    assert done.returncode == 2
    assert "error: model.path: there is no folder models/nope, and the hub does not answer (" in done.stderr


@pytest.mark.parametrize("where", [(), ("--on", "slurm")])
def test_plan_ends_with_the_command_that_runs_what_it_shows(recipe: Path, where: tuple[str, ...]) -> None:
    done = tunesmith("plan", recipe.name, "name=a", "--run-dir", "my runs/a", *where, cwd=recipe.parent)
    command = shlex.join(["tunesmith", "run", "recipe.yaml", "name=a", "--run-dir", "my runs/a", *where])
    assert command in done.stdout.splitlines()[-2:][0 if where else 1], done.stdout


def test_plan_shows_that_a_step_is_counted_in_examples(recipe: Path) -> None:
    done = tunesmith("plan", recipe, "train.global_batch_size=127", cwd=recipe.parent)
    assert "127 examples a step, packed into as few rows" in " ".join(done.stdout.split())


LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def test_plan_shows_the_memory_of_every_stage_from_the_config_alone(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 B parameters over 8 ranks: ZeRO-1 keeps 56 GiB a rank, ZeRO-3 17 GiB. Nothing but config.json is there."""
    folder = recipe.parent / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    arguments = ["model.path=./model", "train.num_processes=8", "train.gpu_memory_gib=60"]
    done = tunesmith("plan", recipe, *arguments, cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    rows = [line.replace("│", "").split() for line in done.stdout.splitlines() if "GiB" in line and "│" in line]
    results = {row[0]: " ".join(row[-2:]) for row in rows if row[0] in "123"}
    assert results["1"] == "too much"
    assert results["2"].endswith("chosen")
    assert results["3"].endswith("fits")
    monkeypatch.chdir(recipe.parent)
    with pytest.raises(InputError, match=r"train\.zero_stage=1 cannot hold this model.*Set train\.zero_stage=auto"):
        print_plan(load(recipe, [*arguments, "train.zero_stage=1"]), recipe, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "recipe.yaml", "--train.max_steps=2"], "Write train.max_steps=2."),
        (["plan", "absent.yaml"], "error: absent.yaml: there is no such recipe. See recipes/ for examples."),
        (
            ["train", "recipe.yaml", "train.pakcing=false"],
            "error: command line: train.pakcing: unknown key; did you mean",
        ),
        (["train", "recipe.yaml", "train.num_epochs=0"], "error: command line: train.num_epochs: Input should be"),
        (
            ["run", "recipe.yaml", "train.data=notes.txt", "--on", "slurm"],
            "error: train.data: notes.txt does not exist",
        ),
        (["plan", "recipe.yaml", "train.data=notes.txt"], "error: train.data: notes.txt does not exist"),
        (["plan", "recipe.yaml", "train.data=notes.txt", "--on", "slurm"], "notes.txt does not exist"),
        (["train", "recipe.yaml", "train.data=recipe.yaml"], "recipe.yaml: the type of the file is unknown"),
        (["export", "recipe.yaml"], "no complete checkpoint. Run `tunesmith train` first."),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_one_line(recipe: Path, arguments: list[str], expected: str) -> None:
    done = tunesmith(*arguments, cwd=recipe.parent)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.ENOSPC, "the disk is full"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_one_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, expected: str
) -> None:
    def mkdir(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(sys, "argv", ["tunesmith", "train", str(recipe), "run_dir=/there/run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: /there/run: {expected}")


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    lock = exclusive_lock(tmp_path / ".lock", "test")
    with pytest.raises(InputError, match=r"\.lock: this file system has no locks \(No locks available\)"), lock:
        pass


def test_a_run_folder_in_use_is_refused(recipe: Path) -> None:
    run = recipe.parent / "run"
    run.mkdir()
    with exclusive_lock(run / ".lock", "test"):
        done = tunesmith("train", recipe, "--run-dir", run, cwd=recipe.parent)
    assert done.returncode == 2
    assert f"run folder {run} is in use by another process (pid {os.getpid()}" in done.stderr
    assert not (run / "recipe.yaml").exists()
