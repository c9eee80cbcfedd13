"""Requests, samplings and completions as they are written and read, and the settings of an engine."""

import json
import os
from dataclasses import asdict

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.config import ModelConfig
from cluster.engines import engine
from cluster.engines.config import Completion, EngineConfig, GenerationRequest, Sample, Sampling, StructuredOutput
from cluster.engines.engine import LORA_RANKS, lora_arguments, set_environment, weights_dtype
from cluster.engines.placement import share_cpus

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
    ("dtype", "stored", "cpu_has_bfloat16", "num_gpus", "used"),
    [
        ("auto", "bfloat16", True, 0, "bfloat16"),
        ("auto", "float16", True, 0, "bfloat16"),
        ("auto", "bfloat16", False, 0, "float32"),
        ("auto", "float32", True, 0, "float32"),
        ("auto", None, True, 0, "float32"),
        ("auto", "bfloat16", False, 1, "auto"),
        ("bfloat16", "float32", False, 0, "bfloat16"),
    ],
)
def test_weights_are_as_stored_if_the_machine_computes_in_that(
    monkeypatch, tmp_path, dtype, stored, cpu_has_bfloat16, num_gpus, used
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": stored}))
    monkeypatch.setattr(engine, "computes_in_bfloat16", lambda: cpu_has_bfloat16)
    assert weights_dtype(EngineConfig(dtype=dtype), ModelConfig(path=str(tmp_path)), num_gpus) == used


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True), ({"amx_bf16": True}, True),
        ({"avx512_bf16": False, "avx512_f": True}, False), ({}, False),
    ],
)  # fmt: skip
def test_bfloat16_is_computed_in_if_the_cpu_has_instructions_for_it(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"num_sockets": 1, **features})
    assert engine.computes_in_bfloat16() is expected


@pytest.mark.parametrize(
    ("settings", "multiprocessing", "threads"),
    [
        ({"cpus_per_engine": 1}, "0", "1"),
        ({"cpus_per_engine": 4}, "0", "4"),
        ({"cpus_per_engine": 4, "tensor_parallel_size": 2}, "1", "2"),
        ({"cpus_per_engine": 1, "tensor_parallel_size": 2}, "1", "1"),
    ],
)
def test_an_engine_has_as_many_threads_as_cpus_and_computes_in_one_process(
    monkeypatch, settings, multiprocessing, threads
):
    monkeypatch.setattr(os, "environ", {})
    set_environment(EngineConfig(**settings), ModelConfig(path="org/name"), num_gpus=0)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == multiprocessing
    assert os.environ["OMP_NUM_THREADS"] == threads


REAL, TOY = ModelConfig(path="org/name"), ModelConfig(path="toy")


@pytest.mark.parametrize(
    ("cpus_of_nodes", "gpus", "pools", "shares"),
    [
        ([2], 0, [({}, REAL)], [2]),
        ([16], 0, [({"num_replicas": 3}, REAL)], [5]),
        ([8, 8, 3], 0, [({"num_replicas": 4}, REAL)], [4]),  # an engine is on one node
        ([8], 0, [({}, REAL), ({"cpus_per_engine": 5}, REAL)], [3, 5]),
        ([8], 0, [({}, REAL), ({}, TOY)], [7, 1]),
        ([2], 0, [({"num_replicas": 5}, REAL)], [1]),
        ([2], 0, [({}, TOY)], [1]),
        ([2], 0, [({"cpus_per_engine": 0.5}, REAL)], [0.5]),
        ([16], 2, [({}, REAL)], [1]),
    ],
)
def test_engines_share_the_cpus_of_a_machine_without_gpus(monkeypatch, tmp_path, cpus_of_nodes, gpus, pools, shares):
    nodes = [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in cpus_of_nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": gpus} if gpus else {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "model.safetensors").write_bytes(b"small")
    engines = share_cpus([(EngineConfig(**settings), model) for settings, model in pools])
    assert [each.cpus_per_engine for each in engines] == shares
