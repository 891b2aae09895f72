"""Cores that no two runs of one machine are bound to at the same time.

A claim is a socket in Linux's abstract namespace, named after the core: it belongs to whoever bound it first, ends with
that process however it ends, and leaves no file.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from forge_core.config import RunConfig
from forge_core.placement import memory
from forge_core.placement.hosts import THIS_MACHINE, Host
from forge_core.placement.plan import Plan, make_plan
from forge_core.placement.roles import Role

logger = logging.getLogger(__name__)

PREFIX = "forgeflow-core-"
"""Before the number of a core, in the name of its claim."""


@contextmanager
def claimed_plan(
    config: RunConfig, hosts: Sequence[Host], *, roles: frozenset[Role] | None = None
) -> Iterator[Plan]:
    """The plan of a run whose cores of this machine are its own while the context lasts. Raises DoesNotFit."""
    shape = memory.model_shape(config)
    plan = make_plan(config, hosts, roles=roles, shape=shape)
    of_grants = [g.cores for g in plan.grants.values() if g.host == THIS_MACHINE]
    number = len({core for cores in of_grants for core in cores})
    with contextlib.ExitStack() as claims:
        if number:
            free = [
                claims.enter_context(claimed_cores(host, number))
                if host.name == THIS_MACHINE
                else host
                for host in hosts
            ]
            plan = make_plan(config, free, roles=roles, shape=shape)
        if plan.unbound is not None:
            logger.warning("no process is bound to cores: %s", plan.unbound)
        yield plan


@contextmanager
def claimed_cores(host: Host, number: int) -> Iterator[Host]:
    """This machine with only `number` cores, claimed while the context lasts; with none if other runs left fewer."""
    with contextlib.ExitStack() as claims:
        cores: list[int] = []
        for core in host.cores:
            if len(cores) == number:
                break
            if (claim := _claim(core)) is not None:
                claims.enter_context(claim)
                cores.append(core)
        if len(cores) < number:
            claims.close()
            cores = []
        yield replace(host, cores=tuple(cores))


def _claim(core: int) -> socket.socket | None:
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0{PREFIX}{core}")
    except OSError:
        claim.close()
        return None
    return claim
