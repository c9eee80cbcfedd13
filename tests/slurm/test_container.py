"""Engines and ranks inside an image, under a real Slurm. In the place of pyxis and apptainer stand programs that check
what they are given, note it, and run the step where it is, but without scontrol."""

import sys
from pathlib import Path

import pytest

from cluster.files import write_json
from launcher.slurm.container import ENVIRONMENT, make_settings
from launcher.slurm_config import ContainerConfig
from tests.fakes import generated_ids
from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT
from tests.slurm.test_ray_job import ENV, NUM_INSTRUCTIONS, Place
from tests.slurm.training import make_training

pytestmark = [pytest.mark.slurm, pytest.mark.long]

IMAGE = "org/image:1"
INSIDE = {"launcher.job.ray_node", "launcher.job.ray_ready", "launcher.cli"}  # modules that have to run in the image
# Without an image a step runs as it is: the batch script's questions to Slurm, and what is not ours.
PYXIS = """#!{python}
import os, sys
words = sys.argv[1:]
image = [word for word in words if word.startswith("--container-image=")]
mounts = [word for word in words if word.startswith("--container-mounts=")]
if image:
    assert image == ["--container-image={image}"], words
    for mount in mounts[0].partition("=")[2].split(","):
        assert os.path.isdir(mount.split(":")[0]), mount
    with open("{log}", "a") as log:
        log.write(words[words.index("-m") + 1] + "\\n")
    os.environ["PATH"] = "{inside}:" + os.environ["PATH"]
os.execv("{srun}", ["srun", *(word for word in words if word not in image + mounts)])
"""
APPTAINER = """#!{python}
import os, sys
words = sys.argv[1:]
assert words.pop(0) == "exec"
while words[0] == "--bind":
    assert os.path.isdir(words[1].split(":")[0]), words
    del words[:2]
assert words.pop(0) == "{image}", words
with open("{log}", "a") as log:
    log.write(words[words.index("-m") + 1] + "\\n")
os.environ["PATH"] = "{inside}:" + os.environ["PATH"]
os.execv(words[0], words)
"""


SHIMS = {"pyxis": ("srun", PYXIS), "apptainer": ("apptainer", APPTAINER)}


def lay_out_image(bed: SlurmBed, folder: Path, runtime: str) -> dict[str, str]:
    """What a job needs in its environment for its steps to run in the image; they are noted in inside.log."""
    (inside := folder / "inside").mkdir(parents=True)
    (inside / "scontrol").write_text("#!/bin/sh\nexit 127\n")
    (inside / "scontrol").chmod(0o755)
    program, text = SHIMS[runtime]
    (shim := folder / "bin" / program).parent.mkdir()
    srun = next(path for place in bed.env["PATH"].split(":") if (path := Path(place) / "srun").exists())
    log = folder / "inside.log"
    shim.write_text(text.format(python=sys.executable, image=IMAGE, log=log, srun=srun, inside=inside))
    shim.chmod(0o755)
    config = ContainerConfig(runtime=runtime, image=IMAGE, python=sys.executable)
    container = folder / "container.json"
    write_json(container, make_settings(config, (folder, PROJECT)))
    return {"PATH": f"{shim.parent}:{bed.env['PATH']}", ENVIRONMENT: str(container)}


@pytest.mark.parametrize("runtime", SHIMS)
def test_ray_and_its_driver_run_in_the_image_and_can_be_asked_to_stop(
    slurm_cluster: SlurmBed, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    place = Place(slurm_cluster, slurm_cluster.shared / f"image-{runtime}")
    image = lay_out_image(slurm_cluster, place.folder, runtime)
    monkeypatch.setattr("tests.slurm.test_ray_job.ENV", ENV | image)
    place.scripted(latency_ms=600)
    job = place.submit()
    place.wait_for_requests(job, 12)
    assert set((place.folder / "inside.log").read_text().split()) == INSIDE
    slurm_cluster.client("scancel", "--batch", "--signal=USR2", str(job))
    place.end(job, "FAILED", "75:0")
    assert place.result()["status"] == "preempted"
    logged, before = place.logged_ids(), len(generated_ids(place.model))
    place.end(place.submit(), "COMPLETED", "0:0")
    assert logged.isdisjoint(generated_ids(place.model)[before:])
    assert (place.result()["status"], place.result()["num_accepted"]) == ("done", NUM_INSTRUCTIONS)


@pytest.mark.parametrize("runtime", SHIMS)
def test_ranks_run_in_the_image_and_meet(slurm_cluster: SlurmBed, tiny_model: Path, runtime: str) -> None:
    run = make_training(slurm_cluster, tiny_model, f"ranks-{runtime}")
    env = run.env | lay_out_image(slurm_cluster, run.folder, runtime)
    command = [run.script, "recipe.yaml", "train.max_steps=2"]
    job = slurm_cluster.sbatch(*command, options=["--nodes=2"], cwd=run.folder, env=env)
    slurm_cluster.wait_state(job, {"COMPLETED"}, 120)
    assert "x 2 ranks" in slurm_cluster.output(job)
    assert set((run.folder / "inside.log").read_text().split()) == {"launcher.job.node"}
    assert run.result("train")["status"] == "done"
