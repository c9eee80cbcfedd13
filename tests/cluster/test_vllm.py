"""The real engine, on a tiny random model: one engine for all tests here, since it takes half a minute to start."""

import asyncio
import shutil

import pytest

from cluster.config import ModelConfig
from cluster.engine_config import Completion, EngineConfig, GenerationRequest, Sampling
from cluster.errors import TunesmithError
from cluster.pool import EnginePool

pytest.importorskip("vllm")
MAX_MODEL_LEN = 128
HALF_CHARACTER = "\ufffd"
PROMPTS = [
    "Come up with a series of tasks:\n1.",
    "Task: Sort the words by length.\nExample 1\nInput:",
    "Is it classification?",
    *(f"List {number} things that float" for number in range(21)),
]


@pytest.fixture(scope="module")
def complete(ray_cluster, tiny_model):
    """A function that runs requests on one engine that stays up for the module."""
    config = EngineConfig(max_num_seqs=8, max_model_len=MAX_MODEL_LEN, dtype="float32", enforce_eager=True)
    loop = asyncio.new_event_loop()
    start = EnginePool.start(config, ModelConfig(path=str(tiny_model)))
    pool = loop.run_until_complete(start.__aenter__())

    def complete(requests: list[GenerationRequest]) -> list[Completion]:
        async def all_of_them() -> list[Completion]:
            return await asyncio.gather(*map(pool.generate, requests))

        return loop.run_until_complete(all_of_them())

    yield complete
    loop.run_until_complete(start.__aexit__(None, None, None))
    loop.close()


@pytest.fixture(scope="module")
def reference(tiny_model):
    """Greedy continuation of a prompt by transformers: prompt ids and new ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)

    def generate(prompt: str, max_tokens: int) -> tuple[list[int], list[int], str]:
        prompt_ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            output = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=max_tokens)
        new_ids = output[0, len(prompt_ids) :].tolist()
        return prompt_ids, new_ids, tokenizer.decode(new_ids, skip_special_tokens=True)

    return generate


def test_greedy_completions_are_those_of_transformers(complete, reference):
    sampling = Sampling(temperature=0, max_tokens=16)
    completions = complete([GenerationRequest(f"greedy-{i}", text, sampling) for i, text in enumerate(PROMPTS)])
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        prompt_ids, new_ids, text = reference(prompt, 16)
        assert list(completion.token_ids) == new_ids
        assert completion.text == text.rstrip(HALF_CHARACTER)  # which vLLM holds back
        assert completion.num_prompt_tokens == len(prompt_ids)
        assert completion.num_completion_tokens == len(new_ids)


def test_a_prompt_of_token_ids_is_the_same_as_its_text(complete, reference):
    prompt_ids, _, _ = reference(PROMPTS[0], 1)
    sampling = Sampling(temperature=0, max_tokens=8)
    text, ids = complete(
        [GenerationRequest("as-text", PROMPTS[0], sampling), GenerationRequest("as-ids", prompt_ids, sampling)]
    )
    assert text.token_ids == ids.token_ids


def test_a_seed_makes_sampling_repeat(complete):
    def sample(seed: int, name: str) -> GenerationRequest:
        return GenerationRequest(name, PROMPTS[0], Sampling(temperature=1, max_tokens=12, seed=seed))

    first, again, other = complete([sample(1, "first"), sample(1, "again"), sample(2, "other")])
    assert first.token_ids == again.token_ids != other.token_ids


def test_a_prompt_too_long_is_an_outcome_and_no_error(complete):
    long_prompt = [5] * MAX_MODEL_LEN
    fits = [5] * (MAX_MODEL_LEN - 1)
    sampling = Sampling(temperature=0, max_tokens=4)
    too_long, last_that_fits = complete(
        [GenerationRequest("long", long_prompt, sampling), GenerationRequest("fits", fits, sampling)]
    )
    assert (too_long.finish_reason, too_long.text) == ("prompt_too_long", "")
    assert (last_that_fits.finish_reason, last_that_fits.num_completion_tokens) == ("length", 1)


def test_a_stop_string_ends_the_text_before_it(complete, reference):
    _, _, text = reference(PROMPTS[0], 16)
    stop = text[len(text) // 2]
    sampling = Sampling(temperature=0, max_tokens=16, stop=(stop,))
    (completion,) = complete([GenerationRequest("stop", PROMPTS[0], sampling)])
    assert completion.text == text[: text.index(stop)]
    assert completion.finish_reason == "stop"


def test_a_model_that_cannot_be_loaded_fails_with_vllms_own_reason(ray_cluster, tiny_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    with open(broken / "model.safetensors", "r+b") as weights:
        weights.truncate(5000)

    async def start() -> None:
        async with EnginePool.start(EngineConfig(max_model_len=MAX_MODEL_LEN), ModelConfig(path=str(broken))):
            pass

    with pytest.raises(TunesmithError, match=r"no engine came up: SafetensorError: .*header"):
        asyncio.run(start())
