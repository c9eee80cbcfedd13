"""A trace of some steps by torch's profiler, for chrome://tracing or Perfetto."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.config.train import ProfileConfig


class Profiler:
    """Records the steps that `config` names and writes `<folder>/steps-FIRST-LAST.json` after the last of them.

    None as `config` means that nothing is recorded.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path):
        self.folder = folder
        self.steps = range(config.start_step, config.start_step + config.num_steps) if config else range(0)
        self._running: profile | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before_step(self, step: int) -> None:
        """Start or stop recording. `step` counts from 1, as in the log."""
        if step not in self.steps:
            self._stop()
        elif self._running is None:
            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._running.start()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._running.export_chrome_trace(str(self.folder / f"steps-{self.steps[0]}-{self.steps[-1]}.json"))
            self._running = None
