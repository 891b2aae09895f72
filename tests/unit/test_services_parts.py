"""The parts of a service one by one: routers, queue, restarts, budget, figures, declarations."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import World, simulate

from benchmarks.bench_services import FEW, MANY, seconds_per_request
from forge_core.services.declaration import Declaration
from forge_core.services.dispatch import Dispatch, QueuedRequest, Seat
from forge_core.services.metrics import Latencies, Rate
from forge_core.services.options import ServiceOptions
from forge_core.services.policy import faults
from forge_core.services.restarts import RestartOptions, Restarts, RetryBudget
from forge_core.services.routing import Candidate, Candidates, LeastLoaded, Request, RoundRobin
from forge_core.services.service import Service

# Routers


@dataclass(eq=False)
class Stub:
    """A candidate."""

    index: int
    load: float = 0.0
    name: str = ""
    under_way: int = 0


REQUEST = QueuedRequest(number=0, endpoint="echo")

changes = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "load", "ask"]),
        st.integers(0, 7),
        st.integers(0, 20),
    ),
    max_size=200,
)


@settings(deadline=None)
@given(changes)
def test_the_least_loaded_is_the_least_loaded_whatever_came_before(
    operations: list[tuple[str, int, int]],
) -> None:
    seats = [Stub(i) for i in range(8)]
    candidates, present, router = Candidates(), set(), LeastLoaded()
    for what, index, load in operations:
        seat = seats[index]
        if what == "add":
            candidates.add(seat)
            present.add(index)
        elif what == "remove":
            candidates.remove(seat)
            present.discard(index)
        elif what == "load":
            seat.load = float(load)
            candidates.update(seat)
        elif present:
            chosen = router.choose(candidates, REQUEST)
            assert chosen in candidates
            assert chosen.load == min(seats[i].load for i in present)
        assert [each.index for each in candidates] == sorted(present) and len(candidates) == len(
            present
        )


def test_of_equals_the_one_that_waited_longest_is_chosen() -> None:
    candidates, router = Candidates(), LeastLoaded()
    for index in range(3):
        candidates.add(Stub(index))
    chosen = []
    for _ in range(6):
        seat = router.choose(candidates, REQUEST)
        candidates.update(seat)
        chosen.append(seat.index)
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_what_a_change_of_load_left_behind_is_dropped() -> None:
    candidates, router = Candidates(), LeastLoaded()
    for index in range(4):
        candidates.add(Stub(index))
    router.choose(candidates, REQUEST)
    for number in range(10_000):
        seat = candidates[number % 4]
        seat.load = 1e6 - number
        candidates.update(seat)
    assert candidates._heap is not None and len(candidates._heap) <= 100


def test_round_robin_takes_turns_and_skips_who_has_no_room() -> None:
    candidates, router = Candidates(), RoundRobin()
    seats = [Stub(i) for i in range(4)]
    for seat in seats:
        candidates.add(seat)
    assert [router.choose(candidates, REQUEST).index for _ in range(5)] == [0, 1, 2, 3, 0]
    candidates.remove(seats[1])
    assert [router.choose(candidates, REQUEST).index for _ in range(4)] == [2, 3, 0, 2]


@pytest.mark.parametrize("router", [RoundRobin, LeastLoaded])
def test_a_request_costs_no_more_among_many_replicas(router: Any) -> None:
    """The benchmark has the bound of 1.5, on a quiet machine; here one that a linear search could not keep."""
    few = min(seconds_per_request(router(), FEW) for _ in range(3))
    many = min(seconds_per_request(router(), MANY) for _ in range(3))
    assert many < 4 * few


class ByLength:
    """A router as a user might write it: long prompts to the last replica."""

    def choose(self, candidates: Candidates, request: Request) -> Candidate:
        return candidates[-1] if len(request.args[0]) > 3 else candidates[0]


def served_by(router: Any, values: list[Any]) -> list[list[Any]]:
    """Which replica answered which values."""

    async def main() -> list[list[Any]]:
        world = World()
        async with Service.open("echo", world.make, replicas=3, router=router) as service:
            for value in values:
                await service.call("echo", value)
            return [each.calls for each in world.alive]

    calls: list[list[Any]] = simulate(main())
    return calls


def test_a_router_of_the_users_sees_the_request() -> None:
    calls = served_by(ByLength(), ["a", "long one", "b", "c"])
    assert [each.count("echo") for each in calls] == [3, 0, 1]


def test_what_a_router_raises_is_raised_by_the_call() -> None:
    class Broken:
        def choose(self, candidates: Candidates, request: Request) -> Candidate:
            raise ZeroDivisionError

    class Astray:
        def choose(self, candidates: Candidates, request: Request) -> Any:
            return Stub(0)

    with pytest.raises(ZeroDivisionError):
        served_by(Broken(), ["a"])
    with pytest.raises(ValueError, match=r"router Astray chose Stub.*none of its candidates"):
        served_by(Astray(), ["a"])


def test_what_a_router_raises_for_a_request_that_waited_is_that_requests() -> None:
    class OnceBroken:
        def choose(self, candidates: Candidates, request: Request) -> Candidate:
            if request.args[0] == "bad":
                raise ZeroDivisionError
            return candidates[0]

    async def main() -> None:
        world = World()
        options = ServiceOptions(max_under_way=1)
        async with Service.open(
            "echo", world.make, replicas=1, router=OnceBroken(), options=options
        ) as service:
            results = await asyncio.gather(
                *(service.call("echo", value) for value in ("a", "bad", "b")),
                return_exceptions=True,
            )
            assert results[0] == "a" and results[2] == "b"
            assert isinstance(results[1], ZeroDivisionError)

    simulate(main())


# The queue


events = st.lists(
    st.tuples(
        st.sampled_from(["call", "done", "fail", "open", "drain", "cancel"]),
        st.integers(0, 30),
        st.booleans(),
    ),
    max_size=120,
)


@settings(deadline=None, max_examples=60)
@given(events, st.booleans())
def test_no_request_is_lost_or_granted_twice(
    happening: list[tuple[str, int, bool]], least_loaded: bool
) -> None:
    """Any order of calls, answers, failures, restarts and cancellations."""

    async def main() -> None:
        router = LeastLoaded() if least_loaded else RoundRobin()
        dispatch = Dispatch(router, max_queued=1000, max_under_way=2, max_load=None)
        seats = [Seat(index=i, name=f"s{i}") for i in range(3)]
        numbers = itertools.count()
        waiting: dict[int, tuple[QueuedRequest, asyncio.Task[Seat]]] = {}
        held: list[QueuedRequest] = []

        async def settle() -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            for number, (request, task) in list(waiting.items()):
                if task.done():
                    del waiting[number]
                    if not task.cancelled():
                        held.append(request)

        for what, which, is_noticed in happening:
            seat = seats[which % 3]
            if what == "call":
                request = QueuedRequest(number=next(numbers), endpoint="echo", cost=which)
                if which % 4 == 0:
                    request.wants = seat
                if dispatch.take(request) is not None:
                    held.append(request)
                else:
                    task = asyncio.create_task(dispatch.wait(request, is_patient=False))
                    waiting[request.number] = request, task
            elif what == "done" and held:
                dispatch.give_back(held.pop(which % len(held)))
            elif what == "fail" or what == "drain":
                dispatch.close(seat, failed=what == "fail")
                assert all(request.queue is not seat.waiting for request, _ in waiting.values())
            elif what == "open":
                dispatch.open(seat)
            elif what == "cancel" and waiting:
                waiting[sorted(waiting)[which % len(waiting)]][1].cancel()
            if not is_noticed:  # the next thing happens before those who wait hear of this one
                continue
            await settle()
            held = [each for each in held if each.seat is None or each.life == each.seat.life]
            for each in seats:
                own = [request for request in held if request.seat is each]
                assert each.under_way == len(own) <= 2
                assert each.load == sum(request.cost for request in own)
            assert dispatch.queued == len(waiting)
            if any(each.is_serving and each.under_way < 2 for each in seats):
                assert all(request.wants is not None for request, _ in waiting.values())

        await settle()
        for seat in seats:
            dispatch.open(seat)
        while held or waiting:
            await settle()
            assert held, f"{len(waiting)} requests wait although all have room"
            dispatch.give_back(held.pop())  # nothing, if its life is over
        assert dispatch.queued == 0 and all(each.load == 0.0 for each in seats)

    simulate(main())


def test_what_a_failed_replica_leaves_waiting_keeps_its_turn() -> None:
    async def main() -> list[int]:
        dispatch = Dispatch(RoundRobin(), max_queued=10, max_under_way=1, max_load=None)
        failing, other = Seat(index=0, name="a"), Seat(index=1, name="b")
        dispatch.open(failing)
        assert dispatch.take(QueuedRequest(number=0, endpoint="echo")) is failing
        granted = []

        async def wait(request: QueuedRequest) -> None:
            await dispatch.wait(request, is_patient=False)
            granted.append(request.number)
            dispatch.give_back(request)

        own = [QueuedRequest(number=n, endpoint="echo", wants=failing) for n in (1, 3)]
        any_ = [QueuedRequest(number=n, endpoint="echo") for n in (2, 4)]
        waits = [asyncio.create_task(wait(each)) for each in (*own, *any_)]
        await asyncio.sleep(0)
        dispatch.close(failing, failed=True)
        dispatch.open(other)
        await asyncio.wait(waits)
        return granted

    assert simulate(main()) == [1, 2, 3, 4]


# Restarts and retries


def test_a_row_of_restarts_begins_at_once_then_doubles_and_ends() -> None:
    restarts = Restarts(RestartOptions(most=4, delay_seconds=1.0, longest_delay_seconds=3.0))
    waits = [restarts.after(0.0) for _ in range(5)]
    assert waits[0] == 0.0 and waits[4] is None
    for wait, least, most in zip(waits[1:4], (0.5, 1.0, 1.5), (1.5, 3.0, 4.5), strict=True):
        assert wait is not None and least <= wait <= most


def test_serving_long_enough_ends_a_row() -> None:
    restarts = Restarts(RestartOptions(most=2, sound_seconds=30.0))
    for _ in range(10):
        assert restarts.after(29.0) == 0.0
        assert restarts.after(29.0) is not None
        assert restarts.after(30.0) == 0.0
        restarts = Restarts(RestartOptions(most=2, sound_seconds=30.0))


def test_no_restart_at_all() -> None:
    assert Restarts(RestartOptions(most=0)).after(100.0) is None


def test_a_retry_budget_is_saved_up_by_calls() -> None:
    budget = RetryBudget(share=0.25, reserve=2.0)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(4):
        budget.earn()
    assert [budget.spend() for _ in range(2)] == [True, False]
    for _ in range(1000):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


# Figures


def test_percentiles_are_right_to_five_percent() -> None:
    latencies = Latencies()
    assert latencies.percentile(50) is None
    for milliseconds in range(1, 1001):
        latencies.add(milliseconds / 1000)
    for percent in (1, 50, 95, 99, 100):
        found = latencies.percentile(percent)
        assert found is not None and percent / 100 <= found <= percent / 100 * 1.05
    latencies.add(0.0)
    latencies.add(1e9)
    assert latencies.count == 1002


def test_a_rate_is_that_of_the_last_minute() -> None:
    rate = Rate()
    for second in range(100):
        for _ in range(second % 3):
            rate.add(float(second))
    assert rate.per_second(100.0, since=0.0) == pytest.approx(1.0, abs=0.05)
    assert rate.per_second(1000.0, since=0.0) == 0.0
    rate.add(1000.0)
    assert rate.per_second(1000.5, since=1000.0) == 1.0


def test_a_snapshot_can_be_a_log_entry() -> None:
    async def main() -> dict[str, Any]:
        world = World()
        options = ServiceOptions(policy="route_around")
        async with Service.open("echo", world.make, replicas=2, options=options) as service:
            await service.call("echo", 1, seconds=0.5)
            world.alive[1].die()
            await asyncio.sleep(5)
            return service.metrics().to_json()

    figures = json.loads(json.dumps(simulate(main())))
    assert (figures["name"], figures["requests"], figures["queued"]) == ("echo", 1, 0)
    first, second = figures["replicas"]
    assert 0.5 <= first["seconds_p50"] <= 0.53 and first["answered"] == 1
    assert second["restarts"] == 1 and second["failures_by_kind"] == {"died": 1}
    assert "Killed(sig=9)" in second["failures"][0]["reason"]


# Declarations


class Judge:
    """An actor class, as far as a declaration looks at it."""


def test_a_declaration_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="Judge was given replicas 0: give 1 or more"):
        Declaration(actor=Judge, replicas=0)
    with pytest.raises(ValueError, match="policy 'ignore' is none"):
        Declaration(actor=Judge, policy="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_queued 0"):
        ServiceOptions(max_queued=0)


def test_arguments_are_added_to_what_is_needed() -> None:
    declaration = Declaration(actor=Judge, gpus=1).with_arguments("model", threads=2)
    assert declaration.arguments == ("model",) and declaration.named_arguments == {"threads": 2}
    assert declaration.gpus == 1


def test_the_decorator_marks_a_class_and_those_derived_from_it() -> None:
    @faults(policy="restart")
    class Marked(Judge): ...

    class Derived(Marked): ...

    assert Derived.__fault_policy__ == "restart"  # type: ignore[attr-defined]
