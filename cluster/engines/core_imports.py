"""What vLLM's core imports on a CPU before it computes: see core_process.py."""

from cluster.imports import without_collection

with without_collection():
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401
