"""Requests, samplings and completions as they are written and read, and the settings of an engine."""

import json
import os
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.config import ModelConfig
from cluster.engines.config import Completion, EngineConfig, GenerationRequest, Sample, Sampling, StructuredOutput
from cluster.engines.engine import LORA_RANKS, lora_arguments, set_environment, weights_dtype

SAMPLES = st.builds(
    Sample,
    text=st.text(),
    finish_reason=st.sampled_from(["stop", "length"]),
    num_tokens=st.integers(0, 9),
    token_ids=st.lists(st.integers(0, 200_000)).map(tuple),
)


@given(samples=st.lists(SAMPLES, min_size=1, max_size=4), num_prompt_tokens=st.integers(0, 9))
def test_a_completion_comes_back_from_json_as_it_was(samples: list[Sample], num_prompt_tokens: int):
    completion = Completion("request", tuple(samples), num_prompt_tokens)
    assert Completion.from_dict(json.loads(json.dumps(asdict(completion)))) == completion


def test_a_completion_has_the_text_of_its_first_sample_and_the_tokens_of_all():
    completion = Completion("request", (Sample("one", "stop", 2, (5, 6)), Sample("two", "length", 3, (7, 8, 9))), 4)
    assert (completion.text, completion.finish_reason, completion.token_ids) == ("one", "stop", (5, 6))
    assert completion.num_completion_tokens == 5


def test_a_failed_request_has_all_its_samples():
    failed = Completion.failed(GenerationRequest("request", "prompt", Sampling(n=3)), "engine_died")
    assert [sample.finish_reason for sample in failed.samples] == ["engine_died"] * 3


@pytest.mark.parametrize(
    ("fields", "names"), [({}, "none"), ({"choice": ["a"], "regex": "a"}, "choice, regex"), ({"choice": []}, "")]
)
def test_structured_output_is_exactly_one_of_three(fields: dict, names: str):
    with pytest.raises(ValidationError, match=f"set are: {names}" if names else "at least 1 item"):
        StructuredOutput(**fields)


def test_min_replicas_above_num_replicas_is_an_error():
    with pytest.raises(ValidationError, match="min_replicas=3 is more than num_replicas=2"):
        EngineConfig(num_replicas=2, min_replicas=3)


@given(rank=st.integers(1, 512))
def test_the_lora_rank_is_the_smallest_of_vllms_that_holds_the_adapters(tmp_path_factory, rank: int):
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    found = lora_arguments(EngineConfig(), (str(folder),), num_gpus=1)["max_lora_rank"]
    assert found >= rank and all(other < rank or other >= found for other in LORA_RANKS)


@pytest.mark.parametrize(
    ("dtype", "num_gpus", "used"), [("auto", 0, "float32"), ("auto", 1, "auto"), ("bfloat16", 0, "bfloat16")]
)
def test_without_a_gpu_weights_are_float32_unless_the_recipe_sets_it(dtype, num_gpus, used):
    assert weights_dtype(EngineConfig(dtype=dtype), num_gpus) == used


@pytest.mark.parametrize(
    ("engine", "multiprocessing", "threads"),
    [
        ({"cpus_per_engine": 1}, "0", "1"),
        ({"cpus_per_engine": 4}, "1", "3"),
        ({"cpus_per_engine": 1, "tensor_parallel_size": 2}, "1", "1"),
    ],
)
def test_an_engine_with_one_cpu_has_no_worker_process(monkeypatch, engine, multiprocessing, threads):
    monkeypatch.setattr(os, "environ", {})
    set_environment(EngineConfig(**engine), ModelConfig(path="org/name"), num_gpus=0)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == multiprocessing
    assert os.environ["OMP_NUM_THREADS"] == threads
