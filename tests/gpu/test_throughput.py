"""The script for a GPU machine runs here too, on tiny models, and without what such a machine may lack."""

import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from trainer.config.train import TrainConfig

ROOT = Path(__file__).parents[2]
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(('deepspeed', 'datasets', 'ray', 'vllm')))"


def test_it_trains_without_deepspeed_and_writes_what_it_measured(tmp_path: Path) -> None:
    words = "['--jobs', 'tiny-lora', 'tiny-full', '--max-seq-len', '1024', '--steps', '2', '--rows', '2']"
    script = f"{WITHOUT}; from tests.gpu import throughput; throughput.main({words})"
    environ = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lora, full = json.loads((tmp_path / "throughput.json").read_text())
    assert (lora["job"], full["job"]) == ("tiny-lora", "tiny-full")
    for found in (lora, full):
        assert found["first_loss"] == pytest.approx(math.log(512), abs=0.1), "a random model knows nothing"
        assert found["tokens_per_second"] >= found["slowest"] > 0
    assert f'"tokens_per_second": {full["tokens_per_second"]}' in done.stdout


@pytest.mark.parametrize("name", ["tiny-lora", "tiny-full"])
def test_a_step_lowers_the_loss_of_its_rows(name: str) -> None:
    import torch

    from tests.gpu import throughput

    torch.manual_seed(0)
    job = throughput.JOBS[name]
    config = TrainConfig(
        **{"zero_stage": 1, "max_seq_len": 256, "micro_batch_size": 1, "attention": "sdpa"} | job.train
    )
    module = throughput.make_module(job, config, torch.device("cpu"))
    optimizer = throughput.MasterAdamW(module, 1e-3)
    batch = list(islice(throughput.rows(512, 256), 2))
    losses = [float(throughput.step(module, optimizer, batch, torch.device("cpu"))) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.01


@pytest.mark.parametrize("max_seq_len", [512, 4096])
def test_rows_are_full_and_no_label_crosses_a_border(max_seq_len: int) -> None:
    from tests.gpu.throughput import rows

    found = list(islice(rows(100, max_seq_len), 20))
    assert sum(row.lengths.sum() for row in found) > 0.97 * 20 * max_seq_len
    for row in found:
        batch = row.batch
        starts = (batch.position_ids[0] == 0).nonzero().flatten()
        assert len(starts) == len(row.lengths)
        ends = [*(starts[1:] - 1), batch.labels.shape[1] - 1]
        assert all(batch.labels[0, end] == -100 for end in ends)
        labelled = (batch.labels[0] != -100).nonzero().flatten()
        assert (batch.labels[0, labelled] == batch.input_ids[0, labelled + 1]).all()
