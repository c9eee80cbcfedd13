"""No descendant outlives the one that started it."""

import subprocess
import sys

ADOPT = """
import os, subprocess, sys, time
from cluster.processes.orphans import adopt_orphans, end_descendants
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


def test_orphans_are_adopted_and_ended() -> None:
    done = subprocess.run([sys.executable, "-c", ADOPT], capture_output=True, text=True, timeout=120)
    assert done.stdout == "nothing is left\n", done.stderr
