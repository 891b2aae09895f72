"""What meshes a run has."""

from __future__ import annotations

from typing import Literal

from forge_core.config import RunConfig

Role = Literal["generators", "trainer", "reference", "critic", "verifier", "weights"]
"""What meshes are for."""

COMPUTING: frozenset[Role] = frozenset({"generators", "trainer", "reference", "critic"})
"""Those that may lie on other hosts."""

_ALL: frozenset[Role] = frozenset({"generators", "trainer", "verifier", "weights"})
_TRAINS_ONLY: frozenset[Role] = frozenset({"trainer"})


def roles_of(config: RunConfig) -> frozenset[Role]:
    """Roles of the meshes that a run of a config opens.

    Nothing generates where all episodes are stored already or none are needed; reference and critic are there only if
    asked for.
    """
    generates = config.kind in ("post_train", "collect", "evaluate")
    roles = _ALL if generates else _TRAINS_ONLY
    if config.trains and config.algorithm.kl.coefficient > 0:
        roles |= {"reference"}
    if config.trains and config.algorithm.loss == "ppo":
        roles |= {"critic"}
    return roles


def roles_here(config: RunConfig) -> frozenset[Role]:
    """Roles of the meshes that lie on the machine of the controller, whatever `hosts` says."""
    return roles_of(config) - COMPUTING if config.hosts.are_elsewhere else roles_of(config)


def mesh_names(config: RunConfig) -> tuple[str, ...]:
    """Names of a run's meshes that log intervals."""
    roles = roles_of(config)
    replicas = config.generators.replicas if "generators" in roles else 0
    others = (name for name in ("trainer", "reference", "critic", "verifier") if name in roles)
    return (*(f"generator-{i}" for i in range(replicas)), *others)
