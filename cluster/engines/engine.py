"""One vLLM engine. The pool runs it inside a Ray actor, but nothing here depends on Ray.

A backend is any class with this constructor, `generate` and `report`; `EngineConfig.backend` names it.

Engines of one process on CPUs have been run, and vLLM with tensor_parallel_size=2 in two processes of one machine
without GPUs ("mp" executor). Engines of several GPUs, on one node or over nodes ("ray" executor), follow vLLM 0.32's
sources but have not been run.
"""

import gc
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import ModelConfig
from cluster.engines import core_process
from cluster.engines.config import Completion, EngineConfig, EngineReport, GenerationRequest, Prompt, Sample, Sampling
from cluster.errors import InputError, TunesmithError
from cluster.system import require_system, use_own_programs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import AsyncEngineArgs

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
# vllm/lora/peft_helper.py refuses these, but only at an adapter's first request. It ignores the last one.
UNSERVED_LORA = ("modules_to_save", "use_dora", "lora_bias", "layer_replication", "trainable_token_indices")


class VLLMEngine:
    """vLLM's asynchronous engine, which gives final outputs only."""

    def __init__(self, config: EngineConfig, model: ModelConfig, num_gpus: int, adapters: tuple[str, ...] = ()) -> None:
        """Load the model, which takes from seconds to minutes. `num_gpus` 0 means a CPU build of vLLM."""
        set_environment(config, model, num_gpus)  # before vLLM is imported, which reads it
        is_forked = is_one_process(config, num_gpus)
        if is_forked:
            core_process.begin_import()
        from vllm.inputs import tokens_input
        from vllm.lora.request import LoRARequest
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError

        self._sums = EngineReport()
        with core_process.forked_core() if is_forked else nullcontext():
            self._engine = AsyncLLM.from_engine_args(
                engine_arguments(config, model, num_gpus, adapters),
                usage_context=UsageContext.LLM_CLASS,  # as many tokens in a step as the offline engine, not as a server
                stat_loggers=[stat_logger(self._sums)],
            )
        self._adapters = {path: LoRARequest(path, number, path) for number, path in enumerate(adapters, 1)}
        self._tokens_input = tokens_input
        self._engine_dead_error = EngineDeadError
        self._numbers = count()
        gc.freeze()  # the garbage collector need not scan what the imports made, a million objects, again and again

    def report(self) -> EngineReport:
        return replace(self._sums)

    async def generate(self, request: GenerationRequest) -> Completion:
        """Continue one prompt. The completion of a prompt that is longer than the model supports is "prompt_too_long".

        Raises TunesmithError for a chat if the model has no chat template.
        """
        token_ids = prompt_ids(self._engine.get_tokenizer(), request.prompt, request.chat_template_kwargs)
        if len(token_ids) + 1 > self._engine.model_config.max_model_len:
            return Completion.failed(request, "prompt_too_long")
        prompt = self._tokens_input(token_ids)  # TokensPrompts would pass one by one through a thread of vLLM
        final = None
        try:
            async for output in self._engine.generate(
                prompt,
                vllm_sampling(request.sampling),
                f"{request.request_id}-{next(self._numbers)}",
                lora_request=self._adapters[request.adapter] if request.adapter else None,
            ):
                final = output
        except self._engine_dead_error:
            os._exit(1)  # the core process is gone. The pool has to see a death, not a failed request
        samples = tuple(
            Sample(
                output.text,
                output.finish_reason,
                len(output.token_ids),
                tuple(output.token_ids),
                stop_reason=output.stop_reason,
            )
            for output in sorted(final.outputs, key=lambda output: output.index)
        )
        return Completion(request.request_id, samples, len(token_ids))


def engine_arguments(
    config: EngineConfig, model: ModelConfig, num_gpus: int, adapters: tuple[str, ...]
) -> "AsyncEngineArgs":
    from vllm import AsyncEngineArgs

    executor = None  # one rank, else Ray on GPUs, so that the engine may span nodes, and local processes on CPUs
    if config.gpus_per_engine > 1:
        executor = "ray" if num_gpus else "mp"
    return AsyncEngineArgs(
        model=model.path,
        revision=model.revision,
        trust_remote_code=False,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        distributed_executor_backend=executor,
        dtype=weights_dtype(config, model, num_gpus),
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enforce_eager=num_gpus == 0 if config.enforce_eager is None else config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
        # One backend for all forms. Compact JSON, because a weak model would write white space up to max_tokens.
        structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
        # Sampling is that of the request, not of the model's generation_config.json. End tokens that only this
        # file names (Llama-3's <|eot_id|>) still end a text (vllm/v1/engine/input_processor.py).
        generation_config="vllm",
        disable_log_stats=True,
        # On a CPU a seeded request whose prompt is computed in chunks kills the engine ("CPU Generator does not use
        # offset", vLLM 0.32.0).
        enable_chunked_prefill=num_gpus > 0,
        **lora_arguments(config, adapters, num_gpus),
    )


def stat_logger(sums: EngineReport) -> type:
    """A class of loggers for vLLM, which calls `record` once per step: `sums` is kept up to date, nothing per token."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class SumsLogger(StatLoggerBase):
        def __init__(self, vllm_config: object, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0) -> None:
            if iteration_stats is not None:
                sums.num_tokens += iteration_stats.num_generation_tokens
                sums.num_preemptions += iteration_stats.num_preempted_reqs
            if scheduler_stats is not None:
                sums.num_running = scheduler_stats.num_running_reqs
                sums.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
                sums.num_prefix_queries += scheduler_stats.prefix_cache_stats.queries
                sums.num_prefix_hits += scheduler_stats.prefix_cache_stats.hits

        def log_engine_initialized(self) -> None:
            """vLLM calls it when the engine is up. There is nothing to log."""

    return SumsLogger


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, chat_template_kwargs: Mapping[str, object] | None = None
) -> list[int]:
    """Token ids of a prompt in any form. Raises TunesmithError for a chat if the model has no chat template."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if not prompt or not isinstance(prompt[0], dict):
        return prompt
    if not tokenizer.chat_template:
        raise TunesmithError(
            "the model has no chat template. Use the completion form, or put a chat_template.jinja in its folder."
        )
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
    )
    return tokenizer.encode(text, add_special_tokens=False)  # the template has written them


def lora_arguments(config: EngineConfig, adapters: tuple[str, ...], num_gpus: int) -> dict:
    """vLLM's arguments for serving these adapters, if need be all in one batch."""
    if not adapters:
        return {}
    needed = config.max_lora_rank or max(adapter_rank(path) for path in adapters)
    rank = next(rank for rank in LORA_RANKS if rank >= needed)
    # On a CPU, in a batch with adapters, a sequence without one gets the weights in the last slot (index -1 in
    # vllm/lora/ops/torch_ops/lora_ops.py, 0.32.0). A slot more than there are adapters keeps these weights zero.
    num_slots = len(adapters) + (num_gpus == 0)
    return {"enable_lora": True, "max_loras": num_slots, "max_lora_rank": rank}


def adapter_rank(path: str) -> int:
    """The largest rank in a LoRA adapter. Raises InputError if there is no adapter or vLLM cannot serve it."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        raise InputError(f"{path}: it has no adapter_config.json. Give the folder of a LoRA adapter in peft's format.")
    adapter = json.loads(file.read_text())
    unserved = [key for key in UNSERVED_LORA if adapter.get(key)]
    if adapter.get("peft_type") != "LORA" or unserved:
        raise InputError(
            f"{path}: vLLM cannot serve this adapter (peft_type {adapter.get('peft_type')}"
            f"{''.join(f', with {key}' for key in unserved)}). Merge it into the model and serve the merged model."
        )
    rank = max(adapter["r"], *(adapter.get("rank_pattern") or {}).values(), 0)
    if rank > LORA_RANKS[-1]:
        raise InputError(
            f"{path}: its rank {rank} is more than vLLM serves, {LORA_RANKS[-1]}. Merge it into the model."
        )
    return rank


def check_adapters(config: EngineConfig, adapters: tuple[str, ...]) -> None:
    """Raise InputError for an adapter that the engines could not serve."""
    for path in adapters:
        rank = adapter_rank(path)
        if config.max_lora_rank is not None and rank > config.max_lora_rank:
            raise InputError(
                f"{path}: its rank {rank} is more than engine.max_lora_rank={config.max_lora_rank}. Raise it, or "
                "remove it from the recipe."
            )


def weights_dtype(config: EngineConfig, model: ModelConfig, num_gpus: int) -> str:
    """The data type of the weights. On a CPU that does not compute in bfloat16, it takes four times as long."""
    if config.dtype != "auto" or num_gpus:
        return config.dtype
    import torch
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    is_half = found.get_text_config().dtype in (torch.bfloat16, torch.float16)
    return "bfloat16" if is_half and computes_in_bfloat16() else "float32"


def computes_in_bfloat16() -> bool:
    """Whether this CPU has instructions for it, such as avx512_bf16 or amx_bf16."""
    import torch

    return any(has is True for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def vllm_sampling(sampling: Sampling):
    """vLLM's SamplingParams of our Sampling."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    fields = sampling.model_dump(exclude={"stop", "stop_token_ids", "structured"})
    structured = None
    if form := sampling.structured:
        choice = None if form.choice is None else list(form.choice)
        structured = StructuredOutputsParams(choice=choice, regex=form.regex, json=form.json_schema)
    return SamplingParams(
        **fields,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        structured_outputs=structured,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def is_one_process(config: EngineConfig, num_gpus: int) -> bool:
    """Whether the model computes in the scheduler's process.

    That saves a message in each step, and the CPU on which vLLM's scheduler would wait in a loop for a worker process.
    """
    return num_gpus == 0 and config.gpus_per_engine == 1


def set_environment(config: EngineConfig, model: ModelConfig, num_gpus: int) -> None:
    """Set what vLLM reads from the environment: no usage reports, and no requests to the hub for a local model.

    Raises InputError if this machine lacks what an engine on its CPUs needs.
    """
    use_own_programs()
    os.environ.update(VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    if Path(model.path).is_dir():
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    if num_gpus == 0:
        require_system(engines=True)
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE=str(config.kv_cache_gib),
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_ENABLE_V1_MULTIPROCESSING="0" if is_one_process(config, num_gpus) else "1",
            OMP_NUM_THREADS=str(max(1, round(config.min_cpus / config.gpus_per_engine))),
        )
