"""A recipe as sbatch commands: exactly these words, none of them a secret, and the same for a shell as for sbatch."""

import os
import subprocess
from pathlib import Path

import pytest

from cluster.errors import InputError
from cluster.files import write_json
from launcher.engine_room import check_engines, engines_of_evaluation, pools_of_synthesis
from launcher.recipe import load
from launcher.slurm.container import job_container, make_settings
from launcher.slurm.plan import usable_on_a_node
from launcher.slurm.sbatch import plan_jobs, resources, stop_margin_seconds
from launcher.slurm.snapshot import PROJECT, code_files, take_snapshot
from launcher.slurm.submit import check_batch
from launcher.slurm_config import ContainerConfig, SlurmConfig, refuse_option, seconds_of
from tests.launcher.slurm_chain import ENVIRON, recipe_of, submission_of
from trainer.config.train import TrainConfig

SLURM = {
    "nodes": 2, "time": "6:00:00", "partition": "gpu", "options": "--constraint=h100", "environment": ["MY_TOKEN"],
    "train": {"nodes": 4, "gpus_per_node": 8, "cpus_per_task": 32, "memory": "900G", "exclusive": True},
    "export": {"time": 30, "options": ["--nice=10"]},
}  # fmt: skip


def test_the_commands_word_by_word(tmp_path: Path) -> None:
    chain = submission_of(recipe_of(tmp_path, SLURM))
    jobs, tag = plan_jobs(chain), chain.tag
    run, exported = tmp_path / "run", "HOME,MY_TOKEN,NCCL_DEBUG,PATH,TUNESMITH_PYTHON=/opt/python"
    assert [job.stage for job in jobs] == ["train", "export", "evaluate"]
    assert jobs[0].argv({}) == [
        "sbatch", "--parsable", "--hold", f"--job-name=tiny-train-{tag}", "--chdir=/work",
        f"--output={run}/logs/train-%j.log", "--open-mode=append", "--requeue", "--signal=B:USR2@300",
        f"--export={exported}", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=32",
        "--mem=900G", "--time=6:00:00", "--partition=gpu", "--exclusive", "--constraint=h100",
        "/code/1/slurm/train.sbatch", f"{run}/recipe.yaml",
    ]  # fmt: skip
    assert jobs[1].argv({"train": "7"}) == [
        "sbatch", "--parsable", "--dependency=afterok:7", "--kill-on-invalid-dep=yes", f"--job-name=tiny-export-{tag}",
        "--chdir=/work", f"--output={run}/logs/export-%j.log", "--open-mode=append", "--requeue",
        "--signal=B:USR2@90", f"--export={exported}", "--nodes=1", "--ntasks-per-node=1", "--time=30",
        "--partition=gpu", "--constraint=h100", "--nice=10", "/code/1/slurm/export.sbatch", f"{run}/recipe.yaml",
    ]  # fmt: skip


def test_what_is_shown_for_a_shell_is_what_is_submitted(tmp_path: Path) -> None:
    """A shell runs the lines of the plan with a stand-in for sbatch that writes down its words."""
    folder = tmp_path / "a folder; with $signs"
    folder.mkdir()
    jobs = plan_jobs(submission_of(recipe_of(folder, SLURM)))
    written = tmp_path / "words"
    # Each call is in a subshell of its own, so the number of the job is counted in the file.
    stand_in = f"""
sbatch() {{ printf '%s\\0' sbatch "$@" >> {written}; printf '\\n' >> {written}; wc -l < {written}; }}
"""
    script = stand_in + "\n".join(job.shell_line() for job in jobs)
    subprocess.run(["bash", "-euc", script], check=True, timeout=60)
    words = [line.rstrip("\0").split("\0") for line in written.read_text().splitlines()]
    ids = {job.stage: str(number) for number, job in enumerate(jobs, 1)}
    assert words == [job.argv(ids) for job in jobs]


def test_finished_stages_have_no_job_and_the_next_one_is_the_root(tmp_path: Path) -> None:
    jobs = plan_jobs(submission_of(recipe_of(tmp_path), skip=("synthesize", "train")))
    assert [(job.stage, job.parents) for job in jobs] == [("export", ()), ("evaluate", ("export",))]
    assert "--hold" in jobs[0].argv({})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--export=ALL", "sets --export itself"), ("--dep=afterok:1", "sets --dependency itself"),
        ("--wrap=true", "sets --wrap"), ("--array=1-9", "sets --array"), ("--job-n=x", "sets --job-name"),
        ("--requeue", "sets --requeue"), ("--hold", "sets --hold"), ("--parsable", "sets --parsable"),
        ("--signal=USR1", "sets --signal"), ("--output=x", "sets --output"), ("--mem=3G", "set slurm.memory"),
        ("--constraint=a\nb", "on one line"), ("--comment=\0", "on one line"), ("-J x", "not of the form"),
        ("--nice 5", "not of the form"), ("x.sh", "not of the form"),
    ],
)  # fmt: skip
def test_options_that_are_the_launchers_are_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_option(option)


@pytest.mark.parametrize("option", ["--constraint=h100&nvlink", "--nice=10", "--reservation=mine", "--mail-type=END"])
def test_other_options_are_passed_on(option: str) -> None:
    refuse_option(option)


def test_the_options_of_a_recipe_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"slurm.train.options: --wrap: the launcher sets --wrap itself"):
        recipe_of(tmp_path, {"train": {"options": ["--wrap=true"]}})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-12:30", 131400), ("1-0:0:5", 86405),
        ("x", None),
    ],
)  # fmt: skip
def test_times_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


def test_a_time_that_yaml_took_for_a_number_is_refused_and_minutes_are_not() -> None:
    assert SlurmConfig(time=90).of("train").time == "90"
    with pytest.raises(ValueError, match="Put the time in quotes"):
        SlurmConfig(time=2 * 3600)  # 2:00:00 without quotes


def test_a_stage_has_its_own_values_else_those_of_all(tmp_path: Path) -> None:
    slurm = recipe_of(tmp_path, SLURM).slurm
    assert (slurm.of("train").nodes, slurm.of("synthesize").nodes, slurm.of("export").nodes) == (4, 2, 1)
    assert (slurm.of("train").ranks, slurm.of("synthesize").ranks) == (32, 2)


def test_the_lead_follows_what_an_earlier_attempt_took(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run = recipe.run.create()
    assert stop_margin_seconds(run, "train") == 300  # as in the script, where nothing is known
    run.metrics.write_text("".join(f'{{"stage": "train", "step": {n}, "seconds": {n}}}\n' for n in (8, 12, 4)))
    folder = run.checkpoints / "step_000003"
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {})
    (folder / "weights").write_text("")
    os.utime(folder / "weights", (1000, 1000))
    os.utime(folder / "manifest.json", (1100, 1100))
    assert stop_margin_seconds(run, "train") == 2 * 100 + 12 + 60
    assert stop_margin_seconds(run, "export") == 90


def test_a_limit_below_the_lead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"slurm.time=5 of train is 300 s.* stop 300 s before its end"):
        plan_jobs(submission_of(recipe_of(tmp_path, {"time": 5})))


def test_ranks_that_cannot_share_a_batch_are_refused(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        {"nodes": 3, "gpus_per_node": 8},
        train={"precision": "fp32", "micro_batch_size": 1, "batch_unit": "rows"},
    )
    with pytest.raises(
        InputError, match=r"24 \(nodes=3 x gpus_per_node=8\); train.global_batch_size=128 is not a multiple"
    ):
        check_batch(recipe)


@pytest.mark.parametrize(
    ("option", "num_gpus"),
    [
        ("--gres=gpu:2", 2), ("--gres=gpu", 1), ("--gres=gpu:a100", 1), ("--gres=nic:1,gpu:a100:4", 4),
        ("--gres=gpu:3g.20gb:2,gpu:1g.5gb:1", 3), ("--gpus-per-task=h100:2", 2), ("--gpus-per-task=8", 8),
        ("--tres-per-task=cpu=4,gres/gpu=2", 2), ("--gres=gpu:2(S:0)", 2), ("--constraint=gpu:2", 0),
        ("--gres=none", 0),
    ],
)  # fmt: skip
def test_gpus_that_options_name_are_counted(option: str, num_gpus: int) -> None:
    job = SlurmConfig(train={"nodes": 2, "options": [option]}).of("train")
    assert (job.num_gpus, job.ranks) == (num_gpus, 2 * max(1, num_gpus))


def test_numbers_are_names_and_sizes_too_and_no_memory_means_all() -> None:
    job = SlurmConfig(account=12345, partition=7, memory=4000).of("train")
    assert {"--account=12345", "--partition=7", "--mem=4000"} < set(resources(job))
    train = TrainConfig(precision="fp32")
    assert usable_on_a_node(train, SlurmConfig(memory=4000).of("train")) > 2**31
    assert usable_on_a_node(train, SlurmConfig(memory="0").of("train")) is None


@pytest.mark.parametrize(
    ("engine", "slurm", "message"),
    [
        ({"num_replicas": 4}, {"nodes": 2}, "synthesize: the 4 engines need 4 CPUs, .* asks for 2 nodes with 1 CPUs"),
        ({"num_replicas": 9}, {"gpus_per_node": 8}, "the 9 engines need 9 GPUs and 9 CPUs, .* with 8 GPUs each"),
        ({"num_replicas": 2, "cpus_per_engine": 3}, {"synthesize": {"cpus_per_task": 5}}, "need 6 CPUs"),
        ({"num_replicas": 2, "cpus_per_engine": 3}, {"nodes": 3, "synthesize": {"cpus_per_task": 2}}, "need 6 CPUs"),
        ({"tensor_parallel_size": 4}, {"gpus_per_node": 4, "evaluate": {"gpus_per_node": 2}}, "slurm.evaluate:"),
    ],
)  # fmt: skip
def test_engines_that_a_job_has_no_room_for_are_refused(
    tmp_path: Path, engine: dict, slurm: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_engines(recipe_of(tmp_path, slurm, engine=engine))


@pytest.mark.parametrize("path", sorted(PROJECT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_the_engines_of_every_recipe_fit_into_its_jobs(path: Path) -> None:
    recipe = load(path, ["slurm.gpus_per_node=8"])
    check_engines(recipe)
    assert engines_of_evaluation(recipe) >= 1


def test_evaluation_takes_as_many_engines_as_its_job_has_room_for(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"nodes": 2}, engine={"num_replicas": 2})
    check_engines(recipe)
    assert engines_of_evaluation(recipe) == 1
    teacher = {"path": "teacher", "engine": {"num_replicas": 8}}
    config = {"method": "answer_only", "models": {"answerer": teacher}, "seeds": "x"}
    recipe = recipe_of(tmp_path, {"gpus_per_node": 8, "exclusive": True}, synthesize=config)
    check_engines(recipe)
    assert [each.num_replicas for each in pools_of_synthesis(recipe)] == [8]
    config = {"models": {"writer": teacher, "answerer": {"path": "another"}}, "method": "instruction_wild"}
    with pytest.raises(InputError, match="the 9 engines need 9 GPUs"):
        check_engines(recipe_of(tmp_path, {"gpus_per_node": 8, "exclusive": True}, synthesize=config))


def test_a_variable_that_is_not_set_is_refused_and_values_are_not_shown(tmp_path: Path) -> None:
    chain = submission_of(recipe_of(tmp_path, {"environment": ["MY_TOKEN"]}))
    assert ENVIRON["MY_TOKEN"] not in str([job.argv({"train": "1", "export": "2"}) for job in plan_jobs(chain)])
    with pytest.raises(InputError, match=r"slurm.environment: the variable MY_TOKEN is not set here"):
        plan_jobs(submission_of(chain.recipe, environ={"PATH": "/bin"}))


def test_the_token_for_the_hub_goes_along_by_name(tmp_path: Path) -> None:
    named = recipe_of(tmp_path, export={"to": "hub:me/model", "hub_token": {"env": "MY_TOKEN"}})
    assert ",MY_TOKEN," in plan_jobs(submission_of(named))[1].argv({"train": "1"})[10]
    usual = recipe_of(tmp_path, export={"to": "hub:me/model"})
    jobs = plan_jobs(submission_of(usual, environ={"HF_TOKEN": "hf_x", "PATH": "/bin"}))
    assert "--export=HF_TOKEN,PATH," in " ".join(jobs[0].argv({}))


@pytest.mark.parametrize("name", ["runs/12:30", "12:30/run"])
def test_a_colon_that_python_would_split_the_path_of_the_code_at_is_refused(tmp_path: Path, name: str) -> None:
    recipe = recipe_of(tmp_path).model_copy(update={"run_dir": tmp_path / name})
    with pytest.raises(InputError, match="split a path at a colon"):
        plan_jobs(submission_of(recipe))


@pytest.mark.parametrize("name", ["a,b", "a%j", "it's", "a\nb", "x.sbatch"])
def test_a_run_folder_that_slurm_would_take_apart_is_refused(tmp_path: Path, name: str) -> None:
    recipe = recipe_of(tmp_path).model_copy(update={"run_dir": tmp_path / name})
    with pytest.raises(InputError, match="for Slurm a path has to be absolute and without commas"):
        plan_jobs(submission_of(recipe))


def test_containers_are_options_of_srun_or_a_command_of_the_step(tmp_path: Path) -> None:
    slurm = {"container": {"image": "org/image:1", "mounts": ["/data:/data:ro"], "python": "/venv/bin/python"}}
    recipe = recipe_of(tmp_path, slurm)
    [option] = [each for each in plan_jobs(submission_of(recipe))[0].options if each.startswith("--export=")]
    assert option.endswith(f",TUNESMITH_CONTAINER={tmp_path}/run/container.json")
    pyxis = make_settings(recipe.slurm.container, (Path("/run"), Path("/work"), Path("/run")))
    mounts = ["/run:/run", "/work:/work", "/tmp:/tmp", "/data:/data:ro"]
    options = ["--container-image=org/image:1", f"--container-mounts={','.join(mounts)}"]
    assert pyxis == {"srun_options": options, "command": ["/venv/bin/python"]}
    apptainer = make_settings(ContainerConfig(runtime="apptainer", image="/images/a.sif"), (Path("/run"),))
    command = ["apptainer", "exec", "--bind", "/run:/run", "--bind", "/tmp:/tmp", "/images/a.sif", "python3"]
    assert apptainer == {"srun_options": [], "command": command}
    write_json(tmp_path / "container.json", pyxis)
    assert job_container({"TUNESMITH_CONTAINER": str(tmp_path / "container.json")}) == pyxis
    assert job_container({}) is None


def test_steps_get_the_whole_environment_and_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.job import supervisor
    from launcher.slurm import container

    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    step = ["srun", "--export=ALL", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=4"]
    assert supervisor.srun() == step
    write_json(tmp_path / "container.json", make_settings(ContainerConfig(image="image"), ()))
    monkeypatch.setenv("TUNESMITH_CONTAINER", str(tmp_path / "container.json"))
    assert supervisor.srun(1)[2:4] == ["--nodes=1", "--ntasks=1"]
    assert supervisor.srun()[6:] == ["--container-image=image", "--container-mounts=/tmp:/tmp"]
    assert container.python_module("launcher.cli")[0] == "python3"


def test_the_snapshot_is_the_code_and_is_made_once(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in (
        "cluster/a.py",
        "generation/seeds/b.jsonl",
        "launcher/c.py",
        "trainer/__pycache__/d.pyc",
        "slurm/e.sbatch",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    (project / "pyproject.toml").write_text("[project]\n")
    (project / "notes.txt").write_text("mine")
    (project / "slurm/e.sbatch").chmod(0o755)
    first = take_snapshot(tmp_path / "code", project)
    assert sorted(map(str, code_files(first))) == [
        "cluster/a.py", "generation/seeds/b.jsonl", "launcher/c.py", "pyproject.toml", "slurm/e.sbatch",
    ]  # fmt: skip
    assert (first / "slurm/e.sbatch").stat().st_mode & 0o100
    assert take_snapshot(tmp_path / "code", project) == first
    (project / "cluster/a.py").write_text("changed")
    second = take_snapshot(tmp_path / "code", project)
    assert second != first and (first / "cluster/a.py").read_text() == "cluster/a.py"
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == sorted([first.name, second.name])


def test_slurm_settings_never_clash_with_results(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"nodes": 2})
    run = recipe.run.create()
    recipe.save(run)
    (run.checkpoints / "step_000001").mkdir(parents=True)
    recipe_of(tmp_path, {"nodes": 8, "train": {"time": 600}}).save(run)
