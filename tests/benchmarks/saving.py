"""Time and memory of checkpoints and of export: `python -m tests.benchmarks.saving`, part of `make bench-training`.

Two ranks with ZeRO-2 save a Llama in float32, alternating with DeepSpeed's `save_checkpoint` alone, which writes no
hashes and no weights that other libraries load, and does not flush to the disk. The export is compared with
transformers, which reads the same weights and saves them again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from tests.benchmarks.training import ROOT, write_texts

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
ROWS = {
    "alone": "DeepSpeed's save_checkpoint alone", "ours": "our checkpoint, committed", "load": "loading it",
    "held": "with local_dir: until training continues", "committed": "with local_dir: until committed",
}  # fmt: skip


def write_model(folder: Path) -> int:
    """A random Llama with the toy world's tokenizer. Returns the bytes of its weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "world-base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=SIZES["num_attention_heads"], max_position_embeddings=512,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, **SIZES,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def output_of(command: list[object]) -> str:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout.splitlines()[-1]


def export(run: Path) -> None:
    """In a process of its own: our export of a run, and transformers' own reading and saving of the same weights."""
    from tests.benchmarks.peak import highest_bytes
    from trainer.checkpoint.state import newest_checkpoint
    from trainer.runtime import quieten_libraries

    quieten_libraries()
    import time

    from transformers import AutoModelForCausalLM

    from cluster.run.rundir import RunDir
    from trainer import export as stage
    from trainer.config.export import ExportConfig
    from trainer.job import read_job

    job = read_job(run)
    found = {}
    started = time.perf_counter()
    with highest_bytes() as highest:
        stage.run(stage.ExportJob(RunDir(run), "bench", job.model, job.config, ExportConfig(max_shard_size="50MB")))
    found["ours"] = [time.perf_counter() - started, highest()]
    weights = newest_checkpoint(RunDir(run).checkpoints) / "weights"
    started = time.perf_counter()
    with highest_bytes() as highest:
        AutoModelForCausalLM.from_pretrained(weights).save_pretrained(run / "again", max_shard_size="50MB")
    found["transformers"] = [time.perf_counter() - started, highest()]
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export:
        return export(arguments.export)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = folder / "run"
        run.mkdir()
        num_bytes = write_model(folder / "model")
        write_texts(folder / "texts.jsonl", folder / "model", 40)
        settings = {
            "data": [str(folder / "texts.jsonl")], "objective": "text", "zero_stage": 2, "precision": "fp32",
            "max_seq_len": 512, "micro_batch_size": 1, "global_batch_size": 2, "batch_unit": "rows",
        }  # fmt: skip
        recipe = {"name": "bench", "seed": 0, "model": {"path": str(folder / "model")}, "train": settings}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        print("saving and loading under two ranks", file=sys.stderr, flush=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={folder}"]
        saved = json.loads(output_of([*torchrun, "-m", "tests.benchmarks.saving_worker", run, arguments.rounds]))
        print("exporting", file=sys.stderr, flush=True)
        exported = json.loads(output_of(["-m", "tests.benchmarks.saving", "--export", run]))
    print_table(saved, exported, num_bytes)


def print_table(saved: dict[str, list], exported: dict[str, list], num_bytes: int) -> None:
    table = Table(title=f"a model of {num_bytes / 1e6:,.0f} MB in float32, two ranks, ZeRO-2", title_justify="left")
    for column in ("what", "seconds", "of DeepSpeed's", "memory per rank, MB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    alone = statistics.median(seconds for seconds, _ in saved["alone"])
    for key, label in ROWS.items():
        seconds = statistics.median(seconds for seconds, _ in saved[key])
        share = f"{seconds / alone:.2f}" if key != "load" else "-"
        table.add_row(label, f"{seconds:.2f}", share, f"{max(peak for _, peak in saved[key]) / 1e6:,.0f}")
    for key, label in (("ours", "export, checked on logits"), ("transformers", "transformers: read and save")):
        seconds, peak = exported[key]
        table.add_row(label, f"{seconds:.2f}", "-", f"{peak / 1e6:,.0f}")
    Console(width=100).print(table)
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
