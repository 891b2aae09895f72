"""What meshes a run has, and which GPUs their processes see: all that can be said before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forge_core.config import RunConfig

Role = Literal["generators", "trainer", "verifier", "weights"]
"""What meshes are for."""

_ALL: frozenset[Role] = frozenset({"generators", "trainer", "verifier", "weights"})
_TRAINS_ONLY: frozenset[Role] = frozenset({"trainer"})


def roles_of(config: RunConfig) -> frozenset[Role]:
    """Roles of the meshes that a run of a config opens: a trainer alone where all episodes are stored already."""
    return _TRAINS_ONLY if config.replay is not None or config.train_rounds else _ALL


def mesh_names(config: RunConfig) -> tuple[str, ...]:
    """Names of a run's meshes that log intervals."""
    roles = roles_of(config)
    replicas = config.generators.replicas if "generators" in roles else 0
    others = (name for name in ("trainer", "verifier") if name in roles)
    return (*(f"generator-{i}" for i in range(replicas)), *others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which GPUs each mesh's processes see; nothing on CPU."""

    generators: tuple[tuple[int, ...], ...]
    """Per replica; none where the run does not generate."""
    trainer: tuple[int, ...]
    """One per rank."""


def place(config: RunConfig, roles: frozenset[Role]) -> Placement:
    """Disjoint GPUs, the trainer's first, for the meshes of some roles."""
    next_gpu = 0
    trainer: tuple[int, ...] = ()
    if "trainer" in roles and config.trainer.device == "cuda":
        trainer = tuple(range(config.trainer.ranks))
        next_gpu = config.trainer.ranks
    generators: list[tuple[int, ...]] = []
    for _ in range(config.generators.replicas if "generators" in roles else 0):
        if config.generators.device == "cuda":
            generators.append((next_gpu,))
            next_gpu += 1
        else:
            generators.append(())
    return Placement(generators=tuple(generators), trainer=trainer)
