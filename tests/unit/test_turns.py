"""Turns of colocated meshes: never both sides at a time, each told to sleep and wake once, and what goes wrong."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forge_core.actors.messages import HeldMemory, TurnReply
from forge_core.mesh import MeshCall
from tasks.run import ActiveRun
from tasks.turns import MemoryExceeded, Turns, turn

GIB = 2**30


@dataclass(eq=False)
class FakeMesh:
    """Answers `sleep` and `wake`, and remembers what it was asked."""

    name: str
    told: list[str]
    openings: int = 1
    failure: str | None = None
    awake_bytes: int = 3 * GIB
    asleep_bytes: int = GIB
    calls: list[str] = field(default_factory=list)

    def has_failed(self) -> bool:
        return self.failure is not None

    async def call(self, endpoint: str, *args: Any, timeout_seconds: float) -> list[Any]:
        await asyncio.sleep(0)
        if self.failure is not None:
            raise MeshCall(f"mesh {self.name} has failed: {self.failure}")
        self.told.append(f"{self.name} {endpoint}")
        awake = _held(self.awake_bytes)
        asleep = _held(self.asleep_bytes)
        before, after = (awake, asleep) if endpoint == "sleep" else (asleep, awake)
        return [TurnReply(before=before, after=after, intervals=())]


def _held(size: int) -> HeldMemory:
    return HeldMemory(bytes=size, peak_bytes=size, total_bytes=10 * GIB, is_of_device=False)


def _run(told: list[str], *, memory_fraction: float = 0.9) -> Any:
    generators = (FakeMesh("generator-0", told), FakeMesh("generator-1", told))
    run = SimpleNamespace(
        config=SimpleNamespace(
            timeouts=SimpleNamespace(call_seconds=5.0), memory_fraction=memory_fraction
        ),
        meshes=SimpleNamespace(generators=generators, trainer=FakeMesh("trainer", told)),
        put=None,
        append=lambda *facts: None,
        intervals=lambda mesh, intervals: None,
    )

    async def load(run: ActiveRun, mesh: Any) -> None:
        if run.put is not None:
            told.append(f"{mesh.name} load")

    run.turns = Turns(cast(ActiveRun, run), load)
    return run


def test_one_side_sleeps_before_the_other_wakes() -> None:
    told: list[str] = []
    run = _run(told)

    async def go() -> None:
        for side in ("generators", "trainer", "trainer", "generators"):
            async with turn(run, side):
                told.append(side)

    asyncio.run(go())
    assert told == [
        "trainer sleep", "generators",
        "generator-0 sleep", "generator-1 sleep", "trainer wake", "trainer",
        "trainer",
        "trainer sleep", "generator-0 wake", "generator-1 wake", "generators",
    ]  # fmt: skip


def test_sides_wait_for_each_other_and_those_of_one_side_do_not() -> None:
    run = _run([])
    inside: dict[str, int] = {"generators": 0, "trainer": 0}
    together = 0

    async def work(side: Any) -> None:
        nonlocal together
        async with turn(run, side):
            inside[side] += 1
            assert not (inside["generators"] and inside["trainer"])
            together = max(together, inside[side])
            await asyncio.sleep(0.001)
            inside[side] -= 1

    async def go() -> None:
        await asyncio.gather(*(work(s) for s in ["trainer", "generators", "trainer"] * 5))

    asyncio.run(go())
    assert together == 10


def test_a_side_that_fails_inside_leaves_its_turn() -> None:
    run = _run([])

    async def go() -> None:
        with pytest.raises(KeyError):
            async with turn(run, "trainer"):
                raise KeyError
        async with asyncio.timeout(1), turn(run, "generators"):
            pass

    asyncio.run(go())


def test_generators_that_woke_are_given_the_newest_weights_unless_they_get_them_otherwise() -> None:
    told: list[str] = []
    run = _run(told)

    async def go() -> None:
        async with turn(run, "generators"):
            pass
        async with turn(run, "trainer"):
            run.put = SimpleNamespace(manifest="v1")
        async with turn(run, "generators"):
            assert told[-2:] == ["generator-0 load", "generator-1 load"]
        async with turn(run, "trainer"):
            pass
        async with turn(run, "generators", weights=False):
            assert told[-1] == "generator-1 wake"
            run.turns.loaded()
        async with turn(run, "generators"):
            assert told[-1] == "generator-1 wake"

    asyncio.run(go())


def test_a_dead_mesh_holds_nothing_and_its_successor_is_awake() -> None:
    told: list[str] = []
    run = _run(told)
    dead = run.meshes.generators[1]

    async def go() -> None:
        async with turn(run, "generators"):
            dead.failure = "killed"
        async with turn(run, "trainer"):
            assert told[-2:] == ["generator-0 sleep", "trainer wake"]
            dead.failure, dead.openings = None, 2
        told.clear()
        async with turn(run, "generators"):
            assert told == ["trainer sleep", "generator-0 wake"]
        async with turn(run, "trainer"):
            assert "generator-1 sleep" in told

    asyncio.run(go())


def test_who_holds_more_than_is_allowed_ends_the_run() -> None:
    """Two generators of 3 GiB beside a sleeping trainer of 1 GiB, of 10 GiB."""
    for allowed, is_enough in ((0.7, True), (0.69, False)):
        run = _run([], memory_fraction=allowed)

        async def go(run: Any = run) -> None:
            async with turn(run, "trainer"):
                pass
            async with turn(run, "generators"):
                pass
            async with turn(run, "trainer"):
                pass

        if is_enough:
            asyncio.run(go())
            assert run.turns.figures() == {"turns/number": 3.0, "turns/held_share": 0.7}
            assert run.turns.figures() == {"turns/number": 0.0, "turns/held_share": 0.0}
        else:
            with pytest.raises(MemoryExceeded, match=r"held 7.00 GiB of 10.00 GiB .* 0\.69"):
                asyncio.run(go())


def test_meshes_that_lie_apart_take_no_turns() -> None:
    told: list[str] = []
    run = _run(told)
    run.turns = None

    async def go() -> None:
        async with turn(run, "trainer"), turn(run, "generators"):
            pass

    asyncio.run(go())
    assert told == []
