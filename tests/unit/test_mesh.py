"""A run's mesh: what calls come to when its processes fail, and what is counted of it; its actors are not there."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, cast

import monarch.actor
import pytest
from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError
from monarch.actor import ActorError

from forge_core.mesh import Mesh, MeshCall
from forge_core.processes import Processes
from forge_core.services import fault_hook

SECONDS = 20.0


class Message:
    """Monarch's future of one that is answered when a test says so."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def as_asyncio(self) -> asyncio.Future[Any]:
        return self.answer


class Actors:
    """One endpoint, `work`, which keeps the messages that it was sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    @property
    def work(self) -> Actors:
        return self

    def call(self, *args: Any) -> Message:
        self.sent.append(Message())
        return self.sent[-1]

    async def got(self, number: int) -> Message:
        """The message of that number, once it is there."""
        async with asyncio.timeout(SECONDS):
            while len(self.sent) <= number:  # noqa: ASYNC110
                await asyncio.sleep(0)
        return self.sent[number]


class Lives(dict[str, Any]):
    """Processes that end when told."""

    async def end(self, name: str) -> None:
        self.pop(name)


@dataclasses.dataclass
class Fault:
    mesh_name: str

    def report(self) -> str:
        return "a process died"


class Named:
    def __init__(self, name: str) -> None:
        self.name, self.pids = name, (None,)


async def opened() -> tuple[Mesh, list[Actors]]:
    """A mesh, and the actors of each of its openings."""
    lives, actors = Lives(), []

    async def spawn(_: float) -> Actors:
        lives["m"] = Named("m")
        actors.append(Actors())
        return actors[-1]

    mesh = Mesh("m", "generators", cast(Processes, lives), spawn)
    await mesh.open(0.0)
    return mesh, actors


def call(mesh: Mesh, seconds: float = SECONDS, load: float = 0.0) -> asyncio.Task[list[Any]]:
    return asyncio.create_task(mesh.call("work", timeout_seconds=seconds, load=load))


def test_calls_are_counted_by_how_they_end() -> None:
    async def body() -> None:
        mesh, [actors] = await opened()
        answered, raising, given_up = (call(mesh, load=8.0) for _ in range(3))
        (await actors.got(0)).answer.set_result({0: "a", 1: "b"})
        assert await answered == ["a", "b"]
        (await actors.got(1)).answer.set_exception(ActorError(ValueError("bad"), "there"))
        with pytest.raises(ValueError, match="bad") as caught:
            await raising
        assert "raised in m, endpoint work" in caught.value.__notes__[0]
        await actors.got(2)
        assert (mesh.under_way, mesh.load) == (1, 8.0)
        given_up.cancel()
        await asyncio.wait([given_up])
        mesh.produce(12)
        did = mesh.snapshot()
        assert (did.answered, did.errors, did.cancelled, did.lost) == (1, 1, 1, 0)
        assert (did.under_way, did.load, did.restarts, did.produced) == (0, 0.0, 0, 12)
        assert not mesh.has_failed()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("happens", "told"),
    [
        (lambda mesh, message: mesh.fail("process 7 of m ended"), "process 7 of m ended"),
        (
            lambda mesh, message: message.answer.set_exception(
                SupervisionError("The actor <x> have failed: killed")
            ),
            "killed",
        ),
    ],
)
def test_a_failure_ends_the_calls_under_way_and_those_to_come(
    happens: Callable[[Mesh, Message], None], told: str
) -> None:
    async def body() -> None:
        mesh, actors = await opened()
        first = call(mesh)
        happens(mesh, await actors[0].got(0))
        with pytest.raises(MeshCall, match=told):
            await first
        with pytest.raises(MeshCall, match=f"m has failed: {told}"):
            await mesh.call("work", timeout_seconds=SECONDS)
        await mesh.reopen()
        with pytest.raises(MeshCall, match="has failed"):
            await mesh.call("work", timeout_seconds=SECONDS)
        with mesh.preparing():
            preparing = call(mesh)
        (await actors[1].got(0)).answer.set_result({0: "ready"})
        assert await preparing == ["ready"]
        mesh.serve()
        did = mesh.snapshot()
        assert (did.lost, did.restarts, did.answered) == (1, 1, 1)
        assert did.failures[0].down_seconds is not None

    asyncio.run(body())


def test_a_missed_deadline_fails_the_mesh_and_a_timeout_of_the_endpoint_does_not() -> None:
    async def body() -> None:
        mesh, [actors] = await opened()
        own = call(mesh)
        (await actors.got(0)).answer.set_exception(ActorError(TimeoutError("the store's"), "there"))
        with pytest.raises(TimeoutError, match="the store's"):
            await own
        assert not mesh.has_failed()
        started = time.monotonic()
        with pytest.raises(MeshCall, match=r"did not answer work within 0\.05 s"):
            await mesh.call("work", timeout_seconds=0.05)
        assert mesh.has_failed() and time.monotonic() - started < SECONDS

    asyncio.run(body())


def test_an_endpoint_that_met_a_dead_process_does_not_fail_its_own_mesh() -> None:
    async def body() -> None:
        mesh, [actors] = await opened()
        asking = call(mesh)
        met = ActorError(SupervisionError("have failed: the store is dead"), "there")
        (await actors.got(0)).answer.set_exception(met)
        with pytest.raises(MeshCall, match="the store is dead"):
            await asking
        assert not mesh.has_failed()

    asyncio.run(body())


def test_a_failure_of_processes_that_were_replaced_is_none_of_their_successors() -> None:
    async def body() -> None:
        mesh, actors = await opened()
        late = call(mesh)
        message = await actors[0].got(0)
        mesh.fail("killed")
        with contextlib.suppress(MeshCall):
            await late
        await mesh.reopen()
        mesh.serve()
        assert message.answer.cancelled()
        again = call(mesh)
        (await actors[1].got(0)).answer.set_result({0: 1})
        assert await again == [1]
        assert not mesh.has_failed()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("mesh_name", "is_handled"),
    [
        ("generator-0-h3X", True),
        ("storagevolumes_ade13293-s89qAzonmZm", True),
        ("logger-h3X", True),
        ("generator-1-h3X", False),
        ("somebodys-h3X", False),
    ],
)
def test_a_fault_of_what_is_watched_is_told_from_others_by_monarchs_name(
    mesh_name: str, is_handled: bool, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(fault_hook, "_handled", fault_hook._Handled())
    monkeypatch.setattr(monarch.actor, "unhandled_fault_hook", None)
    fault_hook.install_fault_hook()
    fault_hook.handle_faults_of("generator-0", "StorageVolumes")
    with caplog.at_level(logging.ERROR):
        monarch.actor.unhandled_fault_hook(Fault(mesh_name))
    assert bool(caplog.records) != is_handled
