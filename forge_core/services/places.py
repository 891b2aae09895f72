"""Where the processes of a replica run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge_core.placement.allocator import Allocator, Ask, Grant, Slot
from forge_core.placement.hosts import this_machine
from forge_core.services.declaration import Declaration


@dataclass(frozen=True, slots=True)
class Place:
    """What one replica was given."""

    host: Any
    """Monarch host mesh; None: this machine."""
    slots: tuple[Slot, ...]
    """Devices of each process, by rank."""


class Places:
    """Hands out what an allocator has; services that share one have no device in common.

    Example:
        places = Places(Allocator([this_machine()]))
        async with serve(Judge.options(gpus=1), places=places) as judge: ...
    """

    def __init__(
        self, allocator: Allocator | None = None, hosts: Mapping[str, Any] | None = None
    ) -> None:
        """`hosts` has the Monarch host mesh by the name of each host of the allocator, other than this machine."""
        self._allocator = allocator or Allocator([this_machine()])
        self._hosts = hosts or {}
        self._grants: dict[str, Grant] = {}

    def take(self, name: str, needs: Declaration) -> Place:
        """A place for the replica of a name. Raises DoesNotFit, a ValueError with one sentence, if there is none."""
        told = f"{needs.actor.__name__}.options(processes={needs.processes}, gpus={needs.gpus}, cores={needs.cores})"
        ask = Ask(
            name=name,
            field=told,
            processes=needs.processes,
            gpus=needs.gpus,
            cores=needs.cores,
            hosts=needs.hosts,
        )
        grant = self._grants[name] = self._allocator.take(ask)
        return Place(self._hosts.get(grant.host), grant.slots)

    def give_back(self, name: str) -> None:
        """The replica of that name has stopped."""
        if (grant := self._grants.pop(name, None)) is not None:
            self._allocator.give_back(grant)
