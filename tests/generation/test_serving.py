"""Several models in one run, on a real Ray with scripted engines: each role has its own pool or shares one."""

import asyncio
import json
from pathlib import Path

import pytest
import ray
from datasets import load_from_disk

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.run.rundir import RunDir
from generation.config.methods import AnswerOnlyConfig, EvolInstructConfig, RejectionSamplingConfig
from generation.methods import METHODS
from generation.serving import resolve_models, serving
from generation.synthesize import run
from tests.fakes import generated_ids, scripted, write_script

GIVEN = [{"instruction": f"Name river {number}.", "input": "", "output": ""} for number in range(6)]


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
    """Three models, each of which can do only one task."""
    jobs = {
        "writer": {"#Given Prompt#": "Name a long river."},
        "answerer": {"river": "The Elbe."},
        "judge": {"Equal / Not equal": "Not equal", "The score alone": "4"},
    }
    for role, answers in jobs.items():
        write_script(tmp_path / role, answers=answers)
    return {role: tmp_path / role for role in jobs}


@pytest.fixture
def seeds(tmp_path) -> str:
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GIVEN))
    return str(tmp_path / "given.jsonl")


def make_adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    return folder


@pytest.mark.usefixtures("ray_cluster")
def test_each_role_has_its_own_model(models, seeds, tmp_path):
    roles = {role: {"path": str(path)} for role, path in models.items()}
    roles["judge"]["engine"] = scripted(num_replicas=2)
    config = EvolInstructConfig(seeds=seeds, models=roles, num_rounds=1, operations=("deepen",))
    result = run(config, ModelConfig(path=str(models["writer"])), scripted(), RunDir(tmp_path / "run"), 0)
    rows = load_from_disk(str(tmp_path / "run" / "data" / "synthesized"))
    assert [row["messages"][1]["content"] for row in rows] == ["The Elbe."] * 12
    assert set(rows["model"]) == {str(models["answerer"])}
    assert [len(generated_ids(models[role])) for role in ("writer", "judge", "answerer")] == [
        6,
        6,
        7,
    ]  # one text is scored again
    assert result["is_complete"] and result["rejected"] == {}


@pytest.mark.usefixtures("ray_cluster")
def test_roles_with_the_same_model_and_engine_share_a_pool(models, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    same = {"path": str(models["writer"])}
    config = EvolInstructConfig(models={"writer": same, "answerer": {**same, "adapter": str(adapter)}, "judge": same})
    role_models = resolve_models(config, METHODS["evol_instruct"], ModelConfig(path=str(models["judge"])), scripted())

    async def served() -> dict:
        async with serving(role_models) as roles:
            return dict(roles)

    roles = asyncio.run(served())
    assert roles["writer"].pool is roles["answerer"].pool is roles["judge"].pool
    assert [roles[role].adapter for role in roles] == [None, str(adapter), None]
    assert roles["writer"].revision == roles["judge"].revision != roles["answerer"].revision


@pytest.mark.usefixtures("ray_cluster")
def test_pools_that_do_not_fit_at_once_are_an_error(models, seeds, tmp_path):
    """Each fits alone. Without the check the second would wait ten minutes for the resources of the first."""
    engine = scripted(cpus_per_engine=0.6 * ray.cluster_resources()["CPU"])
    roles = {"writer": {"path": str(models["answerer"])}, "judge": {"path": str(models["judge"])}}
    config = RejectionSamplingConfig(seeds=seeds, models=roles)
    with pytest.raises(InputError, match=r"the 2 models of this run are served at once: their engines need"):
        run(config, ModelConfig(path=str(models["writer"])), engine, RunDir(tmp_path / "run"), 0)
    assert not (models["answerer"] / "first").exists()  # no engine was started


@pytest.mark.parametrize(
    ("role", "fields", "message"),
    [
        ("writer", {"adapter": "nowhere"}, r"synthesize\.models\.writer\.adapter: .*nowhere has no adapter_config"),
        ("answerer", {"adapter": "nowhere"}, r"synthesize\.models\.answerer\.adapter"),
        ("writer", {"path": "./nowhere"}, r"there is no folder .*nowhere"),
    ],
)
def test_a_missing_model_or_adapter_is_named_before_an_engine_starts(models, role, fields, message):
    config = AnswerOnlyConfig(models={role: fields})
    with pytest.raises(InputError, match=message):
        resolve_models(config, METHODS["answer_only"], ModelConfig(path=str(models["writer"])), scripted())
