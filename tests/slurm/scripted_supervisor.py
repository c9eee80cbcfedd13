"""launcher.job.supervisor with a training that takes no torch: its steps are checkpoints, its faults are on order.

    python -m tests.slurm.scripted_supervisor train|export|synthesize RECIPE [key=value ...]

`<run>/script.json`: {"steps": 6, "step_seconds": 0.3, "faults": {"1": ["kill", 3]}}: what happens to which attempt at
which step. "kill": the rank dies of SIGKILL, "bad-input": it ends with 2, "stop": it stands still (SIGSTOP),
"never": it ends at once, with 1 and without a step, "lie": the same with 0.
"""

import json
import os
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path

from cluster.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_RETRY, TunesmithError
from cluster.files import append_jsonl, write_json
from cluster.processes.descendants import die_with_parent
from cluster.run.fence import Superseded, own_token, verify
from cluster.run.manifest import write_manifest
from cluster.run.rundir import RunDir
from launcher.job import supervisor
from launcher.recipe import load
from launcher.slurm.container import python_module
from trainer.checkpoint.commit import commit_checkpoint, partial_folder, remove_unfinished
from trainer.checkpoint.state import TrainState, is_trained, newest_checkpoint, read_state
from trainer.config.train import CheckpointConfig
from trainer.export_job import export_key

SYNTHESIS = (150, 2)  # instructions, engines


def module(*arguments: object) -> list[str]:
    return [*supervisor.srun(), "--kill-on-bad-exit=1", *python_module("tests.slurm.scripted_supervisor", *arguments)]


def rank(run: RunDir) -> int:
    """One rank that trains: a checkpoint every step, the work of the ones before being its content."""
    stopped: list[int] = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    script = json.loads((run.root / "script.json").read_text())
    number = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
    fault, at_step = script.get("faults", {}).get(str(number), (None, 0))
    if fault in ("never", "lie"):
        return EXIT_FAILED if fault == "never" else EXIT_DONE
    while os.environ["SLURM_PROCID"] != "0" and not is_trained(run):  # the first alone does the work
        time.sleep(script["step_seconds"])
        if stopped:
            return EXIT_RETRY
    last = newest_checkpoint(run.checkpoints)
    step, text = (read_state(last).step, (last / "weights.txt").read_text()) if last else (0, "")
    while step < script["steps"]:
        time.sleep(script["step_seconds"])
        if stopped:
            return EXIT_RETRY
        step, text = step + 1, f"{text}{step} "
        if fault and step == at_step:
            match fault:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "bad-input":
                    return EXIT_BAD_INPUT
        verify(run.root)
        row = {"stage": "train", "step": step, "host": socket.gethostname(), "time": time.time()}
        append_jsonl(run.metrics, row | {"fencing_token": own_token()})
        save(run, step, text, step == script["steps"])
    return EXIT_DONE


def save(run: RunDir, step: int, text: str, finished: bool) -> None:
    remove_unfinished(run.checkpoints)
    partial = partial_folder(run.checkpoints, step)
    partial.mkdir(parents=True)
    (partial / "weights.txt").write_text(text)
    write_json(partial / "state.json", asdict(TrainState(step, step, step, step, 1, "job", finished)))
    commit_checkpoint(run.checkpoints, step, CheckpointConfig(keep_last=2))


def export(run: RunDir) -> int:
    verify(run.root)
    recipe = load(run.root.parent / "recipe.yaml", [])
    source = newest_checkpoint(run.checkpoints)
    run.export.mkdir()
    (run.export / "weights.txt").write_text((source / "weights.txt").read_text())
    write_manifest(run.export, ["weights.txt"], key=export_key(source, recipe.export, recipe.name))
    write_json(run.result("export"), {"status": "done"})
    return EXIT_DONE


def main(argv: list[str]) -> int:
    action, place = argv[0], argv[1]
    if action in ("rank", "export-rank"):
        die_with_parent()
        try:
            return rank(RunDir(Path(place))) if action == "rank" else export(RunDir(Path(place)))
        except Superseded as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_DONE  # as launcher.job.node does
        except TunesmithError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    run = Path(place).parent / "run"
    supervisor.STAGES["train"] = lambda steps, _: steps.run([*module("rank", run), *argv[2:]])
    synthesis = ["tests.generation.drive_synthesis", Path(place).parents[1] / "scripted-model", run, *SYNTHESIS]
    supervisor.STAGES["synthesize"] = lambda steps, _: steps.run(
        [*supervisor.srun(1), *python_module(*map(str, synthesis))]
    )
    supervisor.STAGES["export"] = lambda steps, _: steps.run([*module("export-rank", run)])
    return supervisor.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
