"""What the trainer's tests share: a tiny tokenizer and Llama, conversations, run folders, and the real command line."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import psutil
import pytest
import yaml

IM_START, IM_END, END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
WORDS = ["apple", "brook", "cedar", "dune", "ember", "fjord", "grove", "heron", "inlet", "jetty", "knoll", "larch"]
DEADLINE_SECONDS = 300  # for machines that are busy with other work


def names_of(jobs: Iterable[str], long: Container[str]) -> list:
    """Parameters `name` of a test: every job, those in `long` with the marker of that name."""
    return [pytest.param(name, marks=pytest.mark.long) if name in long else name for name in jobs]


def chosen(request: pytest.FixtureRequest, jobs: dict[str, dict], long: Container[str]) -> dict[str, dict]:
    """The jobs that the selected tests of a module need. A job in `long` is left out if no selected test uses it."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = {item.callspec.params.get("name") for item in items}
    return {name: settings for name, settings in jobs.items() if name not in long or name in wanted}


def make_tokenizer(*special_tokens: str):
    """A byte-level BPE tokenizer with a few merges; `special_tokens` come after the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[END, *special_tokens], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([" ".join(WORDS), "user\nassistant\nsystem\nSay the words"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def save_llama(folder: Path, tokenizer, tied: bool, **sizes: int) -> Path:
    """A folder with a random float32 Llama and `tokenizer`. `sizes` changes the default of two small layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    }  # fmt: skip
    config = LlamaConfig(
        **settings | sizes, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, initializer_range=0.1
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_documents(count: int, seed: int = 0) -> list[list[dict]]:
    """Conversations of one to three rounds, from a few words to a hundred."""
    rng = random.Random(seed)
    chats = []
    for _ in range(count):
        chat = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            words = rng.choices(WORDS, k=rng.choice((1, 2, 5, 30)))
            chat.append({"role": "user", "content": "Say the words " + " ".join(words)})
            chat.append({"role": "assistant", "content": " ".join(reversed(words))})
        chats.append(chat)
    return chats


def write_chats(path: Path, chats: Iterable[list[dict]]) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def write_job(run: Path, model: Path, data: Path | None, seed: int = 0, **train: object) -> Path:
    """A run folder as the launcher prepares it for the ranks: `recipe.yaml` with the sections that they read."""
    settings = {
        "data": [str(data)] if data else [], "max_seq_len": 128, "precision": "fp32", "learning_rate": 1e-3,
        "micro_batch_size": 2, "global_batch_size": 8, "batch_unit": "rows", "num_epochs": 1, **train,
    }  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    recipe = {"name": "test", "seed": seed, "model": {"path": str(model)}, "train": settings}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def train_here(run: Path) -> dict:
    """Train a run folder in this process. Needs the fixture `one_rank`."""
    from cluster.processes.signals import StopRequest
    from trainer.job import read_job
    from trainer.train import train

    return train(read_job(run), StopRequest())


def varlen_attn_on_a_cpu(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """As PyTorch documents `varlen_attn`, whose kernel is for GPUs only. query [T, H, D]; a window is (left, right)."""
    import torch
    from torch.nn import functional as F

    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == int(cu_seq_q.diff().max()) and window_size[1] == 0
    outputs = []
    for start, end in cu_seq_q.unfold(0, 2, 1).tolist():
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        mask = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        parts = (states[start:end].transpose(0, 1)[None] for states in (query, key, value))
        attended = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def trace(run: Path) -> dict[int, tuple[float, float]]:
    """Step -> (loss, gradient norm). Of a step that was run twice, the last run counts."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if row["stage"] == "train"}


def weights(run: Path) -> dict:
    """The tensors of the newest checkpoint's weights or adapter."""
    from safetensors.torch import load_file

    from trainer.checkpoint.state import newest_checkpoint

    tensors: dict = {}
    for file in sorted((newest_checkpoint(run / "checkpoints") / "weights").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def torchrun(num_ranks: int, folder: Path) -> list[str]:
    """The start of a command that runs a module on `num_ranks` ranks. torch's logs go to `folder`, not to /tmp."""
    own = ["--standalone", f"--nproc-per-node={num_ranks}", f"--log-dir={folder}"]
    return [sys.executable, "-m", "torch.distributed.run", *own, "-m"]


def start_command(*arguments: object, cwd: Path) -> subprocess.Popen:
    """Start `tunesmith ...` as a user would. Its output goes to `cwd`/output.txt."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LOCAL_RANK"))}
    environ |= {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    with open(cwd / "output.txt", "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ, cwd=cwd)


def command(*arguments: object, cwd: Path) -> tuple[int, str]:
    """Run `tunesmith ...` to its end. Returns its exit code and its output, which includes that of the ranks."""
    process = start_command(*arguments, cwd=cwd)
    try:
        code = process.wait(DEADLINE_SECONDS)
    finally:
        end_tree(process)
    return code, (cwd / "output.txt").read_text()


def end_tree(process: subprocess.Popen) -> None:
    """SIGKILL a command and all processes that it started."""
    if process.poll() is not None:
        return
    tree = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in tree:
        member.kill()
    psutil.wait_procs(tree[:-1], timeout=DEADLINE_SECONDS)
    process.wait()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, what: str) -> None:
    """Poll until `condition` holds; fail at once if the process ends before."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, f"the command ended before {what}"
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.01)


def num_steps_shown(run: Path) -> int:
    """The number of complete lines in metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0
