"""Set-up refuses with one sentence what it cannot do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bootstrap(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", str(ROOT / "launcher" / "bootstrap.py"), *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_missing_compiler_is_one_clear_sentence(tmp_path):
    done = bootstrap("cpu", PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: g++ is missing") and "apt install g++" in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_python_is_one_clear_sentence(tmp_path):
    source = (ROOT / "launcher" / "bootstrap.py").read_text()
    script = source.replace("WANTED_PYTHON = (3, 11)", "WANTED_PYTHON = (3, 10)")
    other = tmp_path / "launcher" / "bootstrap.py"
    other.parent.mkdir()
    other.write_text(script)
    done = subprocess.run([sys.executable, str(other)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Python 3.11 is needed" in done.stderr and done.stderr.count("\n") == 1


def test_unknown_extra_is_refused_before_anything_is_touched():
    done = bootstrap("cpuu")
    assert done.returncode == 2 and "The extras are cpu, gpu, bench, dev." in done.stderr
