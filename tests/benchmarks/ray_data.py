"""The peer `ray.data.llm` on the requests of the synthesis benchmark. Needs the extra `bench`.

Its engine starts anew in every execution, so the clock runs from the moment its engine takes the first row to the
moment the last is finished: no start counts.
"""

import os
import sys
import tempfile
import time

from cluster.config import ModelConfig
from cluster.engines.config import EngineConfig, GenerationRequest
from cluster.engines.engine import set_environment
from tests.benchmarks.sides import LENGTHS, requests_of, work_of

# Its documentation advises batches of 64 and more to keep the engine full; 8 batches at once is its default.
TUNED = {"batch_size": 64, "max_concurrent_batches": 8}


def rate_of_ray_data(requests: list[GenerationRequest], config: EngineConfig, model: ModelConfig, tuned: bool) -> float:
    """Output tokens per second of one execution; `tuned` to keep the engine full, or with its own defaults."""
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
                "dtype": config.dtype,
            },
            **({**TUNED, "max_pending_requests": config.max_in_flight} if tuned else {}),
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
        postprocess=lambda row: {
            "num_tokens": row["num_generated_tokens"],
            "seconds": row["time_taken_llm"],
            "finished": time.time(),
        },
    )
    done = processor(ray.data.from_items(rows)).take_all()
    began = min(row["finished"] - row["seconds"] for row in done)
    ended = max(row["finished"] for row in done)
    return sum(row["num_tokens"] for row in done) / (ended - began)


def main() -> None:
    """Print the rate of one pass: `python -m tests.benchmarks.ray_data tuned|defaults LENGTHS NUM_REQUESTS`."""
    import ray

    form, lengths, num_requests = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="rd", ignore_cleanup_errors=True) as scratch:  # engines leave their sockets
        os.environ["TMPDIR"] = scratch
        # Each of its stages reserves a CPU for itself.
        ray.init(num_cpus=8, include_dashboard=False, _temp_dir=f"{scratch}/ray")
        work = work_of("toy")
        requests = requests_of(work.model, LENGTHS[lengths], int(num_requests), 0)
        rate = rate_of_ray_data(requests, work.engine, work.model, form == "tuned")
        print(f"rate {rate}", flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
