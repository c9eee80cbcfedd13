"""torchrun's exit code, and the signals that its ranks get."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.torchrun import exit_code_of, find_ranks, send_signal


@dataclass
class Failure:
    exitcode: int
    timestamp: int


def test_the_first_failure_decides_and_not_those_it_caused() -> None:
    assert exit_code_of([Failure(1, 20), Failure(75, 10)]) == 75
    assert exit_code_of([Failure(-signal.SIGTERM, 10), Failure(2, 10)]) == 2
    assert exit_code_of([Failure(-signal.SIGKILL, 10), Failure(-signal.SIGTERM, 11)]) == 128 + signal.SIGKILL
    assert exit_code_of([Failure(-signal.SIGSEGV, 10)]) == 128 + signal.SIGSEGV


def test_a_rank_that_reports_bad_input_gets_no_report_of_a_crash_beside_it(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text("import sys; print('the reason', file=sys.stderr); sys.exit(int(sys.argv[1]))")
    outputs = []
    for code in (2, 1):
        command = [sys.executable, "-m", "launcher.torchrun", "--standalone", "--nproc-per-node=1", rank, str(code)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == code
        outputs.append(ended.stdout + ended.stderr)
    assert outputs[0] == "the reason\n"
    assert "Root Cause" in outputs[1]


def test_a_process_without_a_handler_is_not_sent_the_signal_that_would_kill_it_or_be_lost() -> None:
    program = "import signal, time\nsignals = []\n{}\nprint('ready', flush=True)\nwhile not signals: time.sleep(0.01)"
    answers = []
    for setup in ("", "signal.signal(signal.SIGUSR2, lambda *_: signals.append(True))"):
        command = [sys.executable, "-c", program.format(setup)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            answers.append(send_signal([psutil.Process(process.pid)], signal.SIGUSR2))
            if not answers[-1]:
                process.kill()
            answers.append(process.wait(60))
    assert answers == [False, -signal.SIGKILL, True, 0]


def test_a_process_whose_environment_cannot_be_read_is_no_rank(monkeypatch) -> None:
    """For an ordinary user the kernel denies it while a process starts a program."""

    class Process:
        def __init__(self, answer: dict[str, str] | Exception):
            self.answer = answer

        def environ(self) -> dict[str, str]:
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    rank = Process({"LOCAL_RANK": "0"})
    others = [Process(psutil.AccessDenied(2)), Process(psutil.NoSuchProcess(3)), Process({})]
    monkeypatch.setattr(psutil.Process, "children", lambda self: [*others, rank])
    assert find_ranks(os.getpid()) == [rank]
