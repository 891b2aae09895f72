"""Services of actors: each replica a mesh of processes of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from forge_core.process_environment import prepare_for_monarch
from forge_core.services.declaration import Declaration
from forge_core.services.options import ServiceOptions
from forge_core.services.places import Places
from forge_core.services.policy import Policy
from forge_core.services.routing import Router
from forge_core.services.service import Service
from forge_core.services.supervision import Prepare, Transition


@asynccontextmanager
async def serve(
    declaration: Declaration,
    *,
    name: str | None = None,
    router: Router | None = None,
    options: ServiceOptions | None = None,
    prepare: Prepare | None = None,
    tell: Callable[[Transition], None] | None = None,
    places: Places | None = None,
) -> AsyncIterator[Service]:
    """Spawn, set up, watch and serve the replicas of an actor; stop them on leaving. See `Service.open`.

    The policy is that of the declaration, or else that of the actor's class, or else that of `options`.
    Without `places`, devices are those of this machine, and no other service knows of what this one has.
    `name`, which is the class's unless given, must be that of no other service of this process.
    """
    prepare_for_monarch()
    from forge_core.services.fault_hook import install_fault_hook
    from forge_core.services.monarch_replica import MonarchReplica

    install_fault_hook()
    options = options or ServiceOptions()
    policy: Policy = getattr(declaration.actor, "__fault_policy__", options.policy)
    policy = declaration.policy or policy
    turn_seconds = (
        options.turn_seconds if declaration.turn_seconds is None else declaration.turn_seconds
    )
    options = dataclasses.replace(options, policy=policy, turn_seconds=turn_seconds)
    where = places or Places()

    def make(replica: str) -> MonarchReplica:
        return MonarchReplica(replica, declaration, where, startup_seconds=options.startup_seconds)

    async with Service.open(
        name or declaration.actor.__name__.lower(),
        make,
        replicas=declaration.replicas,
        router=router,
        options=options,
        prepare=prepare,
        tell=tell,
    ) as service:
        yield service
