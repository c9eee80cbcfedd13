"""Descendants end with the process that started them."""

import subprocess
import sys
import time

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from cluster.processes.descendants import start_reaper
start_reaper()
child = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; subprocess.run(['sleep', '600'])"])
while {condition}:
    print(child.pid, flush=True)
    time.sleep(0.5)
"""
ORPHANED = """
import subprocess, sys, time
from cluster.processes.descendants import start_reaper
start_reaper()
shell = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; read line"], stdin=subprocess.PIPE)
time.sleep(5)  # two scans of the reaper
shell.communicate()
time.sleep(5)
"""
ADOPT = """
import os, subprocess, sys, time
from cluster.processes.descendants import adopt_orphans, end_descendants
adopt_orphans()
# A child that leaves a grandchild in a session of its own, deaf to polite signals, and ends.
leave = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
stay = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", leave, stay], stdout=subprocess.PIPE)
child.wait()
assert child.stdout.readline() == b"up\\n"
end_descendants(30)
assert child.stdout.read() == b""  # its end closes the pipe
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("nothing is left")
"""


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_descendants_end_with_it(how: str):
    condition = "True" if how == "killed" else "time.sleep(4)"
    script = PARENT.format(condition=condition)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    watched = psutil.Process(parent.pid)
    deadline = time.monotonic() + 60
    while len(family := watched.children(recursive=True)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)  # the reaper, the child and the child's child
    assert len(family) == 3
    if how == "killed":
        time.sleep(3)  # so that the reaper has scanned
        parent.kill()
    parent.wait(60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_a_descendant_whose_parent_ended_first_ends_as_well():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, text=True)
    orphan = psutil.Process(int(parent.stdout.readline()))
    parent.wait(60)
    _, alive = psutil.wait_procs([orphan], timeout=30)
    assert not alive


def test_orphans_are_adopted_and_ended() -> None:
    done = subprocess.run([sys.executable, "-c", ADOPT], capture_output=True, text=True, timeout=120)
    assert done.stdout == "nothing is left\n", done.stderr
