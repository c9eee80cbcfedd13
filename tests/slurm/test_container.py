"""Engines inside an image, under a real Slurm. In the place of pyxis and apptainer stand programs that check what they
are given, note it, and run the step where it is."""

import json
import sys
from pathlib import Path

import pytest

from launcher.slurm.container import ENVIRONMENT, Container
from tests.fakes import generated_ids
from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT
from tests.slurm.test_ray_job import NUM_INSTRUCTIONS, Place

pytestmark = [pytest.mark.slurm, pytest.mark.long]

IMAGE = "org/image:1"
INSIDE = {"launcher.slurm.ray_node", "cluster.ray_ready", "launcher.cli"}  # modules that have to run in the image
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
os.execv(words[0], words)
"""


SHIMS = {"pyxis": ("srun", PYXIS), "apptainer": ("apptainer", APPTAINER)}


@pytest.mark.parametrize("runtime", SHIMS)
def test_ray_and_its_driver_run_in_the_image_and_can_be_asked_to_stop(
    slurm_cluster: SlurmBed, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    program, text = SHIMS[runtime]
    place = Place(slurm_cluster, slurm_cluster.shared / f"image-{runtime}")
    log, shims = place.folder / "inside.log", place.folder / "bin"
    shims.mkdir()
    srun = next(path for folder in slurm_cluster.env["PATH"].split(":") if (path := Path(folder) / "srun").exists())
    (shims / program).write_text(text.format(python=sys.executable, image=IMAGE, log=log, srun=srun))
    (shims / program).chmod(0o755)
    mounts = tuple(f"{folder}:{folder}" for folder in (place.folder, PROJECT, "/tmp"))
    container = place.folder / "container.json"
    container.write_text(Container(runtime, IMAGE, mounts, sys.executable).dump())
    monkeypatch.setattr("tests.slurm.test_ray_job.ENV", {
        "TUNESMITH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", ENVIRONMENT: str(container),
        "PATH": f"{shims}:{slurm_cluster.env['PATH']}",
    })  # fmt: skip

    place.scripted(latency_ms=600)
    job = place.submit()
    place.wait_for_requests(job, 12)
    assert set(log.read_text().split()) == INSIDE
    slurm_cluster.client("scancel", "--batch", "--signal=USR2", str(job))
    place.end(job, "FAILED", "75:0")
    assert place.verdict()["status"] == "preempted"
    logged, before = place.logged_ids(), len(generated_ids(place.model))
    place.end(place.submit(), "COMPLETED", "0:0")
    assert logged.isdisjoint(generated_ids(place.model)[before:])
    verdict = json.loads((place.run / "verdict-synthesize.json").read_text())
    assert (verdict["status"], verdict["num_kept"]) == ("done", NUM_INSTRUCTIONS)
