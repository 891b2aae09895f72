"""What each mesh of a run asks the allocator for.

| mesh | asks for |
|---|---|
| generator-i | `generators.tensor_parallel` processes with a GPU each, or `generators.threads` cores each |
| trainer | `trainer.ranks` processes with a GPU each, or `trainer.threads` cores each |
| reference, critic | a GPU where the trainer has one, or memory: they work while the trainer waits, on any core |
| verifier, weights, controller | memory; they wait most of the time, and run on any core |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from forge_core.config import ModelShape, RunConfig
from forge_core.placement import memory
from forge_core.placement.allocator import Allocator, Ask, DoesNotFit, Grant
from forge_core.placement.hosts import THIS_MACHINE, Host
from forge_core.placement.roles import Role, roles_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who lies where."""

    allocator: Allocator
    """Holds every grant; what a mesh gives back it may take again."""
    asks: dict[str, Ask]
    """By mesh, what it takes and, when it is started again, takes anew."""
    unbound: str | None
    """Why no process is bound to cores; None where those that compute are, or are not meant to be."""

    def take(self, name: str) -> Grant:
        """What a mesh holds, taken anew if it was given back. Raises DoesNotFit."""
        return self.grants.get(name) or self.allocator.take(self.asks[name])

    def give_back(self, name: str) -> None:
        """Free what a mesh held."""
        if (grant := self.grants.get(name)) is not None:
            self.allocator.give_back(grant)

    @property
    def grants(self) -> dict[str, Grant]:
        """By mesh, what it holds now."""
        return {grant.ask.name: grant for grant in self.allocator.grants}


def make_plan(
    config: RunConfig,
    hosts: Sequence[Host],
    *,
    roles: frozenset[Role] | None = None,
    shape: ModelShape | None = None,
) -> Plan:
    """Place the meshes of some roles, unless given those that the run has; what computes lies on other hosts than this
    machine, if there are any.

    Raises DoesNotFit, a ValueError with one sentence for the user.
    Without a shape nothing is known of memory, and none is counted. Where cores are too few, `core_binding` decides
    between refusing and binding no process at all.
    """
    wanted = asks(config, roles=roles, shape=shape)
    if others := tuple(host.name for host in hosts if host.name != THIS_MACHINE):
        # Those that stay here have said so.
        wanted = {name: replace(ask, hosts=ask.hosts or others) for name, ask in wanted.items()}
    allocator, unbound = Allocator(hosts), None
    try:
        allocator.take_all(list(wanted.values()))
    except DoesNotFit as error:
        if error.resource != "core" or config.core_binding != "auto":
            raise
        unbound = str(error)
        wanted = {name: replace(ask, cores=0) for name, ask in wanted.items()}
        allocator.take_all(list(wanted.values()))
    return Plan(allocator=allocator, asks=wanted, unbound=unbound)


def asks(
    config: RunConfig, *, roles: frozenset[Role] | None = None, shape: ModelShape | None = None
) -> dict[str, Ask]:
    """By mesh, what it asks for; the trainer first, then generators."""
    roles = roles_of(config) if roles is None else roles
    found = [_light("controller", shape)]
    if "trainer" in roles:
        found.append(_trainer(config, shape))
    if "reference" in roles:
        parts = memory.reference_parts(config, shape) if shape else {}
        found.append(_beside_the_trainer(config, "reference", parts))
    if "critic" in roles:
        parts = memory.critic_parts(config, shape) if shape else {}
        found.append(_beside_the_trainer(config, "critic", parts))
    if "generators" in roles:
        found += [_generator(config, index, shape) for index in range(config.generators.replicas)]
    if "verifier" in roles:
        found.append(_light("verifier", shape))
    if "weights" in roles:
        # The volume holds two versions while one replaces the other.
        held = 2 * memory.published_bytes(shape) if shape else 0
        found.append(_light("weights", shape, held))
    return {ask.name: replace(ask, memory_mend=_memory_mend(roles)) for ask in found}


def _memory_mend(roles: frozenset[Role]) -> str:
    fields = ["generators.replicas"] if "generators" in roles else []
    fields += ["trainer.ranks", "trainer.micro_batch_tokens"]
    return f"lower {', '.join(fields[:-1])} or {fields[-1]}"


def _light(name: str, shape: ModelShape | None, held_bytes: int = 0) -> Ask:
    return Ask(
        name=name,
        field=name,
        memory_bytes=memory.PROCESS_BYTES + held_bytes if shape else 0,
        hosts=(THIS_MACHINE,),
    )


def _trainer(config: RunConfig, shape: ModelShape | None) -> Ask:
    on_cpu = config.trainer.device == "cpu"
    resting = 0
    if shape:
        # A publish gathers the weights on every rank and packs them.
        resting = memory.PROCESS_BYTES + 2 * memory.published_bytes(shape)
    if shape and (config.trains or config.warm_start_only):
        # Rank 0 alone writes checkpoints, but of a mesh's processes one asks for as much as the other.
        resting += math.ceil(memory.checkpoint_bytes(shape) / config.trainer.ranks)
    held = sum(memory.trainer_parts(config, shape).values()) if shape and on_cpu else 0
    return _computing(
        config,
        Ask(
            name="trainer",
            field=f"trainer.ranks {config.trainer.ranks}",
            processes=config.trainer.ranks,
            gpus=0 if on_cpu else 1,
            cores=config.trainer.threads if on_cpu else 0,
            memory_bytes=resting + held,
            resting_bytes=resting,
        ),
        "trainer",
    )


def _beside_the_trainer(config: RunConfig, name: str, parts: dict[str, int]) -> Ask:
    """One process that works while the trainer waits for it."""
    on_cpu = config.trainer.device == "cpu"
    held = sum(parts.values()) if on_cpu else 0
    return Ask(
        name=name,
        field=name,
        gpus=0 if on_cpu else 1,
        memory_bytes=memory.PROCESS_BYTES + held if parts else 0,
    )


def _generator(config: RunConfig, index: int, shape: ModelShape | None) -> Ask:
    settings = config.generators
    on_cpu = settings.device == "cpu"
    # What it receives of a publish.
    resting = memory.PROCESS_BYTES + memory.published_bytes(shape) if shape else 0
    held = sum(memory.generator_parts(config, shape).values()) if shape and on_cpu else 0
    field = f"generators.replicas {settings.replicas}"
    if settings.tensor_parallel > 1:
        field += f" x tensor_parallel {settings.tensor_parallel}"
    return _computing(
        config,
        Ask(
            name=f"generator-{index}",
            field=field,
            processes=settings.tensor_parallel,
            gpus=0 if on_cpu else 1,
            cores=settings.threads if on_cpu else 0,
            memory_bytes=resting + held,
            resting_bytes=resting,
        ),
        "generators",
    )


def _computing(config: RunConfig, ask: Ask, turn: str) -> Ask:
    """The ask with what follows from the regime and the layout."""
    is_colocated = config.placement == "colocated"
    if ask.cores > 1:
        ask = replace(ask, field=f"{ask.field} x threads {ask.cores}")
    return replace(
        ask,
        cores=0 if config.core_binding == "shared" else ask.cores,
        # In sync one waits for the other in any case.
        turn=turn if is_colocated or config.regime == "sync" else None,
        lets_go=is_colocated,
    )
