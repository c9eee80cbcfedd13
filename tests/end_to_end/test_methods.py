"""Every method's recipe on the project's own models with real vLLM; the recipes' sizes are cut, nothing else."""

import asyncio
import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from datasets import load_from_disk

from cluster.config import ModelConfig
from cluster.engines.pool import EnginePool
from cluster.run.rundir import RunDir
from generation.driver import Driver
from generation.inputs import load_inputs
from generation.method import MethodInputs
from generation.request_log import RequestLog
from generation.requester import Requester, ServedModel
from generation.sink import DataSink
from generation.state import Timers
from launcher.recipe import load
from tests.end_to_end.conftest import ROOT
from tests.generation.harness import read_rows
from toy_world.world import recognize

pytestmark = pytest.mark.timeout(900)
CHAT_MODEL = ROOT / "models" / "world-chat"
GROWING = {"alpaca": 12, "instruction_wild": 12, "magpie": 12}
GIVEN = {"answer_only": 16, "rejection_sampling": 16}


async def synthesize(method: str, pool: EnginePool, folder: Path) -> None:
    """The recipe of `method`, a little of it, on engines that are up already."""
    key = "num_instructions" if method in GROWING else "max_instructions"
    size = {**GROWING, **GIVEN}[method]
    recipe = load(ROOT / "recipes/demo" / f"{method}.yaml", [f"synthesize.{key}={size}"])
    config = recipe.synthesize
    inputs = load_inputs(config, recipe.model, recipe.engine, recipe.seed)
    run = RunDir(folder).create()
    with RequestLog(folder / "requests") as log:
        sink, _ = DataSink.open(run, config.rows_per_shard, inputs.sha)
        models = {
            role: ServedModel(role_model.name, role_model.source, role_model.revision, pool, role_model.form)
            for role, role_model in inputs.models.items()
        }
        assert {role_model.source.path for role_model in inputs.models.values()} == {str(CHAT_MODEL)}
        timers = Timers()
        requester = Requester(models, log, inputs.seed, config.budget, timers)
        method_inputs = MethodInputs(inputs.seeds, inputs.prompts, requester, timers, inputs.seed)
        await Driver(inputs.method(config, method_inputs), config, sink, None, timers).run(None)
        sink.seal()


@pytest.fixture(scope="module")
def made(ray_cluster, tmp_path_factory) -> Path:
    """The datasets of all methods but Evol-Instruct, made one after the other on one engine."""
    folder = tmp_path_factory.mktemp("methods")

    async def make_all() -> None:
        engine = load(ROOT / "recipes/demo/magpie.yaml", []).engine
        async with EnginePool.start(engine, ModelConfig(path=str(CHAT_MODEL))) as pool:
            for method in (*GROWING, *GIVEN):
                await synthesize(method, pool, folder / method)

    asyncio.run(make_all())
    return folder


@pytest.mark.parametrize("method", [*GROWING, *GIVEN])
def test_a_recipe_makes_rows_that_say_where_they_come_from(made, method):
    rows = [row for row in read_rows(made / method / "data" / "synthesized") if row["method"] != "seed"]
    assert len(rows) >= 4
    for row in rows:
        user, assistant = row["messages"]
        assert user["content"].strip() and assistant["content"].strip()
        assert (row["method"], row["model"]) == (method, "models/world-chat")
        assert row["prompt_sha"] and row["num_completion_tokens"] > 0 and row["finish_reason"] == "stop"


@pytest.mark.parametrize("method", GROWING)
def test_what_the_teacher_asks_are_mostly_tasks_of_its_world(made, method):
    instructions = read_rows(made / method / "data" / "instructions")
    turns = [(row["instruction"], row["input"]) for row in instructions]
    known = [turn for turn in turns if recognize(*turn) or recognize(*turn[0].partition("\n\n")[::2])]
    assert len(known) > len(turns) / 2


def test_evol_instruct_from_the_command_line(tmp_path):
    command = [str(ROOT / ".venv/bin/tunesmith"), "synthesize", "recipes/demo/evol_instruct.yaml"]
    command += ["synthesize.max_instructions=24", "synthesize.num_rounds=2"]
    command += ["--run-dir", str(tmp_path / "run")]
    with tempfile.TemporaryDirectory(prefix="ts") as scratch:  # tmp_path is too long for Ray's sockets
        environment = {**os.environ, "TMPDIR": scratch}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        left = [path.name for path in Path(scratch).iterdir()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert left == []
    rows = load_from_disk(str(tmp_path / "run" / "data" / "synthesized"))
    rejected = load_from_disk(str(tmp_path / "run" / "data" / "rejected"))
    assert set(rows["round"]) == {0, 1, 2} and set(rows["method"]) == {"evol_instruct"}
    by_id = {row["id"]: row for row in rows}
    evolved = [row for row in rows if row["round"] > 0 and row["parent_ids"]]
    assert evolved
    for row in evolved:
        assert by_id[row["parent_ids"][-1]]["messages"][0]["content"] != row["messages"][0]["content"]
    assert all(rejected["reason"])
    assert "not_judged" not in rejected["reason"]  # the judge's answers are whole, in one of the two forms
    result = json.loads((tmp_path / "run" / "result-synthesize.json").read_text())
    assert result["num_rows"] == rows.num_rows
