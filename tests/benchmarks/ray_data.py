"""The peer `ray.data.llm` on the requests of the synthesis benchmark. Needs the extra `bench`.

Its engine starts anew in every execution, so the clock runs from its first finished row to its last, which is in its
favor: neither start nor ramp-up counts.
"""

import os
import time

from cluster.config import ModelConfig
from cluster.engine import set_environment
from cluster.engine_config import EngineConfig, GenerationRequest

BATCH_ROWS = 64  # its README advises batches of 64 and more where the engine is to be kept full
MAX_CONCURRENT_BATCHES = 8  # its default


def rate_of_ray_data(requests: list[GenerationRequest], config: EngineConfig, model: ModelConfig) -> float:
    """Output tokens per second of one execution."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    before = dict(os.environ)
    set_environment(config, model, num_gpus=0)
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    rows = [{"prompt": r.prompt, "max_tokens": r.sampling.max_tokens, "seed": r.sampling.seed} for r in requests]
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=model.path,
            engine_kwargs={
                "enforce_eager": True,
                "max_num_seqs": config.max_num_seqs,
                "generation_config": "vllm",
                "enable_chunked_prefill": False,
                "distributed_executor_backend": "mp",
            },
            batch_size=BATCH_ROWS,
            max_concurrent_batches=MAX_CONCURRENT_BATCHES,
            max_pending_requests=config.max_in_flight,
            concurrency=1,
            runtime_env={"env_vars": changed},
            placement_group_config={"bundles": [{"CPU": 1}]},
            chat_template_stage=False,
            tokenize_stage=True,
            detokenize_stage=False,
            log_engine_metrics=False,
        ),
        preprocess=lambda row: {
            "prompt": row["prompt"],
            "sampling_params": {"temperature": 1.0, "max_tokens": row["max_tokens"], "seed": row["seed"]},
        },
        postprocess=lambda row: {"num_tokens": row["num_generated_tokens"], "finished": time.time()},
    )
    done = processor(ray.data.from_items(rows)).take_all()
    first = min(row["finished"] for row in done)
    last = max(row["finished"] for row in done)
    num_tokens = sum(row["num_tokens"] for row in done if row["finished"] > first)
    return num_tokens / (last - first)
