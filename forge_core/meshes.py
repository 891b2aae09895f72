"""The meshes of a run: opened once, used by every stage, stopped with the run.

```
controller (the flow's process)
 ├─ generator-0 … generator-(R-1)   one vLLM engine each, on one process or several
 ├─ trainer                          one process per FSDP2 rank
 ├─ reference, critic                one process each, where they are asked for
 ├─ verifier                         one process
 └─ weights                          TorchStore's volume
```

Processes are children of the controller and die with it, also when it is killed; on other hosts they are children of
the host's worker, and a killed controller is noticed within about a minute. Every call has a deadline.
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge_core.config import HUB_PREFIX, HostsConfig, RunConfig
from forge_core.mesh import Mesh
from forge_core.placement.allocator import Grant, Slot
from forge_core.placement.claims import claimed_plan
from forge_core.placement.machines import open_machines
from forge_core.placement.roles import COMPUTING, Role
from forge_core.process_environment import MONARCH_ENVIRONMENT, process_environment
from forge_core.processes import Processes
from forge_core.services.fault_hook import install_fault_hook
from storage.objects import open_store

_FORGET_TIMEOUT_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Meshes:
    """The meshes of a run. Asking for one that was not opened raises RuntimeError."""

    generators: tuple[Mesh, ...]
    """One per replica; none where the run does not generate."""
    opened_trainer: Mesh | None
    """All ranks, if there are any."""
    opened_verifier: Mesh | None
    """The verifier, if there is one."""
    opened_weights: Mesh | None = None
    """The weight store, if there is one."""
    opened_reference: Mesh | None = None
    """The reference policy, if there is one."""
    opened_critic: Mesh | None = None
    """The critic, if there is one."""

    @property
    def trainer(self) -> Mesh:
        """All ranks of the trainer."""
        return _present("trainer", self.opened_trainer)

    @property
    def verifier(self) -> Mesh:
        """The verifier."""
        return _present("verifier", self.opened_verifier)

    @property
    def reference(self) -> Mesh:
        """The reference policy."""
        return _present("reference", self.opened_reference)

    @property
    def critic(self) -> Mesh:
        """The critic."""
        return _present("critic", self.opened_critic)

    @property
    def weights(self) -> Mesh:
        """The weight store."""
        return _present("weights", self.opened_weights)

    @property
    def store_name(self) -> str:
        """What the trainer calls the weight store, which changes when it is opened anew."""
        return weight_store_name(self.weights.openings)

    @property
    def all(self) -> tuple[Mesh, ...]:
        """Every mesh that logs intervals."""
        others = (
            self.opened_trainer,
            self.opened_reference,
            self.opened_critic,
            self.opened_verifier,
        )
        return (*self.generators, *(mesh for mesh in others if mesh is not None))

    @property
    def watched(self) -> tuple[Mesh, ...]:
        """Every mesh."""
        return (*self.all, self.opened_weights) if self.opened_weights else self.all


def weight_store_name(opening: int) -> str:
    """Name of the TorchStore that is on the weight store's processes when they are opened for the n-th time."""
    return f"weights-{opening}"


def _present(name: str, mesh: Mesh | None) -> Mesh:
    if mesh is None:
        raise RuntimeError(f"this run has no {name}")
    return mesh


def preload() -> None:
    """Import what `open_meshes` needs, which takes seconds, in which a running event loop would hear no signal."""
    os.environ.update(MONARCH_ENVIRONMENT)
    import forge_core.actors.critic
    import forge_core.actors.generator
    import forge_core.actors.reference
    import forge_core.actors.trainer
    import forge_core.actors.verifier  # noqa: F401


@asynccontextmanager
async def open_meshes(
    config: RunConfig,
    store_uri: str,
    workdir: Path,
    started_at: float,
    roles: frozenset[Role],
) -> AsyncIterator[Meshes]:
    """Spawn the meshes of some roles and their actors; stop them within the config's grace on leaving, come what may.

    `workdir` is a local folder for rendezvous files; who gave it removes it. Raises DoesNotFit and HostsUnfit, with one
    sentence for the user, and OSError if other hosts are not there in time. The meshes' clocks begin at `started_at`
    (Unix seconds), so that what precedes their first work counts as their startup. Monarch and torch are imported
    here, not with this module.
    """
    preload()
    # A fault is raised at whoever calls the failed mesh; without a hook it would also end this process.
    install_fault_hook()
    # Whatever folder a process on another host works in.
    store_uri = open_store(store_uri).uri
    # Who only scores needs no others.
    hosts = config.hosts if roles & COMPUTING else HostsConfig()
    async with open_machines(hosts, _needed_paths(config, store_uri)) as machines:
        with claimed_plan(config, machines.hosts, roles=roles) as plan:
            owned = Processes(
                plan,
                config.shutdown.grace_seconds,
                config.timeouts.startup_seconds,
                machines.meshes,
                config.log_level,
            )
            meshes = _declare(owned, config, store_uri, machines.folder or workdir, roles)
            async with _opened(meshes, owned, started_at):
                yield meshes


def _needed_paths(config: RunConfig, store_uri: str) -> list[str]:
    """What processes on other hosts read by its path, as they do."""
    model = config.model.path
    named = [model] if model is not None and not model.startswith(HUB_PREFIX) else []
    sources = [reference.rpartition(":")[0] for reference in config.user_code().values()]
    named += [source for source in sources if source.endswith(".py")]
    folder = open_store(store_uri).local_path("runs/")
    return [os.path.expanduser(path) for path in named] + ([] if folder is None else [str(folder)])


@asynccontextmanager
async def _opened(meshes: Meshes, owned: Processes, started_at: float) -> AsyncIterator[None]:
    """Meshes that are declared, opened all at the same time."""
    from forge_core.weights import store as weight_store

    try:
        await asyncio.gather(*(mesh.open(started_at) for mesh in meshes.watched))
        yield
    finally:
        try:
            if meshes.opened_weights is not None and meshes.weights.openings:
                await weight_store.forget(
                    meshes.store_name, timeout_seconds=_FORGET_TIMEOUT_SECONDS
                )
        finally:
            await owned.stop()


def _declare(
    owned: Processes, config: RunConfig, store_uri: str, folder: Path, roles: frozenset[Role]
) -> Meshes:
    """The meshes of some roles, none of them open yet; `folder` is there on the host of each."""
    from forge_core.actors.critic import Critic
    from forge_core.actors.generator import Generator
    from forge_core.actors.reference import Reference
    from forge_core.actors.trainer import Trainer
    from forge_core.actors.verifier import Verifier

    base = (config, store_uri)

    def generator(replica: int) -> Mesh:
        name = f"generator-{replica}"

        async def spawn(started_at: float) -> Any:
            processes = await owned.start(
                name, functools.partial(_generator, config, owned.grant(name))
            )
            # Its name is also that of memory which all engines of the machine see.
            rendezvous = str(folder / f"{name}-{secrets.token_hex(8)}")
            return processes.spawn(name, Generator, replica, *base, rendezvous, started_at)

        return Mesh(name, "generators", owned, spawn)

    async def spawn_trainer(started_at: float) -> Any:
        processes = await owned.start(
            "trainer", functools.partial(_process, config.trainer.threads)
        )
        # A group that has lost a rank cannot be joined again.
        rendezvous = str(folder / f"trainer-rendezvous-{trainer.openings}")
        return processes.spawn("trainer", Trainer, *base, rendezvous, started_at)

    def beside_the_trainer(name: Literal["reference", "critic"], actor: Any) -> Mesh | None:
        async def spawn(started_at: float) -> Any:
            environment = functools.partial(_process, config.trainer.threads)
            processes = await owned.start(name, environment)
            return processes.spawn(name, actor, *base, started_at)

        return Mesh(name, name, owned, spawn) if name in roles else None

    async def spawn_verifier(started_at: float) -> Any:
        processes = await owned.start("verifier", _light)
        return processes.spawn("verifier", Verifier, *base, started_at)

    async def spawn_weights(_: float) -> Any:
        return await _start_weight_store(owned, weights.openings, config)

    replicas = config.generators.replicas if "generators" in roles else 0
    trainer = Mesh("trainer", "trainer", owned, spawn_trainer)
    weights = Mesh("weights", "weights", owned, spawn_weights)
    return Meshes(
        generators=tuple(map(generator, range(replicas))),
        opened_trainer=trainer if "trainer" in roles else None,
        opened_verifier=Mesh("verifier", "verifier", owned, spawn_verifier)
        if "verifier" in roles
        else None,
        opened_weights=weights if "weights" in roles else None,
        opened_reference=beside_the_trainer("reference", Reference),
        opened_critic=beside_the_trainer("critic", Critic),
    )


async def _start_weight_store(owned: Processes, opening: int, config: RunConfig) -> None:
    """A store on processes of its own; the one before it is given up."""
    from forge_core.weights import store as weight_store

    if opening > 1:
        await weight_store.forget(
            weight_store_name(opening - 1), timeout_seconds=_FORGET_TIMEOUT_SECONDS
        )
    volume = await owned.start("weights", _light)
    await weight_store.start(
        volume, weight_store_name(opening), timeout_seconds=config.timeouts.startup_seconds
    )


def _process(threads: int, slot: Slot) -> dict[str, str]:
    return process_environment(threads, slot.gpus)


def _light(slot: Slot) -> dict[str, str]:
    return _process(1, slot)


def _generator(config: RunConfig, grant: Grant, slot: Slot) -> dict[str, str]:
    # vLLM has the processes of one engine reach each other's memory, and picks each one's GPU by its rank.
    environment = process_environment(config.generators.threads, grant.gpus)
    if config.generators.device == "cpu":
        # vLLM compiles a few small functions even in eager mode, which costs seconds at every start.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment
