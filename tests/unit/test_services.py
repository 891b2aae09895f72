"""Services over simulated replicas, in simulated time: what a call comes to, whatever replicas do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from simulated import World, simulate

from forge_core.services.errors import (
    DeadlineExceeded,
    Overloaded,
    ReplicaFailed,
    ServiceFailed,
)
from forge_core.services.fanout import Answered, Failed
from forge_core.services.health import HealthOptions
from forge_core.services.options import ServiceOptions
from forge_core.services.replica import State
from forge_core.services.restarts import RestartOptions
from forge_core.services.routing import LeastLoaded, RoundRobin
from forge_core.services.service import Service, _ended_by
from forge_core.services.supervision import Transition

OPTIONS = ServiceOptions(
    policy="route_around",
    health=HealthOptions(interval_seconds=0.5, unseen_seconds=3.0),
    restarts=RestartOptions(most=3, delay_seconds=0.1, sound_seconds=30.0),
    max_under_way=4,
)

Body = Callable[[Service, World], Awaitable[Any]]


def run(body: Body, *, replicas: int = 4, world: World | None = None, **options: Any) -> World:
    """The body, with a service of simulated replicas."""
    world = world or World()
    more = {name: options.pop(name) for name in ("router", "prepare", "tell") if name in options}

    async def main() -> None:
        async with Service.open(
            "echo", world.make, replicas=replicas, options=replace(OPTIONS, **options), **more
        ) as service:
            await body(service, world)
        assert all(each.is_stopped for each in world.made)

    simulate(main())
    return world


def now() -> float:
    return asyncio.get_running_loop().time()


# Calls


def test_every_call_is_answered_once_and_by_all_replicas() -> None:
    async def body(service: Service, world: World) -> None:
        answers = await asyncio.gather(*(service.call("echo", i) for i in range(100)))
        assert answers == list(range(100))
        assert set(world.answers.values()) == {1}
        figures = service.metrics()
        assert [each.answered for each in figures.replicas] == [25, 25, 25, 25]
        assert figures.requests == 100 and figures.queued == 0 and figures.queued_most == 84

    run(body)


def test_what_an_endpoint_raises_is_its_callers_and_harms_nobody() -> None:
    async def body(service: Service, world: World) -> None:
        for error in (
            ValueError("bad"),
            TimeoutError("own"),
            RuntimeError("own"),
            ReplicaFailed("own"),
        ):
            with pytest.raises(type(error)) as caught:
                await service.call("fail", error)
            assert caught.value is error
        assert await service.call("echo", 1) == 1
        figures = service.metrics()
        assert sum(each.errors for each in figures.replicas) == 4
        assert figures.retries == 0 and len(world.made) == 4

    run(body)


def test_a_late_call_says_where_it_was_and_its_replica_gives_it_up() -> None:
    async def body(service: Service, world: World) -> None:
        with pytest.raises(
            DeadlineExceeded, match=r"echo did not answer forever within 2 s; it was with echo-0"
        ):
            await service.call("forever", timeout_seconds=2.0)
        await asyncio.sleep(0.1)
        assert world.cancelled == [0] and service.metrics().late == 1
        assert len(world.made) == 1, "no replica was restarted"

        blockers = [
            asyncio.create_task(service.call("forever", timeout_seconds=9)) for _ in range(4)
        ]
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match="it was in the queue"):
            await service.call("echo", 1, timeout_seconds=2.0)
        for blocker in blockers:
            blocker.cancel()
        await asyncio.wait(blockers)
        assert await service.call("echo", 2, timeout_seconds=2.0) == 2

    run(body, replicas=1)


def test_a_cancelled_call_is_cancelled_in_its_replica() -> None:
    async def body(service: Service, world: World) -> None:
        calls = [asyncio.create_task(service.call("forever")) for _ in range(6)]
        await asyncio.sleep(0.1)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)
        await asyncio.sleep(0.1)
        assert sorted(world.cancelled) == [0, 1, 2, 3], "two never got there"
        figures = service.metrics()
        assert figures.queued == 0 and figures.replicas[0].under_way == 0

    run(body, replicas=1)


def test_what_a_replica_does_not_give_up_keeps_its_place_until_the_replica_is_replaced() -> None:
    async def body(service: Service, world: World) -> None:
        for _ in range(4):
            with pytest.raises(DeadlineExceeded):
                await service.call("deaf", 100.0, timeout_seconds=1.0)
        assert service.metrics().replicas[0].under_way == 4
        began = now()
        assert await service.call("echo", 1) == 1
        assert 1.0 < now() - began < 6.0
        [failure] = service.metrics().replicas[0].failures
        assert failure.kind == "deaf"
        assert "echo-0 did not give deaf up, 5 s after its deadline" in failure.reason

    run(body, replicas=1)


def test_a_replica_may_take_until_the_deadline_to_give_up_what_its_caller_cancelled() -> None:
    async def body(service: Service, world: World) -> None:
        call = asyncio.create_task(service.call("deaf", 20.0, timeout_seconds=30.0))
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.sleep(60)
        assert service.metrics().replicas[0].failures == ()
        assert service.metrics().replicas[0].under_way == 0

    run(body, replicas=1)


# The queue


def test_a_full_queue_refuses_and_a_patient_call_waits() -> None:
    async def body(service: Service, world: World) -> None:
        calls = [asyncio.create_task(service.call("echo", i, seconds=1)) for i in range(7)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 requests are queued, of at most 3"):
            await service.call("echo", 7)
        patient = asyncio.create_task(service.call("echo", 8, seconds=1, patient=True))
        with pytest.raises(DeadlineExceeded):
            await service.call("echo", 9, patient=True, timeout_seconds=0.5)
        assert await asyncio.gather(*calls, patient) == [*range(7), 8]
        assert world.answers[7] == world.answers[9] == 0
        figures = service.metrics()
        assert (figures.overloaded, figures.late, figures.queued) == (1, 1, 0)
        assert figures.queued_most == 3

    run(body, replicas=1, max_queued=3)


def test_requests_are_answered_in_the_order_in_which_they_came() -> None:
    async def body(service: Service, world: World) -> None:
        ended: list[int] = []

        async def one(i: int) -> None:
            await service.call("echo", i)
            ended.append(i)

        await asyncio.gather(*(one(i) for i in range(50)))
        assert ended == list(range(50))

    run(body, replicas=1, max_under_way=1)


def test_a_replica_gets_no_more_than_its_load() -> None:
    async def body(service: Service, world: World) -> None:
        calls = [
            asyncio.create_task(service.call("echo", i, seconds=1, cost=50.0)) for i in range(4)
        ]
        await asyncio.sleep(0.1)
        [only] = service.metrics().replicas
        assert (only.under_way, only.load) == (2, 100.0)
        await asyncio.wait(calls)
        assert service.metrics().replicas[0].load == 0.0

    run(body, replicas=1, max_load=100.0, max_under_way=100)


# Failures


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_replica_that_fails_is_replaced_and_nobody_notices(how: str) -> None:
    async def body(service: Service, world: World) -> None:
        calls = [asyncio.create_task(service.call("echo", i, seconds=0.2)) for i in range(40)]
        await asyncio.sleep(0.1)
        getattr(world.alive[1], how)()
        assert await asyncio.gather(*calls) == list(range(40))
        # One that died before it answered may have done the work, or not.
        assert set(world.answers.values()) == {1}
        await asyncio.sleep(5)
        failed = service.metrics().replicas[1]
        assert failed.state == "serving" and failed.restarts == 1
        [failure] = failed.failures
        assert failure.requests == failed.lost == 4 and failure.down_seconds is not None
        assert failure.down_seconds < 1.0
        assert service.metrics().retries == 4

    run(body, max_under_way=4)


def test_the_last_replicas_callers_wait_for_its_restart() -> None:
    async def body(service: Service, world: World) -> None:
        world.start_seconds = 10.0
        world.alive[0].die()
        began = now()
        assert await service.call("echo", 1) == 1
        assert 9.0 < now() - began < 12.0
        world.alive[0].die()
        with pytest.raises(DeadlineExceeded):
            await service.call("echo", 2, timeout_seconds=5.0)

    run(body, replicas=1)


def test_a_request_that_kills_what_it_touches_is_given_up() -> None:
    async def body(service: Service, world: World) -> None:
        async def kill() -> None:
            while True:
                await asyncio.sleep(0.05)
                for each in world.alive:
                    if each._running:
                        each.die()

        killer = asyncio.create_task(kill())
        with pytest.raises(ReplicaFailed, match="the last of 3 attempts"):
            await service.call("forever")
        killer.cancel()
        assert service.metrics().retries == 2
        assert await service.call("echo", 1) == 1

    run(body)


def test_a_call_that_must_not_be_repeated_is_not() -> None:
    async def body(service: Service, world: World) -> None:
        call = asyncio.create_task(service.call("echo", 1, seconds=1, attempts=1))
        await asyncio.sleep(0.1)
        world.alive[0].die()
        with pytest.raises(
            ReplicaFailed, match=r"echo-0 failed under echo: process 0 of echo-0: Killed"
        ):
            await call
        assert world.answers[1] == 0 and service.metrics().retries == 0

    run(body)


def test_retries_have_a_budget() -> None:
    async def body(service: Service, world: World) -> None:
        calls = [asyncio.create_task(service.call("forever")) for _ in range(4)]
        await asyncio.sleep(0.1)
        world.alive[0].die()
        done, waiting = await asyncio.wait(calls, timeout=10)
        assert len(done) == 2 and len(waiting) == 2
        for each in done:
            assert "no further attempts to spare" in str(each.exception())
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)

    run(body, replicas=1, retry_share=0.0, retry_reserve=2.0)


def test_with_restart_a_replica_does_again_what_it_was_doing() -> None:
    async def body(service: Service, world: World) -> None:
        calls = [asyncio.create_task(service.call("echo", i, seconds=1)) for i in range(4)]
        await asyncio.sleep(0.1)
        world.start_seconds = 5.0
        world.alive[2].die()
        done, waiting = await asyncio.wait(calls, timeout=4.0)
        assert len(done) == 3 and waiting == {calls[2]}
        assert await calls[2] == 2
        assert world.alive[2].name == "echo-2-r1" and world.alive[2].calls == ["setup", "echo"]

    run(body, policy="restart", health=HealthOptions(interval_seconds=0.1))


def test_fail_fast_ends_the_service_with_the_failure() -> None:
    async def body(service: Service, world: World) -> None:
        calls = [asyncio.create_task(service.call("forever")) for _ in range(20)]
        await asyncio.sleep(1)
        world.alive[0].die()
        try:
            await asyncio.sleep(100)
        finally:
            assert now() < 3.0, "the body was not cancelled at once"
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(each) for each in results} == {ServiceFailed}

    world = World()
    with pytest.raises(ServiceFailed, match=r"echo is over: .*echo-0.*Killed\(sig=9\).*fail_fast"):
        run(body, world=world, policy="fail_fast")
    assert len(world.made) == 4 and all(each.is_stopped for each in world.made)


def test_a_crash_loop_ends_with_its_cause() -> None:
    started: list[float] = []

    async def body(service: Service, world: World) -> None:
        world.failing_starts = 1000
        world.alive[0].die()
        await asyncio.sleep(1000)

    def tell(transition: Transition) -> None:
        if transition.state is State.STARTING:
            started.append(asyncio.get_running_loop().time())

    with pytest.raises(ServiceFailed, match=r"the last of 4 failures in a row") as caught:
        run(body, replicas=1, tell=tell)
    assert "echo-0-r3 has no room" in str(caught.value.__cause__)
    assert len(started) == 4
    waits = [b - a for a, b in itertools.pairwise(started[1:])]
    # Each start takes 0.1 s; then 0.1, 0.2 s, give or take a half.
    assert 0.15 <= waits[0] <= 0.25 and 0.2 <= waits[1] <= 0.4


def test_routing_around_goes_on_without_a_replica_that_does_not_come_back() -> None:
    async def body(service: Service, world: World) -> None:
        world.failing_starts = 4
        world.alive[0].die()
        await asyncio.sleep(100)
        assert [each.state for each in service.metrics().replicas] == ["failed", "serving"]
        assert await asyncio.gather(*(service.call("echo", i) for i in range(9))) == [*range(9)]
        world.failing_starts = 4
        world.alive[0].die()
        await asyncio.sleep(100)

    with pytest.raises(ServiceFailed, match="has no room"):
        run(body, replicas=2)


def test_failures_far_apart_are_no_row() -> None:
    async def body(service: Service, world: World) -> None:
        for _ in range(20):
            await asyncio.sleep(31)
            world.alive[0].die()
        await asyncio.sleep(5)
        assert await service.call("echo", 1) == 1
        assert service.metrics().replicas[0].restarts == 20

    run(body, replicas=1)


def test_setup_that_raises_at_the_first_start_is_raised_as_it_is() -> None:
    async def prepare(replica: Any) -> None:
        raise KeyError("weights")

    async def body(service: Service, world: World) -> None:
        raise AssertionError("the service opened")

    world = World()
    with pytest.raises(KeyError, match="weights"):
        run(body, world=world, prepare=prepare)
    assert all(each.is_stopped for each in world.made)


def test_a_replica_that_restarts_serves_only_once_it_is_prepared() -> None:
    gate = asyncio.Event()
    gate.set()

    async def prepare(replica: Any) -> None:
        replica.calls.append("prepare")
        await gate.wait()

    async def body(service: Service, world: World) -> None:
        gate.clear()
        world.alive[0].die()
        await asyncio.sleep(20)
        assert service.metrics().replicas[0].state == "starting"
        call = asyncio.create_task(service.call("echo", 1))
        await asyncio.sleep(1)
        assert not call.done()
        gate.set()
        assert await call == 1
        assert world.alive[0].calls == ["setup", "prepare", "echo"]

    run(body, replicas=1, prepare=prepare)


def test_a_replica_that_dies_while_it_prepares_is_found_at_once() -> None:
    prepared = [0]

    async def prepare(replica: Any) -> None:
        prepared[0] += 1
        if prepared[0] == 2:
            replica.die()
            await asyncio.sleep(1000)

    async def body(service: Service, world: World) -> None:
        world.alive[0].die()
        began = now()
        assert await service.call("echo", 1) == 1
        assert now() - began < 3.0 and len(world.made) == 3

    run(body, replicas=1, prepare=prepare)


def test_what_failed_under_a_request_goes_before_what_waited_behind_it() -> None:
    async def body(service: Service, world: World) -> None:
        ended: list[int] = []

        async def one(i: int) -> None:
            await service.call("echo", i, seconds=0.5)
            ended.append(i)

        calls = [asyncio.create_task(one(i)) for i in range(4)]
        await asyncio.sleep(0.1)
        world.start_seconds = 5.0
        world.alive[0].die()
        await asyncio.wait(calls)
        assert ended == [0, 1, 2, 3]

    run(body, replicas=1, max_under_way=1)


def test_a_replica_that_fails_between_grant_and_call_is_not_called() -> None:
    class Spoiler:
        """Lets the replica fail once it has been granted to what waits."""

        def choose(self, candidates: Any, request: Any) -> Any:
            if request.args[0] == "second":
                spoil()
            return candidates[0]

    def spoil() -> None:
        nonlocal spoil
        asyncio.get_running_loop().call_soon(lambda: dispatch[0].close(seat[0], failed=True))
        spoil = int  # type: ignore[assignment]

    dispatch: list[Any] = []
    seat: list[Any] = []

    async def body(service: Service, world: World) -> None:
        dispatch.append(service._dispatch)
        seat.extend(service._crew.supervisors)
        calls = [asyncio.create_task(service.call("echo", word)) for word in ("first", "second")]
        await asyncio.sleep(1)
        assert calls[0].done() and not calls[1].done() and world.answers["second"] == 0
        dispatch[0].open(seat[0])
        assert await calls[1] == "second"

    run(body, replicas=1, max_under_way=1, router=Spoiler())


# The end of a service


def over_with(error: ServiceFailed, body: Callable[[asyncio.Future[Any]], Awaitable[Any]]) -> None:
    """A body that `error` may end, and whatever comes after it, which it must not reach."""

    async def main() -> None:
        over: asyncio.Future[ServiceFailed] = asyncio.get_running_loop().create_future()
        try:
            async with _ended_by(over):
                await body(over)
        finally:
            if not over.done():
                over.set_result(error)
            for _ in range(3):
                await asyncio.sleep(0)

    simulate(main())


def test_the_end_of_a_service_ends_its_body_and_nothing_after_it() -> None:
    error = ServiceFailed("over")

    async def waits(over: asyncio.Future[Any]) -> None:
        asyncio.get_running_loop().call_later(1.0, over.set_result, error)
        await asyncio.sleep(100)

    async def ends_first(over: asyncio.Future[Any]) -> None:
        pass

    async def ends_with_it(over: asyncio.Future[Any]) -> None:
        over.set_result(error)

    async def notices_too_late(over: asyncio.Future[Any]) -> None:
        over.set_result(error)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)

    async def raises_itself(over: asyncio.Future[Any]) -> None:
        over.set_result(error)
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            raise KeyError("own") from None

    over_with(error, ends_first)
    for body in (waits, ends_with_it, notices_too_late):
        with pytest.raises(ServiceFailed, match="over"):
            over_with(error, body)
    with pytest.raises(KeyError, match="own"):
        over_with(error, raises_itself)


def test_who_cancels_a_body_whose_service_ends_gets_a_cancellation() -> None:
    async def main() -> None:
        over: asyncio.Future[ServiceFailed] = asyncio.get_running_loop().create_future()

        async def body() -> None:
            async with _ended_by(over):
                await asyncio.sleep(100)

        task = asyncio.create_task(body())
        await asyncio.sleep(1)
        task.cancel()
        over.set_result(ServiceFailed("over"))
        await asyncio.wait([task])
        assert task.cancelled()

    simulate(main())


# Sessions


def test_a_session_stays_with_its_replica_and_says_when_it_moves() -> None:
    async def body(service: Service, world: World) -> None:
        moved: list[str] = []

        async def on_move(session: Any) -> None:
            moved.append(session.replica)
            await session.call("echo", "history")

        async with service.session(on_move=on_move) as session, service.session() as other:
            for i in range(5):
                await session.call("echo", i)
                await other.call("echo", i)
            assert (session.replica, other.replica) == ("echo-0", "echo-1")
            assert service.metrics().sessions == 2
            first = world.alive[0]
            assert first.calls.count("echo") == 5 and session.moves == 0
            first.die()
            await asyncio.sleep(1)
            assert await session.call("echo", "next") == "next"
            assert session.moves == 1 and other.moves == 0
            assert moved == [session.replica] and world.answers["history"] == 1
            holder = next(
                each for each in world.alive if each.name.removesuffix("-r1") == session.replica
            )
            assert holder.calls[-2:] == ["echo", "echo"]
            assert service.metrics().moved_sessions == 1
        with pytest.raises(RuntimeError, match="closed"):
            await session.call("echo", 1)

    run(body)


def test_calls_of_a_session_that_begin_together_go_to_one_replica() -> None:
    async def body(service: Service, world: World) -> None:
        async with service.session() as session:
            await asyncio.gather(*(session.call("echo", i) for i in range(20)))
        assert sorted(each.calls.count("echo") for each in world.alive) == [0, 0, 0, 20]

    run(body)


def test_a_session_waits_for_its_own_replica_while_others_are_free() -> None:
    async def body(service: Service, world: World) -> None:
        async with service.session() as session:
            calls = [asyncio.create_task(session.call("echo", i, seconds=1)) for i in range(8)]
            await asyncio.sleep(0.5)
            assert await service.call("echo", "free") == "free"
            assert not any(call.done() for call in calls)
            await asyncio.gather(*calls)

    run(body)


# Fan-out and scaling


def test_fan_out_has_an_outcome_for_each_replica() -> None:
    async def body(service: Service, world: World) -> None:
        assert await service.fanout("echo", 1) == {f"echo-{i}": Answered(1) for i in range(4)}
        error = ValueError("bad")
        outcomes = await service.fanout("fail", error)
        assert outcomes == {f"echo-{i}": Failed(error) for i in range(4)}
        world.start_seconds = 50.0
        world.alive[1].die()
        await asyncio.sleep(1)
        fanning = asyncio.create_task(service.fanout("forever", timeout_seconds=5.0))
        await asyncio.sleep(0.1)
        world.alive[1].die()  # echo-2
        outcomes = await fanning
        told = {name: str(outcome.error) for name, outcome in outcomes.items()}
        assert told["echo-0"] == "echo-0 did not answer forever within 5 s"
        assert told["echo-1"] == "echo-1 does not serve: it is starting"
        assert "echo-2 failed under forever" in told["echo-2"]
        await asyncio.sleep(1)
        assert len(world.cancelled) == 2

    run(body)


def test_scaling_down_drains_and_scaling_up_waits() -> None:
    async def body(service: Service, world: World) -> None:
        calls = [asyncio.create_task(service.call("echo", i, seconds=5)) for i in range(16)]
        await asyncio.sleep(0.1)
        began = now()
        scaling = asyncio.create_task(service.scale_to(1))
        await asyncio.sleep(0.1)
        states = [each.state for each in service.metrics().replicas]
        assert states == ["serving", "draining", "draining", "draining"]
        await scaling
        assert 4.0 < now() - began < 6.0
        assert await asyncio.gather(*calls) == list(range(16))
        assert service.metrics().retries == 0 and len(service.metrics().replicas) == 1
        await service.scale_to(3)
        assert [each.name for each in service.metrics().replicas] == ["echo-0", "echo-1", "echo-2"]
        await asyncio.gather(*(service.call("echo", i) for i in range(12)))
        assert [each.answered for each in service.metrics().replicas][1:] == [4, 4]
        with pytest.raises(ValueError, match="cannot have 0 replicas"):
            await service.scale_to(0)

    run(body)


def test_a_drain_that_takes_too_long_moves_what_is_left() -> None:
    async def body(service: Service, world: World) -> None:
        await service.call("echo", "to the first")
        call = asyncio.create_task(service.call("echo", 1, seconds=100.0, timeout_seconds=1000.0))
        await asyncio.sleep(0.1)
        began = now()
        await service.scale_to(1)
        assert now() - began < 25.0
        assert await call == 1 and world.answers[1] == 1

    run(body, replicas=2, drain_seconds=20.0)


def test_a_replica_that_cannot_join_is_gone_again() -> None:
    async def body(service: Service, world: World) -> None:
        world.failing_starts = 100
        with pytest.raises(ServiceFailed, match="has no room"):
            await service.scale_to(5)
        assert len(service.metrics().replicas) == 4
        assert await service.call("echo", 1) == 1

    run(body)


def test_leaving_ends_what_is_under_way() -> None:
    async def body(service: Service, world: World) -> None:
        calls.extend(asyncio.create_task(service.call("forever")) for _ in range(20))
        await asyncio.sleep(1)

    calls: list[asyncio.Task[Any]] = []

    async def main() -> None:
        world = World()
        async with Service.open("echo", world.make, replicas=4, options=OPTIONS) as service:
            await body(service, world)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(each) for each in results} == {ServiceFailed}, results
        with pytest.raises(ServiceFailed, match="is closed"):
            await service.call("echo", 1)

    simulate(main())


@pytest.mark.parametrize("router", [RoundRobin(), LeastLoaded()])
def test_both_routers_survive_failures(router: Any) -> None:
    async def body(service: Service, world: World) -> None:
        calls = [asyncio.create_task(service.call("echo", i, seconds=0.3)) for i in range(200)]
        for _ in range(6):
            await asyncio.sleep(0.2)
            world.alive[0].die()
        assert await asyncio.gather(*calls) == list(range(200))

    run(body, router=router, restarts=RestartOptions(most=50))
