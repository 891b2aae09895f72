"""What a run will need of each device, of this machine and of the disk, before anything is started.

`forge_core.placement.memory` has the formulas.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import dataclass

from flows.model_directory import ModelDirectory
from forge_core.config import ModelShape, RunConfig
from forge_core.placement import memory
from forge_core.placement.allocator import memory_by_mesh
from forge_core.placement.hosts import this_machine
from forge_core.placement.memory import GIB
from forge_core.placement.plan import asks
from forge_core.placement.roles import Role, roles_here, roles_of
from storage.objects import open_store

_BYTES_PER_TOKEN = 40
"""Of an episode on disk, unscored and scored part together: ids, logprobs, versions, text; before compression."""


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
    return memory.model_shape(config, None if model is None else model.path)


def estimate(config: RunConfig, shape: ModelShape, store_uri: str) -> list[Need]:
    """What the run needs, device by device, then of the machine's memory, then of the disk.

    Only meshes that a run of the config opens count.
    """
    roles = roles_of(config)
    needs: list[Need] = []
    if "generators" in roles and config.generators.device == "cuda":
        needs.append(_generator_gpu(config, shape))
    if config.trainer.device == "cuda":
        needs.append(_trainer_gpu(config, shape))
        needs += _gpus_beside_the_trainer(config, shape, roles)
    needs.append(_host_memory(config, shape))
    needs.append(_disk(config, shape, roles, store_uri))
    return needs


def _host_memory(config: RunConfig, shape: ModelShape) -> Need:
    wanted = asks(config, roles=roles_here(config), shape=shape)
    parts: dict[str, int] = {}
    for name, size in memory_by_mesh(list(wanted.values())).items():
        kind = "generators" if name.startswith("generator-") else name
        parts[kind] = parts.get(kind, 0) + size
    return Need(
        name="this machine's memory",
        bytes=sum(parts.values()),
        available=this_machine().memory_bytes,
        parts=parts,
        mend=wanted["controller"].memory_mend,
    )


def _generator_gpu(config: RunConfig, shape: ModelShape) -> Need:
    parts = memory.generator_parts(config, shape)
    return Need(
        name="GPU of each generator",
        bytes=math.ceil(sum(parts.values()) / config.generators.gpu_memory_fraction),
        available=_gpu_bytes(config),
        parts=parts,
        mend="lower generators.max_model_len or take larger GPUs",
    )


def _trainer_gpu(config: RunConfig, shape: ModelShape) -> Need:
    parts = memory.trainer_parts(config, shape)
    # A rank loads the whole model before it keeps its share.
    loading = math.ceil(4 * shape.num_parameters * (1 + 1 / config.trainer.ranks))
    return Need(
        name="GPU of each trainer rank",
        bytes=max(sum(parts.values()), loading),
        available=_gpu_bytes(config),
        parts=parts,
        mend="raise trainer.ranks or lower trainer.micro_batch_tokens",
    )


def _gpus_beside_the_trainer(
    config: RunConfig, shape: ModelShape, roles: frozenset[Role]
) -> list[Need]:
    found: dict[Role, dict[str, int]] = {
        "reference": memory.reference_parts(config, shape),
        "critic": memory.critic_parts(config, shape),
    }
    return [
        Need(
            name=f"GPU of the {role}",
            bytes=sum(parts.values()),
            available=_gpu_bytes(config),
            parts=parts,
            mend="lower trainer.micro_batch_tokens or take larger GPUs",
        )
        for role, parts in found.items()
        if role in roles
    ]


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


def _disk_parts(config: RunConfig, shape: ModelShape, roles: frozenset[Role]) -> dict[str, int]:
    parts, steps = {}, config.steps
    if config.collect is not None:
        steps = config.collect.last_step - config.collect.first_step + 1
    elif config.evaluate_only:
        steps = 0
    else:
        number = 1 if config.warm_start_only else _num_checkpoints(config)
        models = 2 if "critic" in roles else 1
        parts[f"{number} checkpoints or more"] = models * number * 12 * shape.num_parameters
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


def _gpu_bytes(config: RunConfig) -> int | None:
    """Memory of the smallest GPU; None without any, and for those of other hosts."""
    if config.gpu_memory_gib is not None:
        return int(config.gpu_memory_gib * GIB)
    if config.hosts.are_elsewhere:
        return None
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
