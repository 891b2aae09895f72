"""What a run's processes will need of memory, estimated from the model's shape before anything is started.

N is the number of parameters, R the trainer's ranks. A rank of FSDP2 holds 16 N / R bytes: parameters, gradients and
AdamW's two moments in float32. Of embedding and output layer, which tensor parallel ranks do not share, it holds as
many times more. Activations are those of Korthikanti et al. 2022 (arXiv 2205.05198, equation 2) without
the attention scores, which fused attention does not keep: 34 bytes per token, layer and hidden unit at two bytes an
element; and four float32 copies of a chunk's logits, with the gradient of the output layer that the chunk adds.
Estimates round up rather than down.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from forge_core.config import HUB_PREFIX, ModelShape, RunConfig

GIB = 2**30
PROCESS_BYTES = int(0.8 * GIB)
"""Libraries and buffers of one process that has imported torch; measured at 0.76 GiB."""
CHECKPOINT_FILE_BYTES = GIB
"""Largest file of a checkpoint's tensors, unless one tensor is larger: files are made, and by each rank read, in
memory."""
_VOCABULARY_OF_TINY = 353


def model_shape(config: RunConfig, folder: Path | None = None) -> ModelShape | None:
    """The shape of the model to be trained, which lies in `folder` if it is not where the config says.

    None for one of the hub whose shape nobody gives, and for one that is no dense Llama or Qwen.
    """
    path = config.model.path
    if path is None:
        return _shape_of_tiny(config)
    if folder is None and path.startswith(HUB_PREFIX):
        return config.model.shape
    file = (folder or Path(path).expanduser()) / "config.json"
    return _shape_of(json.loads(file.read_text("utf-8")))


def _shape_of_tiny(config: RunConfig) -> ModelShape:
    tiny = config.model.tiny
    return ModelShape(
        hidden_size=tiny.hidden_size,
        num_layers=tiny.num_layers,
        num_heads=tiny.num_heads,
        num_kv_heads=tiny.num_kv_heads,
        head_size=tiny.hidden_size // tiny.num_heads,
        intermediate_size=3 * tiny.hidden_size,
        vocabulary_size=_VOCABULARY_OF_TINY,
        ties_embeddings=True,
    )


def _shape_of(document: dict[str, Any]) -> ModelShape | None:
    """The shape that a dense Llama or Qwen's config.json tells; None if it is of another kind."""
    if any("expert" in key for key in document):
        return None
    try:
        heads = int(document["num_attention_heads"])
        return ModelShape(
            hidden_size=int(document["hidden_size"]),
            num_layers=int(document["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(document.get("num_key_value_heads") or heads),
            head_size=int(document.get("head_dim") or document["hidden_size"] // heads),
            intermediate_size=int(document["intermediate_size"]),
            vocabulary_size=int(document["vocab_size"]),
            ties_embeddings=bool(document.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError):
        return None


def generator_parts(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Bytes of the device's memory that one process of a generator holds, by what for."""
    size, share = element_bytes(config), config.generators.tensor_parallel
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * size
    longest = per_token * config.generators.max_model_len
    on_cpu = config.generators.device == "cpu"
    cache = int(config.generators.kv_cache_gib * GIB) if on_cpu else longest
    return {
        "weights": math.ceil(size * shape.num_parameters / share),
        "key-value cache" if on_cpu else "key-value cache of one sequence": math.ceil(
            max(cache, longest) / share
        ),
    }


def trainer_parts(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Bytes of the device's memory that one rank of the trainer holds, by what for."""
    settings = config.trainer
    size = 4 if settings.precision == "bf16_autocast" else element_bytes(config)
    # Of a layer that is computed once more its input alone is kept, and the rest of one at a time.
    layers = shape.num_layers / 17 + 1 if settings.activation_checkpointing else shape.num_layers
    tokens, logits = config.trainer.micro_batch_tokens, _tokens_with_logits(config)
    block = math.ceil(shape.num_layer_parameters / settings.tensor_parallel)
    shared = shape.num_layers * shape.num_layer_parameters
    held = shared / settings.ranks + (shape.num_parameters - shared) / settings.data_ranks
    return {
        "parameters, gradients, optimizer": math.ceil(16 * held),
        "gathered layers": 2 * size * max(block, shape.vocabulary_size * shape.hidden_size),
        "activations": math.ceil(17 * size * tokens * layers * shape.hidden_size),
        "logits": shape.vocabulary_size * (4 * 4 * logits + size * shape.hidden_size),
    }


def reference_parts(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Bytes of the device's memory that the reference policy holds, by what for."""
    return {
        "parameters": 4 * shape.num_parameters,
        "logits": 2 * 4 * _tokens_with_logits(config) * shape.vocabulary_size,
    }


def critic_parts(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Bytes of the device's memory that the critic holds, by what for."""
    tokens = config.trainer.micro_batch_tokens
    return {
        "parameters, gradients, optimizer": 16 * shape.num_parameters,
        "what a step may have to undo": 12 * shape.num_parameters,
        "activations": 17 * 4 * tokens * shape.num_layers * shape.hidden_size,
    }


def published_bytes(shape: ModelShape) -> int:
    """Size of one published version."""
    return 4 * shape.num_parameters


def checkpoint_bytes(shape: ModelShape) -> int:
    """What rank 0 holds while it writes a checkpoint.

    A copy of weights and moments, and of one file after another what it is made of and its bytes.
    """
    whole = 4 * shape.num_parameters
    return 3 * whole + 2 * min(CHECKPOINT_FILE_BYTES, 2 * whole)


def _tokens_with_logits(config: RunConfig) -> int:
    """Most tokens whose logits are in memory at once."""
    return min(config.trainer.micro_batch_tokens, config.trainer.logprob_chunk_tokens)


def element_bytes(config: RunConfig) -> int:
    """Size of an element of the weights that generate."""
    return 2 if config.model.dtype == "bfloat16" else 4
