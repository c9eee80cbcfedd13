"""One rank of one side of the training benchmark: `torchrun -m tests.benchmarks.training_sides SIDE FOLDER STEPS`.

Every side takes about the same number of useful tokens a step: four rows, packed, or as many documents as make that up,
padded to the longest of their micro-batch. FOLDER has the model, the texts, and the settings of the work.
"""

import datetime
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from peft import LoraConfig

from trainer.runtime import quieten_libraries, set_accelerator_env

set_accelerator_env()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn import functional as F  # noqa: E402

NUM_WARM_UP = 4  # steps that are not counted
PACKED = {"micro_batch_size": 1, "global_batch_size": 4}
PADDED = {"micro_batch_size": 8, "global_batch_size": 32}
LEARNING_RATE = 1e-4
LORA = {"rank": 16, "alpha": 32}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def settings_of(folder: Path) -> dict:
    """max_seq_len, precision (fp32 or bf16) and tuning (full or lora)."""
    return json.loads((folder / "settings.json").read_text())


def peft_lora() -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")


def report(marks: list[tuple[float, float]]) -> None:
    """Print the rates of the steps after the warm-up. marks: (moment, useful tokens so far) at the end of each step."""
    timed = marks[NUM_WARM_UP - 1 :]
    rates = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in itertools.pairwise(timed)]
    if os.environ["RANK"] == "0":
        print(json.dumps({"rates": rates}), flush=True)


def ours(folder: Path, num_steps: int) -> None:
    """The trainer as a recipe starts it, under ZeRO-2."""
    import deepspeed

    from cluster.processes.signals import StopRequest
    from trainer.job import read_job
    from trainer.runtime import load_comm_kernel
    from trainer.train import train

    run = folder / "run"
    load_comm_kernel()
    deepspeed.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(minutes=10))
    if dist.get_rank() == 0:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        settings = {
            "data": [str(folder / "texts.jsonl")], "objective": "text", "zero_stage": 2, "max_steps": num_steps,
            "learning_rate": LEARNING_RATE, "batch_unit": "rows", "lora": LORA, **PACKED, **settings_of(folder),
        }  # fmt: skip
        recipe = {"name": "bench", "seed": 0, "model": {"path": str(folder / "model")}, "train": settings}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    dist.barrier()
    train(read_job(run), StopRequest())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report([(row["time"], row["num_tokens"]) for row in rows if row["stage"] == "train"])


def documents_of(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").open()]
    ids = tokenizer(texts, truncation=True, max_length=settings_of(folder)["max_seq_len"] - 1)["input_ids"]
    return [[*one, tokenizer.eos_token_id] for one in ids]


def rows_of(documents: list[list[int]], max_seq_len: int, packed: bool) -> list[list[list[int]]]:
    from trainer.data.batches import best_fit_decreasing

    if not packed:
        return [[document] for document in documents]
    return [[documents[d] for d in row] for row in best_fit_decreasing([len(d) for d in documents], max_seq_len)]


def micro_batches(rows: list[list[list[int]]], settings: dict) -> Iterator[tuple[list[torch.Tensor], int]]:
    """This rank's micro-batches of every step, and the useful tokens of the step over all ranks."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    size, per_step = settings["micro_batch_size"], settings["global_batch_size"]
    while True:
        for start in range(0, len(order) - per_step + 1, per_step):
            step = [rows[index] for index in order[start : start + per_step]]
            mine = step[dist.get_rank() :: dist.get_world_size()]
            batches = [collate(mine[i : i + size]) for i in range(0, len(mine), size)]
            yield batches, sum(len(document) for row in step for document in row)


def collate(rows: list[list[list[int]]]) -> torch.Tensor:
    """input_ids, position_ids and shifted labels [3, B, S]."""
    width = max(sum(map(len, row)) for row in rows)
    batch = torch.zeros(3, len(rows), width, dtype=torch.long)
    batch[2] = -100
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            ids, end = torch.tensor(document), start + len(document)
            batch[0, b, start:end], batch[1, b, start:end] = ids, torch.arange(len(ids))
            batch[2, b, start : end - 1] = ids[1:]
            start = end
        batch[1, b, start:] = torch.arange(width - start)
    return batch


def bare(folder: Path, num_steps: int, packed: bool) -> None:
    """DistributedDataParallel, fused AdamW, and the model's own forward pass: what one writes in an hour.

    In bf16 AdamW updates the bf16 weights themselves, which is less work than float32 copies of them.
    """
    from peft import get_peft_model
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaForCausalLM

    dist.init_process_group("gloo")
    settings = settings_of(folder)
    dtype = DTYPES[settings["precision"]]
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation="sdpa").train()
    if settings["tuning"] == "lora":
        model = get_peft_model(model, peft_lora(), autocast_adapter_dtype=False)
    parallel = DistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    marks, num_tokens = [], 0
    rows = rows_of(documents_of(folder), settings["max_seq_len"], packed)
    steps = micro_batches(rows, PACKED if packed else PADDED)
    for _ in range(num_steps):
        batches, useful = next(steps)
        for number, (input_ids, position_ids, labels) in enumerate(batches):
            parallel.require_backward_grad_sync = number == len(batches) - 1
            logits = parallel(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            (F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += useful
        marks.append((time.time(), num_tokens))
    report(marks)


def trl(folder: Path, num_steps: int, packed: bool) -> None:
    """TRL's `SFTTrainer` under DeepSpeed ZeRO-2, as its documentation sets it up."""
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    sizes, settings = PACKED if packed else PADDED, settings_of(folder)
    is_bf16 = settings["precision"] == "bf16"
    accumulated = sizes["global_batch_size"] // (sizes["micro_batch_size"] * int(os.environ["WORLD_SIZE"]))
    marks: list[tuple[float, float]] = []

    class Marks(TrainerCallback):
        def on_log(self, args, state, control, logs, **_) -> None:
            if "num_tokens" in logs:
                marks.append((time.time(), logs["num_tokens"]))

    config = SFTConfig(
        output_dir=str(folder / "trl"), max_length=settings["max_seq_len"], packing=packed, dataset_text_field="text",
        per_device_train_batch_size=sizes["micro_batch_size"], gradient_accumulation_steps=accumulated,
        max_steps=num_steps, learning_rate=LEARNING_RATE, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=is_bf16, gradient_checkpointing=False, disable_tqdm=True, dataset_num_proc=None,
        model_init_kwargs={"dtype": str(DTYPES[settings["precision"]]).removeprefix("torch.")},
        deepspeed={
            "bf16": {"enabled": is_bf16}, "zero_optimization": {"stage": 2}, "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        },
    )  # fmt: skip
    data = load_dataset("json", data_files=str(folder / "texts.jsonl"), split="train")
    trainer = SFTTrainer(
        str(folder / "model"), args=config, train_dataset=data, callbacks=[Marks()],
        peft_config=peft_lora() if settings["tuning"] == "lora" else None,
    )  # fmt: skip
    trainer.train()
    report(marks)


def main() -> None:
    side, folder, num_steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    quieten_libraries()
    torch.set_num_threads(1)
    kind, _, form = side.partition(" ")
    if kind == "ours":
        ours(folder, num_steps)
    else:
        {"bare": bare, "trl": trl}[kind](folder, num_steps, form == "packed")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
