"""What a run will need of memory and disk, estimated from the model's shape before anything is started.

N is the number of parameters, R the trainer's ranks. A rank of FSDP2 holds 16 N / R bytes: parameters, gradients and
AdamW's two moments in float32. Activations are those of Korthikanti et al. 2022 (arXiv 2205.05198, equation 2) without
the attention scores, which fused attention does not keep: 34 bytes per token, layer and hidden unit at two bytes an
element; and four float32 copies of the logits. Estimates round up rather than down.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import psutil

from flows.model_directory import ModelDirectory
from forge_core.config import ModelShape, RunConfig
from forge_core.placement import Role, roles_of
from storage.objects import open_store

GIB = 2**30
_PROCESS_BYTES = int(0.8 * GIB)
"""Libraries and buffers of one process that has imported torch; measured at 0.76 GiB."""
_BYTES_PER_TOKEN = 40
"""Of an episode on disk, unscored and scored part together: ids, logprobs, versions, text; before compression."""
_VOCABULARY_OF_TINY = 353


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one device, the machine or the store must have."""

    name: str
    """Whose memory or disk."""
    bytes: int
    """How much is needed."""
    available: int | None
    """How much there is; None where nobody can say."""
    parts: dict[str, int]
    """What it is needed for."""
    mend: str
    """What to change where it is too much."""

    @property
    def fits(self) -> bool:
        """Whether it is known not to be too much."""
        return self.available is None or self.bytes <= self.available


def model_shape(config: RunConfig, model: ModelDirectory | None) -> ModelShape | None:
    """The shape of the model to be trained; None for one of the hub whose shape nobody gives."""
    tiny = config.model.tiny
    if config.model.path is None:
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
    if model is not None:
        return _shape_of(json.loads((model.path / "config.json").read_text("utf-8")))
    return config.model.shape


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


def estimate(config: RunConfig, shape: ModelShape, store_uri: str) -> list[Need]:
    """What the run needs, device by device, then of the machine's memory, then of the disk.

    Only meshes that a run of the config opens count.
    """
    roles = roles_of(config)
    needs: list[Need] = []
    host = {"processes": _PROCESS_BYTES * _num_processes(config, roles)}
    if "generators" in roles:
        generator = _generator_parts(config, shape)
        if config.generators.device == "cuda":
            needs.append(_generator_gpu(config, generator))
        else:
            host["generators"] = config.generators.replicas * sum(generator.values())
    if config.trainer.device == "cuda":
        needs.append(_trainer_gpu(config, shape))
    else:
        host["trainer"] = config.trainer.ranks * sum(_trainer_parts(config, shape).values())
    whole = 4 * shape.num_parameters
    if "weights" in roles:
        # A publish gathers the weights on every rank and packs them; the volume holds two versions while one replaces
        # the other, and each generator what it receives.
        host["publish"] = 2 * whole * config.trainer.ranks
        host["publish"] += whole * (2 + config.generators.replicas)
    mend = ["trainer.ranks", "trainer.micro_batch_tokens"]
    if "generators" in roles:
        mend.insert(0, "generators.replicas")
    needs.append(
        Need(
            name="this machine's memory",
            bytes=sum(host.values()),
            available=psutil.virtual_memory().total,
            parts=host,
            mend=f"lower {', '.join(mend[:-1])} or {mend[-1]}",
        )
    )
    needs.append(_disk(config, shape, roles, store_uri))
    return needs


def _generator_gpu(config: RunConfig, parts: dict[str, int]) -> Need:
    return Need(
        name="GPU of each generator",
        bytes=math.ceil(sum(parts.values()) / config.generators.gpu_memory_fraction),
        available=_gpu_bytes(config),
        parts=parts,
        mend="lower generators.max_model_len or take larger GPUs",
    )


def _trainer_gpu(config: RunConfig, shape: ModelShape) -> Need:
    parts = _trainer_parts(config, shape)
    # A rank loads the whole model before it keeps its share.
    loading = math.ceil(4 * shape.num_parameters * (1 + 1 / config.trainer.ranks))
    return Need(
        name="GPU of each trainer rank",
        bytes=max(sum(parts.values()), loading),
        available=_gpu_bytes(config),
        parts=parts,
        mend="raise trainer.ranks or lower trainer.micro_batch_tokens",
    )


def _disk(config: RunConfig, shape: ModelShape, roles: frozenset[Role], store_uri: str) -> Need:
    parts = _disk_parts(config, shape, roles)
    return Need(
        name="the store's disk",
        bytes=sum(parts.values()),
        available=_free_disk(store_uri),
        parts=parts,
        mend="raise checkpoint.every and checkpoint.every_seconds, lower steps, or take another --store",
    )


def check_fits(needs: list[Need]) -> None:
    """Raise ValueError about the first need that is larger than what there is."""
    for need in needs:
        if not need.fits:
            assert need.available is not None
            raise ValueError(
                f"{need.name} has {need.available / GIB:.1f} GiB and the run needs about {need.bytes / GIB:.1f} GiB: "
                f"{need.mend}"
            )


def _generator_parts(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    size = _element_bytes(config)
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * size
    longest = per_token * config.generators.max_model_len
    on_cpu = config.generators.device == "cpu"
    cache = int(config.generators.kv_cache_gib * GIB) if on_cpu else longest
    return {
        "weights": size * shape.num_parameters,
        "key-value cache" if on_cpu else "key-value cache of one sequence": max(cache, longest),
    }


def _trainer_parts(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    size, ranks = _element_bytes(config), config.trainer.ranks
    tokens = config.trainer.micro_batch_tokens
    block = shape.num_layer_parameters
    return {
        "parameters, gradients, optimizer": math.ceil(16 * shape.num_parameters / ranks),
        "gathered layers": 2 * size * max(block, shape.vocabulary_size * shape.hidden_size),
        "activations": 17 * size * tokens * shape.num_layers * shape.hidden_size,
        "logits": 4 * 4 * tokens * shape.vocabulary_size,
    }


def _disk_parts(config: RunConfig, shape: ModelShape, roles: frozenset[Role]) -> dict[str, int]:
    parts, steps = {}, config.steps
    if config.collect is not None:
        steps = config.collect.last_step - config.collect.first_step + 1
    else:
        number = _num_checkpoints(config)
        parts[f"{number} checkpoints or more"] = number * 12 * shape.num_parameters
    if "generators" in roles:
        episodes = steps * config.groups_per_step * config.group_size
        parts["episodes"] = episodes * (config.sampling.max_tokens + 256) * _BYTES_PER_TOKEN
    return parts


def _num_checkpoints(config: RunConfig) -> int:
    """Checkpoints that stand at the same time, those aside that seconds make due."""
    # A run that trains on collected rounds writes one after each.
    every = config.steps_per_round if config.train_rounds else config.checkpoint.every
    written = 2 + (config.steps // every if every else 0)
    kept = config.checkpoint
    if kept.keep_last == 0:
        return written
    # The first, the newest with one that is being written, and what is kept beside them.
    standing = 2 + kept.keep_last + int(kept.keep_best)
    standing += config.steps // kept.keep_every if kept.keep_every else 0
    return min(written, standing)


def _element_bytes(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def _num_processes(config: RunConfig, roles: frozenset[Role]) -> int:
    """The controller, and those of the meshes."""
    replicas = config.generators.replicas if "generators" in roles else 0
    return 1 + replicas + config.trainer.ranks + len(roles & {"verifier", "weights"})


def _gpu_bytes(config: RunConfig) -> int | None:
    """Memory of the smallest GPU; None without any."""
    if config.gpu_memory_gib is not None:
        return int(config.gpu_memory_gib * GIB)
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return min(int(line) for line in told.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _free_disk(store_uri: str) -> int | None:
    """Bytes free where a local store lies, or will lie; None for a store elsewhere."""
    path = open_store(store_uri).local_path("runs/")
    if path is None:
        return None
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
