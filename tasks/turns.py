"""Turns of colocated meshes: generators and trainer share devices, and one side sleeps while the other works.

    generators' turn ──▶ they sleep: weights and cache given up ──▶ trainer wakes ──▶ trainer's turn ──▶ …

A turn lasts while any stage is in it; one of the other side waits for them to leave. Those of one side may be in it
together, such as a stage and the recovery of a mesh that it waits for. Where meshes lie apart there are no turns.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from forge_core.actors.messages import HeldMemory, TurnReply
from forge_core.mesh import Mesh, MeshCall

if TYPE_CHECKING:
    from tasks.run import ActiveRun

P = ParamSpec("P")
R = TypeVar("R")

Side = Literal["generators", "trainer"]

_GIB = 2**30


class MemoryExceeded(RuntimeError):
    """Trainer and generators held more together than the config allows; trying again would not mend it."""


class Turns:
    """Whose turn it is, and who sleeps."""

    def __init__(self, run: ActiveRun, load: Callable[[ActiveRun, Mesh], Awaitable[None]]) -> None:
        """`load` has a generator load the newest weights."""
        self._run = run
        self._load = load
        self._side: Side | None = None
        self._num_inside = 0
        self._left = asyncio.Event()
        self._switching = asyncio.Lock()
        self._asleep: set[tuple[str, int]] = set()
        """Meshes that sleep, each with the number of its opening: its successor is awake."""
        self._bare: set[tuple[str, int]] = set()
        """Generators that have no weights since they woke."""
        self._held: dict[str, list[HeldMemory]] = {}
        """By mesh, what its processes held when they fell asleep."""
        self._num_turns = 0
        self._largest_share = 0.0

    @asynccontextmanager
    async def of(self, side: Side, *, weights: bool = True) -> AsyncIterator[None]:
        """Inside, the side is awake and the other asleep; with `weights`, generators have the newest that were put.

        Raises MemoryExceeded if both held more together, in the turn that ends, than the config allows.
        """
        while self._num_inside and self._side != side:
            await self._left.wait()
        self._side = side
        self._num_inside += 1
        self._left.clear()
        try:
            async with self._switching:
                await self._switch(side)
                if weights and side == "generators":
                    await self._load_weights()
            yield
        finally:
            self._num_inside -= 1
            if not self._num_inside:
                self._left.set()

    def loaded(self) -> None:
        """All generators have been given weights by other means."""
        self._bare.clear()

    def figures(self) -> dict[str, float]:
        """Metrics of the turns since this was asked before."""
        told = {"turns/number": float(self._num_turns), "turns/held_share": self._largest_share}
        self._num_turns, self._largest_share = 0, 0.0
        return told

    def _meshes(self, side: Side) -> tuple[Mesh, ...]:
        meshes = self._run.meshes
        return meshes.generators if side == "generators" else (meshes.trainer,)

    async def _switch(self, side: Side) -> None:
        other: Side = "trainer" if side == "generators" else "generators"
        tired = [mesh for mesh in self._meshes(other) if not self._sleeps(mesh)]
        rested = [mesh for mesh in self._meshes(side) if self._sleeps(mesh)]
        if tired:
            replies = await asyncio.gather(*(self._turn(mesh, "sleep") for mesh in tired))
            self._asleep |= {_key(mesh) for mesh in tired}
            self._check_memory(dict(zip(tired, replies, strict=True)), self._meshes(side))
        if rested:
            if side == "generators":
                self._bare |= {_key(mesh) for mesh in rested}
            await asyncio.gather(*(self._turn(mesh, "wake") for mesh in rested))
            self._asleep -= {_key(mesh) for mesh in rested}
        self._num_turns += bool(tired or rested)

    def _sleeps(self, mesh: Mesh) -> bool:
        return _key(mesh) in self._asleep

    async def _turn(self, mesh: Mesh, what: str) -> list[TurnReply]:
        """Have every process of a mesh fall asleep or wake; one that has failed holds nothing, and is not asked."""
        try:
            replies: list[TurnReply] = await mesh.call(
                what, timeout_seconds=self._run.config.timeouts.call_seconds
            )
        except MeshCall:
            if not mesh.has_failed():
                raise
            self._held.pop(mesh.name, None)
            return []
        self._held[mesh.name] = [reply.after for reply in replies]
        self._run.append(self._run.intervals(mesh.name, replies[0].intervals))
        return replies

    async def _load_weights(self) -> None:
        for mesh in self._meshes("generators"):
            if _key(mesh) in self._bare:
                try:
                    await self._load(self._run, mesh)
                except MeshCall:
                    if not mesh.has_failed():
                        raise
                self._bare.discard(_key(mesh))

    def _check_memory(
        self, fell_asleep: dict[Mesh, list[TurnReply]], asleep: tuple[Mesh, ...]
    ) -> None:
        """Hold what both sides held in the turn that ends against the config."""
        worked = [reply.before for replies in fell_asleep.values() for reply in replies]
        rested = [held for mesh in asleep for held in self._held.get(mesh.name, [])]
        if not worked:
            return
        total = min(held.total_bytes for held in worked)
        if worked[0].is_of_device:
            together = max(held.peak_bytes for held in worked)
        else:
            together = sum(held.peak_bytes for held in worked) + sum(held.bytes for held in rested)
        self._largest_share = max(self._largest_share, together / total)
        allowed = self._run.config.memory_fraction
        if together > allowed * total:
            raise MemoryExceeded(
                f"colocated trainer and generators held {together / _GIB:.2f} GiB of {total / _GIB:.2f} GiB together, "
                f"above memory_fraction {allowed:g}: raise it, or lower generators.kv_cache_gib, "
                "generators.gpu_memory_fraction or trainer.micro_batch_tokens"
            )


def _key(mesh: Mesh) -> tuple[str, int]:
    return mesh.name, mesh.openings


@asynccontextmanager
async def turn(run: ActiveRun, side: Side, *, weights: bool = True) -> AsyncIterator[None]:
    """See `Turns.of`; nothing where meshes lie apart."""
    if run.turns is None:
        yield
    else:
        async with run.turns.of(side, weights=weights):
            yield


def in_turn(
    side: Side, *, weights: bool = True
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
    """Have an async function of the current run, such as a stage, run in a side's turn."""

    def decorate(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        @functools.wraps(function)
        async def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            # Deferred: a run has turns.
            from tasks.run import current

            async with turn(current(), side, weights=weights):
                return await function(*args, **kwargs)

        return inside

    return decorate
