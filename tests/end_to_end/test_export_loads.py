"""The exported folder in the hands of others: plain transformers and vLLM say what the trainer's model says."""

import asyncio
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.config import ModelConfig
from cluster.engines.config import EngineConfig, GenerationRequest, Sampling
from cluster.engines.pool import EnginePool
from cluster.files import read_jsonl
from tests.end_to_end.conftest import ROOT
from trainer.checkpoint.state import newest_checkpoint

pytestmark = pytest.mark.timeout(1200)
QUESTIONS = 16
MAX_NEW_TOKENS = 24
TIE = 0.01  # logits; two engines round differently, and each run of the demo trains another model


@pytest.fixture(scope="module")
def prompts(demo) -> list[list[int]]:
    """Held-out questions in chat form, rendered by the exported tokenizer and its template."""
    tokenizer = AutoTokenizer.from_pretrained(demo.run_dir / "export")
    rows = json.loads((demo.run_dir / "evaluation" / "tuned.json").read_text())["rows"]
    asked = {row["id"] for row in rows[:: max(1, len(rows) // QUESTIONS)]}
    lines = read_jsonl(ROOT / "models" / "world-base" / "tunesmith" / "eval.jsonl")
    chats = [
        [{"role": "user", "content": "\n\n".join(filter(None, (line["instruction"], line["input"])))}]
        for line in lines
        if line["id"] in asked
    ]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def greedy(folder, prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=ends
        )
        answers.append([int(token) for token in output[0, len(prompt) :]])
    return answers


@pytest.fixture(scope="module")
def trained_answers(demo, prompts) -> list[list[int]]:
    """Greedy tokens of the model as the trainer left it."""
    ends = json.loads((demo.run_dir / "export" / "generation_config.json").read_text())["eos_token_id"]
    return greedy(newest_checkpoint(demo.run_dir / "checkpoints") / "weights", prompts, ends)


def test_plain_transformers_gives_the_trainers_tokens(demo, prompts, trained_answers):
    ends = json.loads((demo.run_dir / "export" / "generation_config.json").read_text())["eos_token_id"]
    assert greedy(demo.run_dir / "export", prompts, ends) == trained_answers


def test_vllm_gives_the_trainers_tokens(demo, prompts, trained_answers, ray_cluster):
    async def ask() -> list[list[int]]:
        engine = EngineConfig(enforce_eager=True, max_num_seqs=16)
        sampling = Sampling(temperature=0.0, max_tokens=MAX_NEW_TOKENS)
        async with EnginePool.start(engine, ModelConfig(path=str(demo.run_dir / "export"))) as pool:
            requests = [GenerationRequest(str(number), prompt, sampling) for number, prompt in enumerate(prompts)]
            done = await asyncio.gather(*(pool.generate(request) for request in requests))
        return [list(completion.token_ids) for completion in done]

    answers = asyncio.run(ask())
    differing = [number for number in range(len(prompts)) if answers[number] != trained_answers[number]]
    assert len(differing) <= 1
    for number in differing:
        gap = gap_where_they_part(demo.run_dir / "export", prompts[number], answers[number], trained_answers[number])
        assert gap < TIE


def gap_where_they_part(folder, prompt: list[int], first: list[int], second: list[int]) -> float:
    """Difference of the logits of the two tokens at which two answers begin to differ."""
    place = next(i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + first[:place]])).logits[0, -1]
    return float(abs(logits[first[place]] - logits[second[place]]))
