"""The allocator: who holds which GPUs, cores and memory of which host.

    ask ──take──▶ grant ──give_back──▶ free again
         └─ DoesNotFit, one sentence

Two grants are *busy together* unless each has a turn and the turns differ: a synchronous run's generators and its
trainer never work at the same time. Grants that are busy together have no core in common. No two grants have a GPU in
common, and the memory of all of them counts, unless both let go of what they hold while it is another's turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from forge_core.placement.hosts import Host

Resource = Literal["GPU", "core", "byte"]

_GIB = 2**30
_MENDS: dict[Resource, str] = {
    "GPU": "lower them, or set the device to cpu",
    "core": "lower them, or set core_binding to auto",
}


class DoesNotFit(ValueError):
    """What was asked for is more than there is; the message is one sentence for the user."""

    def __init__(self, resource: Resource, sentence: str) -> None:
        super().__init__(sentence)
        self.resource = resource


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What the processes of one mesh need. All of them lie on one host."""

    name: str
    """Name of the mesh."""
    field: str
    """What of the config asks for it, such as `generators.replicas 3`."""
    processes: int = 1
    """Number of processes."""
    gpus: int = 0
    """GPUs of each process."""
    cores: int = 0
    """Cores that each process is bound to; 0: it runs on any."""
    memory_bytes: int = 0
    """Host memory of each process."""
    resting_bytes: int = 0
    """Host memory that each process keeps while it lets go."""
    memory_mend: str = "lower it"
    """What to change where the memory is too little."""
    turn: str | None = None
    """When it is busy; None: at any time."""
    lets_go: bool = False
    """Whether it gives up its GPUs and its memory, but for `resting_bytes`, while it is another's turn."""
    hosts: tuple[str, ...] | None = None
    """Names of the hosts that it may lie on; None: any."""

    def __post_init__(self) -> None:
        assert self.turn is not None or not self.lets_go, "to let go one must have a turn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What one process has."""

    gpus: tuple[str, ...]
    """Names of its GPUs."""
    cores: tuple[int, ...]
    """Cores that it is bound to; empty: any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What one mesh holds until it is given back."""

    ask: Ask
    """What it was asked with."""
    host: str
    """Name of the host."""
    slots: tuple[Slot, ...]
    """One per process."""

    @property
    def gpus(self) -> tuple[str, ...]:
        """Names of all its GPUs."""
        return tuple(gpu for slot in self.slots for gpu in slot.gpus)

    @property
    def cores(self) -> tuple[int, ...]:
        """All cores that its processes are bound to."""
        return tuple(core for slot in self.slots for core in slot.cores)


class Allocator:
    """Hands out what some hosts have.

    Example:
        allocator = Allocator([this_machine()])
        grant = allocator.take(Ask(name="trainer", field="trainer.ranks 2", processes=2, cores=1))
        ...
        allocator.give_back(grant)
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = {host.name: host for host in hosts}
        assert len(self._hosts) == len(hosts) > 0, "hosts have names of their own"
        self._grants: dict[str, Grant] = {}

    @property
    def grants(self) -> tuple[Grant, ...]:
        """What is held now."""
        return tuple(self._grants.values())

    def take(self, ask: Ask) -> Grant:
        """Reserve what a mesh asks for. Raises DoesNotFit, and holds nothing for it then."""
        (grant,) = self.take_all([ask])
        return grant

    def take_all(self, asks: Sequence[Ask]) -> list[Grant]:
        """Reserve what several meshes ask for, in order; all of it or nothing. Raises DoesNotFit."""
        taken: list[Grant] = []
        try:
            for ask in asks:
                grant = self._place(ask, others=[each for each in asks if each is not ask])
                self._grants[ask.name] = grant
                taken.append(grant)
        except DoesNotFit:
            for grant in taken:
                self.give_back(grant)
            raise
        return taken

    def give_back(self, grant: Grant) -> None:
        """Free what a mesh held; harmless if it was given back."""
        if self._grants.get(grant.ask.name) is grant:
            del self._grants[grant.ask.name]

    def _place(self, ask: Ask, others: Sequence[Ask]) -> Grant:
        assert ask.name not in self._grants, f"{ask.name} holds what it was granted already"
        candidates = [h for h in self._hosts.values() if ask.hosts is None or h.name in ask.hosts]
        assert candidates, f"{ask.name} may lie on none of the hosts"
        for host in sorted(candidates, key=lambda host: self._preference(host, ask)):
            gpus, cores = self._free_gpus(host, ask), self._free_cores(host, ask)
            if (
                len(gpus) >= ask.processes * ask.gpus
                and len(cores) >= ask.processes * ask.cores
                and self._fits_memory(host, ask)
            ):
                slots = tuple(
                    Slot(
                        gpus=gpus[rank * ask.gpus : (rank + 1) * ask.gpus],
                        cores=cores[rank * ask.cores : (rank + 1) * ask.cores],
                    )
                    for rank in range(ask.processes)
                )
                return Grant(ask=ask, host=host.name, slots=slots)
        raise self._refusal(ask, candidates, others)

    def _preference(self, host: Host, ask: Ask) -> tuple[int, int, int]:
        """Lowest first: few GPUs left, so that large asks still find room; many cores; few processes."""
        return (
            len(self._free_gpus(host, ask)) if ask.gpus else 0,
            -len(self._free_cores(host, ask)) if ask.cores else 0,
            sum(grant.ask.processes for grant in self._on(host)),
        )

    def _on(self, host: Host) -> list[Grant]:
        return [grant for grant in self._grants.values() if grant.host == host.name]

    def _asks_on(self, host: Host) -> list[Ask]:
        return [grant.ask for grant in self._on(host)]

    def _free_gpus(self, host: Host, ask: Ask) -> tuple[str, ...]:
        held = {g for each in self._on(host) if not _alternate(each.ask, ask) for g in each.gpus}
        return tuple(gpu for gpu in host.gpus if gpu not in held)

    def _free_cores(self, host: Host, ask: Ask) -> tuple[int, ...]:
        held = {c for each in self._on(host) if _busy_together(each.ask, ask) for c in each.cores}
        return tuple(core for core in host.cores if core not in held)

    def _fits_memory(self, host: Host, ask: Ask) -> bool:
        needed = peak_bytes([*self._asks_on(host), ask])
        return host.memory_bytes is None or needed <= host.memory_bytes

    def _refusal(self, ask: Ask, hosts: Sequence[Host], others: Sequence[Ask]) -> DoesNotFit:
        """Why no host has room, with everything in the sentence that asks for the same."""
        free_gpus = max(len(self._free_gpus(host, ask)) for host in hosts)
        if free_gpus < ask.processes * ask.gpus:
            rivals = [each for each in self._rivals(others) if not _alternate(each, ask)]
            total = sum(len(host.gpus) for host in hosts)
            return _too_many("GPU", [*rivals, ask], total, free_gpus)
        hosts = [h for h in hosts if len(self._free_gpus(h, ask)) >= ask.processes * ask.gpus]
        free_cores = max(len(self._free_cores(host, ask)) for host in hosts)
        if free_cores < ask.processes * ask.cores:
            rivals = [each for each in self._rivals(others) if _busy_together(each, ask)]
            total = sum(len(host.cores) for host in hosts)
            return _too_many("core", [*rivals, ask], total, free_cores)
        hosts = [h for h in hosts if len(self._free_cores(h, ask)) >= ask.processes * ask.cores]
        host = max(hosts, key=lambda each: each.memory_bytes or 0)
        # On the only host all of it would lie.
        rivals = self._rivals(others) if len(self._hosts) == 1 else self._asks_on(host)
        needed = peak_bytes([*rivals, ask])
        assert host.memory_bytes is not None
        return DoesNotFit(
            "byte",
            f"{host.name} has {host.memory_bytes / _GIB:.1f} GiB of memory and the run needs about "
            f"{needed / _GIB:.1f} GiB: {ask.memory_mend}",
        )

    def _rivals(self, others: Sequence[Ask]) -> list[Ask]:
        held = {grant.ask.name: grant.ask for grant in self._grants.values()}
        return list({**held, **{each.name: each for each in others}}.values())


def peak_bytes(asks: Sequence[Ask]) -> int:
    """Most memory that meshes on one host hold at a time."""
    return sum(memory_by_mesh(asks).values())


def memory_by_mesh(asks: Sequence[Ask]) -> dict[str, int]:
    """What each of some meshes on one host holds in the turn in which they hold most together."""
    turns = {ask.turn for ask in asks if ask.lets_go} or {None}
    of_turns = [{ask.name: ask.processes * _held(ask, turn) for ask in asks} for turn in turns]
    return max(of_turns, key=lambda held: sum(held.values()))


def _held(ask: Ask, turn: str | None) -> int:
    return ask.resting_bytes if ask.lets_go and ask.turn != turn else ask.memory_bytes


def _busy_together(one: Ask, other: Ask) -> bool:
    return one.turn is None or other.turn is None or one.turn == other.turn


def _alternate(one: Ask, other: Ask) -> bool:
    """Whether they hold their devices one after the other."""
    return one.lets_go and other.lets_go and not _busy_together(one, other)


def _too_many(resource: Resource, asks: Sequence[Ask], total: int, free: int) -> DoesNotFit:
    """The sentence about GPUs or cores; the last ask is the one that did not fit."""

    def each(ask: Ask) -> int:
        return ask.gpus if resource == "GPU" else ask.cores

    asking = [ask for ask in asks if each(ask)]
    needed = sum(ask.processes * each(ask) for ask in asking)
    fields, last = sorted({ask.field for ask in asking}), asking[-1]
    of_device = " on device cuda" if resource == "GPU" else ""
    if needed > total:
        verb = "ask" if len(fields) > 1 else "asks"
        there = f"there are {total}" if resource == "GPU" else f"{total} are free"
        sentence = f"{' + '.join(fields)}{of_device} {verb} for {needed} {resource}s and {there}"
    else:
        sentence = (
            f"{last.field}{of_device} asks for {last.processes * each(last)} {resource}s on one host, where no more "
            f"than {free} are left"
        )
    return DoesNotFit(resource, f"{sentence}: {_MENDS[resource]}")
