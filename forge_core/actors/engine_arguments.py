"""What a vLLM engine is started with, the same in all of its processes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from vllm.config import WeightTransferConfig

from forge_core.config import RunConfig
from forge_core.weights import transfer

PROBE_SEQUENCES = 32
"""Room for the probe, which must not wait for living requests to end."""
_BATCHED_TOKENS = 8192
_SLEEPING_WORKER = "forge_core.actors.sleeping_worker.SleepingCPUWorker"


def context_length(model_dir: str, config: RunConfig) -> int:
    """Longest prompt and response together, in tokens."""
    model_config = AutoConfig.from_pretrained(model_dir)
    longest = config.generators.max_model_len
    # Models without a position table of fixed length name no limit.
    return int(min(longest, getattr(model_config, "max_position_embeddings", longest)))


def engine_arguments(model_dir: str, config: RunConfig) -> dict[str, Any]:
    """Arguments of `vllm.LLM` and of `EngineArgs`."""
    transfer.register()
    settings = config.generators
    on_cpu = settings.device == "cpu"
    context = context_length(model_dir, config)
    cache_bytes = int(settings.kv_cache_gib * 2**30) // settings.tensor_parallel
    memory: dict[str, Any] = (
        {"kv_cache_memory_bytes": cache_bytes}
        if on_cpu
        else {"gpu_memory_utilization": settings.gpu_memory_fraction}
    )
    if config.placement == "colocated":
        sleeps = {"worker_cls": _SLEEPING_WORKER} if on_cpu else {"enable_sleep_mode": True}
        memory.update(sleeps)
    return {
        "model": model_dir,
        # Weights that are pickled are not read, whatever else lies in the directory.
        "load_format": "safetensors",
        "dtype": config.model.dtype,
        "seed": config.seed,
        "enforce_eager": on_cpu,
        "tensor_parallel_size": settings.tensor_parallel,
        "max_num_seqs": settings.max_sequences + PROBE_SEQUENCES,
        "max_model_len": context,
        # On CPU vLLM cannot take back the random numbers of a seeded request whose prompt is cut in two.
        "enable_chunked_prefill": not on_cpu,
        "max_num_batched_tokens": max(_BATCHED_TOKENS, context),
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        # A step's tokens are known when it returns, so that a swap lies between two tokens of every request.
        "async_scheduling": False,
        "disable_log_stats": True,
        "weight_transfer_config": WeightTransferConfig(backend=transfer.BACKEND),
        **memory,
    }
