"""The real engine, on a tiny random model: one engine for all tests here, since it takes half a minute to start."""

import asyncio
import json
import shutil
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from cluster.config import ModelConfig
from cluster.engines.config import Completion, EngineConfig, GenerationRequest, Sampling, StructuredOutput
from cluster.engines.engine import prompt_ids
from cluster.engines.pool import EnginePool
from cluster.errors import TunesmithError

pytest.importorskip("vllm")
MAX_MODEL_LEN = 128
END_OF_TURN = "&"  # in no prompt here, and in no greedy continuation of one
HALF_CHARACTER = "\ufffd"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = [
    "Come up with a series of tasks:\n1.",
    "Task: Sort the words by length.\nExample 1\nInput:",
    "Is it classification?",
    *(f"List {number} things that float" for number in range(21)),
]


@pytest.fixture(scope="module")
def chat_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with a chat template, and with a second end token that only generation_config.json names."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    end_of_turn = PreTrainedTokenizerFast.from_pretrained(folder).convert_tokens_to_ids(END_OF_TURN)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0, end_of_turn]}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """A LoRA adapter of the tiny model, with weights large enough to change what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def serving(ray_cluster, chat_model, adapter):
    """One engine that stays up for the module: its pool, and a function that runs requests on it."""
    config = EngineConfig(max_num_seqs=8, max_model_len=MAX_MODEL_LEN, dtype="float32", enforce_eager=True)
    loop = asyncio.new_event_loop()
    start = EnginePool.start(config, ModelConfig(path=str(chat_model)), adapters=(str(adapter),))
    pool = loop.run_until_complete(start.__aenter__())

    def complete(requests: list[GenerationRequest]) -> list[Completion]:
        async def all_of_them() -> list[Completion]:
            return await asyncio.gather(*map(pool.generate, requests))

        return loop.run_until_complete(all_of_them())

    yield SimpleNamespace(pool=pool, complete=complete, loop=loop)
    loop.run_until_complete(start.__aexit__(None, None, None))
    loop.close()


@pytest.fixture(scope="module")
def complete(serving):
    return serving.complete


@pytest.fixture(scope="module")
def reference(tiny_model, adapter):
    """Greedy continuation of a prompt by transformers, by the model or with the adapter merged into it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).merge_and_unload()

    def generate(prompt: str, max_tokens: int, is_merged: bool = False) -> tuple[list[int], list[int], str]:
        model = merged if is_merged else base
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


def test_sampling_repeats_with_the_seed(complete):
    def sample(seed: int, name: str) -> GenerationRequest:
        return GenerationRequest(name, PROMPTS[0], Sampling(temperature=1, max_tokens=12, seed=seed))

    first, again, other = complete([sample(1, "first"), sample(1, "again"), sample(2, "other")])
    assert first.token_ids == again.token_ids != other.token_ids


def test_a_prompt_that_is_too_long_is_no_error(complete):
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
    assert (completion.finish_reason, completion.samples[0].stop_reason) == ("stop", stop)


def test_an_adapter_answers_as_its_merged_model_and_not_as_the_base(complete, reference, adapter):
    sampling = Sampling(temperature=0, max_tokens=12)
    prompts = PROMPTS[:6]
    requests = [GenerationRequest(f"base-{i}", text, sampling) for i, text in enumerate(prompts)]
    requests += [GenerationRequest(f"lora-{i}", text, sampling, str(adapter)) for i, text in enumerate(prompts)]
    completions = complete(requests)
    base, tuned = completions[: len(prompts)], completions[len(prompts) :]
    assert [list(each.token_ids) for each in base] == [reference(text, 12)[1] for text in prompts]
    assert [list(each.token_ids) for each in tuned] == [reference(text, 12, is_merged=True)[1] for text in prompts]
    assert all(one.token_ids != other.token_ids for one, other in zip(base, tuned, strict=True))


def test_a_chat_is_rendered_by_the_models_template(complete):
    sampling = Sampling(temperature=0, max_tokens=8)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "List three things"}]
    rendered = "<system>Be brief.\n<user>List three things\n<assistant>"
    chat, text = complete(
        [GenerationRequest("chat", messages, sampling), GenerationRequest("rendered", rendered, sampling)]
    )
    assert (chat.token_ids, chat.num_prompt_tokens) == (text.token_ids, text.num_prompt_tokens)


def test_a_chat_without_a_chat_template_is_an_error_with_the_fix(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(
        TunesmithError, match=r"no chat template\. Use the completion form, or put a chat_template\.jinja"
    ):
        prompt_ids(tokenizer, [{"role": "user", "content": "hello"}])


def test_several_samples_of_a_prompt_differ_and_repeat_with_the_seed(complete):
    sampling = Sampling(temperature=1, max_tokens=10, seed=3, n=4)
    first, again = complete([GenerationRequest(name, PROMPTS[0], sampling) for name in ("first", "again")])
    assert len(first.samples) == 4 and len({sample.token_ids for sample in first.samples}) == 4
    assert first.samples == again.samples
    assert first.num_completion_tokens == sum(len(sample.token_ids) for sample in first.samples)


def test_an_answer_has_its_structure(complete):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
        "required": ["kind", "sure"],
        "additionalProperties": False,
    }
    forms = [
        StructuredOutput(choice=("Equal", "Not equal")),
        StructuredOutput(json_schema=schema),
        StructuredOutput(regex=r"[1-5]"),
    ]
    requests = [
        GenerationRequest(f"{form}-{seed}", PROMPTS[0], Sampling(max_tokens=60, seed=seed, structured=structured))
        for form, structured in enumerate(forms)
        for seed in range(4)
    ]
    completions = complete(requests)
    assert {each.finish_reason for each in completions} == {"stop"}
    choices, objects, numbers = completions[:4], completions[4:8], completions[8:]
    assert {each.text for each in choices} <= {"Equal", "Not equal"}
    for each in objects:
        answer = json.loads(each.text)
        assert set(answer) == {"kind", "sure"} and answer["kind"] in ("good", "bad") and answer["sure"] in (True, False)
    assert all(each.text in "12345" and len(each.text) == 1 for each in numbers)


def test_an_invalid_structure_is_an_error_of_its_caller_only(serving):
    unchecked = StructuredOutput.model_construct(
        choice=None, regex="[unclosed", json_schema=None
    )  # a recipe is checked
    bad = Sampling.model_construct(**dict(Sampling(max_tokens=4)) | {"structured": unchecked})
    good = GenerationRequest("good", PROMPTS[0], Sampling(max_tokens=4))

    async def both() -> list:
        calls = (serving.pool.generate(GenerationRequest("bad", PROMPTS[0], bad)), serving.pool.generate(good))
        return await asyncio.gather(*calls, return_exceptions=True)

    refused, answered = serving.loop.run_until_complete(both())
    assert isinstance(refused, TunesmithError) and "refused request bad" in str(refused)
    assert answered.num_completion_tokens == 4


def test_an_end_token_of_the_generation_config_ends_the_text(complete):
    spelled = Sampling(max_tokens=20, structured=StructuredOutput(regex=f"ab{END_OF_TURN}cd"))
    (completion,) = complete([GenerationRequest("end-of-turn", PROMPTS[0], spelled)])
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_a_stop_token_ends_the_text_before_it(complete, reference):
    _, new_ids, _ = reference(PROMPTS[0], 8)
    stop = new_ids[5]
    sampling = Sampling(temperature=0, max_tokens=8, stop_token_ids=(stop,))
    (completion,) = complete([GenerationRequest("stop-token", PROMPTS[0], sampling)])
    num_tokens = new_ids.index(stop) + 1
    assert list(completion.token_ids) == new_ids[:num_tokens]
    assert completion.finish_reason == "stop"
    assert len(completion.text) < len(reference(PROMPTS[0], num_tokens)[2])


def test_an_answer_without_end_is_cut(complete):
    (completion,) = complete([GenerationRequest("endless", [5] * 20, Sampling(max_tokens=100_000, seed=1))])
    assert completion.finish_reason in ("length", "stop")
    assert completion.num_completion_tokens <= MAX_MODEL_LEN - 20


def test_statistics_count_tokens_prefix_hits_and_time(serving):
    before = copy(serving.pool.stats)
    shared = [7 + number % 50 for number in range(MAX_MODEL_LEN - 20)]  # longer than a block of vLLM's cache
    sampling = Sampling(temperature=0, max_tokens=8)
    for name in ("fills", "finds"):
        (completion,) = serving.complete([GenerationRequest(name, shared, sampling, group="shared")])
    after = serving.pool.stats
    assert after.num_requests - before.num_requests == 2
    assert after.num_generated_tokens - before.num_generated_tokens >= completion.num_completion_tokens
    assert after.num_prefix_queries > before.num_prefix_queries
    assert after.seconds_in_engine > before.seconds_in_engine
    assert after.engines[0].num_requests == after.num_requests


@pytest.mark.long
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


def test_the_core_of_a_killed_engine_ends_with_it(serving):
    """Nearly last here: it kills the engine that the others share."""
    family = [child for actor in engine_actors() for child in actor.children(recursive=True)]
    assert len(family) >= 2  # vLLM's core, and the reaper
    for actor in engine_actors():
        actor.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def engine_actors() -> list[psutil.Process]:
    """Actors of engines that this test run started."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    everyone = psutil.process_iter(["cmdline"])
    return [p for p in everyone if p.pid in mine and "ray::EngineActor" in " ".join(p.info["cmdline"] or ())]


@pytest.mark.long
def test_tensor_parallel_processes_answer_as_one_process(ray_cluster, tiny_model, reference):
    config = EngineConfig(
        tensor_parallel_size=2, max_num_seqs=4, max_model_len=MAX_MODEL_LEN, dtype="float32", enforce_eager=True
    )
    sampling = Sampling(temperature=0, max_tokens=4)

    async def complete() -> Completion:
        async with EnginePool.start(config, ModelConfig(path=str(tiny_model))) as pool:
            return await pool.generate(GenerationRequest("shared", PROMPTS[0], sampling))

    assert list(asyncio.run(complete()).token_ids) == reference(PROMPTS[0], 4)[1]
