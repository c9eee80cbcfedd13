"""The bed is what it claims to be: separate machines, a real Slurm, faults that strike, and nothing left behind."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.bed import SlurmBed
from tests.slurm.machine import PROJECT, Machine

pytestmark = pytest.mark.slurm

BED_IN_A_CHILD = """
import sys
from tests.slurm.bed import SlurmBed
with SlurmBed(num_nodes=2) as bed:
    machines = [bed.switch, bed.controller, *bed.nodes.values()]
    print(bed.folder, *[machine.network for machine in machines], flush=True)
    if sys.argv[1] == "raise":
        raise KeyError("as a failing test would")
    if sys.argv[1] == "wait":
        sys.stdin.read()
"""


def host_state() -> dict[str, list[str]]:
    """What a bed could leave behind on the host, apart from processes and its folder."""
    links = subprocess.run(["ip", "-oneline", "link"], check=True, capture_output=True, text=True).stdout.splitlines()
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return {"links": [line.split(":")[1] for line in links], "mounts": [line.split()[4] for line in mounts]}


def processes_of(folder: str, networks: set[str]) -> dict[int, str]:
    """Command lines of the processes in one of the network namespaces, or with the bed's folder among their words."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            network = os.readlink(process / "ns/net")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended, or is not of our making
        if network in networks or folder in command:
            found[int(process.name)] = command
    return found


def can_connect(machine: Machine, host: str, bed: SlurmBed) -> bool:
    """True if the slurmd of `host` takes a connection from `machine`."""
    connect = f"exec 3<>/dev/tcp/{host}/6818"
    try:
        machine.run("timeout", "2", "bash", "-c", connect, cwd=bed.shared, env=bed.env)
    except subprocess.CalledProcessError:
        return False
    return True


def test_nodes_are_separate_machines_that_share_one_folder(slurm_cluster: SlurmBed) -> None:
    script = slurm_cluster.write_script(
        "separate.sh",
        "srun touch /tmp/mine-$SLURM_JOB_ID /dev/shm/mine-$SLURM_JOB_ID\n"
        "srun bash -c 'echo $(hostname) $(hostname --all-ip-addresses) $(ls /tmp /dev/shm | grep -c mine-) $1' - $1",
    )
    job = slurm_cluster.sbatch(script, "argument", options=["--nodes=3", "--ntasks-per-node=1"])
    fields = slurm_cluster.wait_state(job, {"COMPLETED"}, 30)
    assert fields["NodeList"] == "n[1-3]"
    lines = sorted(slurm_cluster.output(job).splitlines())
    assert lines == [f"n{index} 10.77.0.1{index} 2 argument" for index in (1, 2, 3)]
    assert not list(Path("/tmp").glob(f"mine-{job}"))
    assert job not in slurm_cluster.squeue()


def test_waiting_for_a_job_that_fails_says_at_once_why(slurm_cluster: SlurmBed) -> None:
    job = slurm_cluster.sbatch(slurm_cluster.write_script("fails.sh", "echo the reason; exit 3"))
    with pytest.raises(AssertionError, match=r"is FAILED, not .*\n.*the reason"):
        slurm_cluster.wait_state(job, {"COMPLETED"}, 30)
    assert slurm_cluster.job(job)["ExitCode"] == "3:0"


def test_a_partition_cuts_the_network_and_nothing_else(slurm_cluster: SlurmBed) -> None:
    node = slurm_cluster.nodes["n2"]
    assert can_connect(slurm_cluster.controller, "n2", slurm_cluster)
    node.partition()
    try:
        assert not can_connect(slurm_cluster.controller, "n2", slurm_cluster)
        assert can_connect(slurm_cluster.controller, "n1", slurm_cluster)
        assert can_connect(node, "localhost", slurm_cluster), "slurmd must go on running"
    finally:
        node.heal()
    assert can_connect(slurm_cluster.controller, "n2", slurm_cluster)


def test_a_node_dies_with_all_it_runs_and_comes_back_empty(slurm_cluster: SlurmBed) -> None:
    node = slurm_cluster.nodes["n3"]
    try:
        assert node.fill_tmp() > 0
        script = slurm_cluster.write_script("full.sh", "echo begun; echo more >/tmp/more && exit; exec sleep 600")
        job = slurm_cluster.sbatch(script, options=["--nodelist=n3", "--no-requeue"])
        slurm_cluster.wait_output(job, "No space left on device", 30)
        node.kill()
        assert processes_of(f"{slurm_cluster.folder}/stage/n3", set()) == {}
        assert not can_connect(slurm_cluster.controller, "n3", slurm_cluster)
    finally:
        slurm_cluster.restart("n3")
    slurm_cluster.wait_state(job, {"NODE_FAIL", "FAILED"}, 60)
    script = slurm_cluster.write_script("empty.sh", "ls /tmp; echo some >/tmp/some")
    job = slurm_cluster.sbatch(script, options=["--nodelist=n3"])
    slurm_cluster.wait_state(job, {"COMPLETED"}, 30)
    assert "filler" not in slurm_cluster.output(job)


def test_orphans_on_a_node_are_reaped(slurm_cluster: SlurmBed) -> None:
    script = slurm_cluster.write_script("orphan.sh", "(true & echo $! >orphan.pid)\n")
    slurm_cluster.wait_state(slurm_cluster.sbatch(script, options=["--nodelist=n1"]), {"COMPLETED"}, 30)
    pid = (slurm_cluster.shared / "orphan.pid").read_text().strip()
    node = slurm_cluster.nodes["n1"]
    zombies = node.run("ps", "--no-headers", "-eo", "stat,pid", cwd=slurm_cluster.shared, env=slurm_cluster.env)
    assert pid not in zombies.split()
    assert "Z" not in zombies


@pytest.mark.parametrize("end", ["return", "raise"])
def test_a_bed_leaves_nothing_behind(slurm_cluster: SlurmBed, end: str) -> None:
    before = host_state()
    command = [sys.executable, "-c", BED_IN_A_CHILD, end]
    child = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert child.returncode == (end == "raise"), child.stderr
    folder, *networks = child.stdout.split()
    assert len(set(networks)) == 4
    assert processes_of(folder, set(networks)) == {}
    assert host_state() == before
    assert not Path(folder).exists()


def test_a_killed_bed_leaves_a_folder_that_the_next_one_removes(slurm_cluster: SlurmBed) -> None:
    before = host_state()
    command = [sys.executable, "-c", BED_IN_A_CHILD, "wait"]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        folder, *networks = child.stdout.readline().split()
        running = processes_of(folder, set(networks))
        assert {"munged", "slurmctld", "slurmd"} <= {Path(command.split()[0]).name for command in running.values()}
        descriptors = [os.pidfd_open(pid) for pid in running]
        child.send_signal(signal.SIGKILL)
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 30)[0], "a process outlived its bed"
        os.close(descriptor)
    assert host_state() == before
    assert Path(folder).exists()
    with SlurmBed(num_nodes=1):
        assert not Path(folder).exists()
    assert slurm_cluster.folder.exists(), "the sweep must spare a bed that lives"
