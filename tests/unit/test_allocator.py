"""The allocator: whatever is taken and given back, nothing is handed out twice, refused without need, or lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_core.placement.allocator import Allocator, Ask, DoesNotFit, Grant
from forge_core.placement.hosts import Host

hosts = st.lists(
    st.builds(
        lambda cores, gpus, memory: (tuple(range(cores)), tuple(map(str, range(gpus))), memory),
        st.integers(0, 6),
        st.integers(0, 4),
        st.one_of(st.none(), st.integers(0, 40)),
    ),
    min_size=1,
    max_size=3,
).map(
    lambda found: [
        Host(name=f"host-{i}", cores=cores, gpus=gpus, memory_bytes=memory)
        for i, (cores, gpus, memory) in enumerate(found)
    ]
)


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    turn = draw(st.sampled_from([None, "one", "other"]))
    memory = draw(st.integers(0, 10))
    return Ask(
        name="",
        field="some.field 1",
        processes=draw(st.integers(1, 3)),
        gpus=draw(st.integers(0, 2)),
        cores=draw(st.integers(0, 2)),
        memory_bytes=memory,
        resting_bytes=draw(st.integers(0, memory)),
        turn=turn,
        lets_go=turn is not None and draw(st.booleans()),
    )


# Each either takes something or gives back what was taken so many takes ago.
moves = st.lists(st.one_of(asks(), st.integers(0, 20)), max_size=25)


def _named(ask: Ask, index: int) -> Ask:
    return Ask(**{f: getattr(ask, f) for f in Ask.__dataclass_fields__} | {"name": f"mesh-{index}"})


def _differ(one: Ask, other: Ask) -> bool:
    return one.turn is not None and other.turn is not None and one.turn != other.turn


def _check(hosts: list[Host], grants: list[Grant]) -> None:
    """What must hold of everything that is held, said without the allocator's own code."""
    for host in hosts:
        here = [grant for grant in grants if grant.host == host.name]
        for grant in here:
            assert set(grant.gpus) <= set(host.gpus) and set(grant.cores) <= set(host.cores)
            assert len(set(grant.gpus)) == grant.ask.processes * grant.ask.gpus
            assert len(set(grant.cores)) == grant.ask.processes * grant.ask.cores
        for one, other in itertools.combinations(here, 2):
            if not _differ(one.ask, other.ask):
                assert not set(one.cores) & set(other.cores)
                assert not set(one.gpus) & set(other.gpus)
            elif not (one.ask.lets_go and other.ask.lets_go):
                assert not set(one.gpus) & set(other.gpus)
        for turn in ("one", "other"):
            held = sum(
                a.processes
                * (a.memory_bytes if a.turn == turn or not a.lets_go else a.resting_bytes)
                for a in (grant.ask for grant in here)
            )
            assert host.memory_bytes is None or held <= host.memory_bytes


def _could_take(hosts: list[Host], grants: list[Grant], ask: Ask) -> bool:
    """Whether some host has room, found by trying."""
    for host in hosts:
        here = [grant for grant in grants if grant.host == host.name]
        cores = set(host.cores)
        gpus = set(host.gpus)
        for grant in here:
            if not _differ(grant.ask, ask):
                cores -= set(grant.cores)
            if not (_differ(grant.ask, ask) and grant.ask.lets_go and ask.lets_go):
                gpus -= set(grant.gpus)
        held = [
            sum(
                a.processes
                * (a.memory_bytes if a.turn == turn or not a.lets_go else a.resting_bytes)
                for a in (*(grant.ask for grant in here), ask)
            )
            for turn in ("one", "other")
        ]
        if (
            len(cores) >= ask.processes * ask.cores
            and len(gpus) >= ask.processes * ask.gpus
            and (host.memory_bytes is None or max(held) <= host.memory_bytes)
        ):
            return True
    return False


@settings(max_examples=400, deadline=None)
@given(hosts, moves)
def test_nothing_is_handed_out_twice_refused_without_need_or_lost(
    hosts: list[Host], moves: list[Ask | int]
) -> None:
    allocator = Allocator(hosts)
    held: list[Grant] = []
    for index, move in enumerate(moves):
        if isinstance(move, int):
            if move < len(held):
                given_back = held.pop(move)
                allocator.give_back(given_back)
                assert _could_take(hosts, held, given_back.ask)
        else:
            ask = _named(move, index)
            possible = _could_take(hosts, held, ask)
            try:
                held.append(allocator.take(ask))
            except DoesNotFit as refusal:
                assert not possible
                assert len(str(refusal).splitlines()) == 1
            else:
                assert possible
        assert list(allocator.grants) == held
        _check(hosts, held)


@settings(max_examples=200, deadline=None)
@given(hosts, st.lists(asks(), max_size=6))
def test_several_are_taken_together_or_not_at_all(hosts: list[Host], wanted: list[Ask]) -> None:
    allocator = Allocator(hosts)
    named = [_named(ask, i) for i, ask in enumerate(wanted)]
    try:
        grants = allocator.take_all(named)
    except DoesNotFit:
        assert allocator.grants == ()
    else:
        assert [grant.ask for grant in grants] == named
        _check(hosts, grants)
        for grant in grants:
            allocator.give_back(grant)
        assert allocator.take_all(named) == grants


HOST = Host(name="h", cores=(0, 1, 2, 3), gpus=("4", "5"), memory_bytes=2 * 2**30)


def _refusal(hosts: list[Host], *wanted: Ask) -> str:
    with pytest.raises(DoesNotFit) as caught:
        Allocator(hosts).take_all(wanted)
    return str(caught.value)


def test_a_refusal_adds_up_what_is_asked_for() -> None:
    gpus = [
        Ask(name="t", field="trainer.ranks 2", processes=2, gpus=1),
        Ask(name="g-0", field="generators.replicas 2", gpus=1),
        Ask(name="g-1", field="generators.replicas 2", gpus=1),
    ]
    assert _refusal([HOST], *gpus) == (
        "generators.replicas 2 + trainer.ranks 2 on device cuda ask for 4 GPUs and there are 2: "
        "lower them, or set the device to cpu"
    )
    assert _refusal([HOST], Ask(name="t", field="trainer.ranks 5", processes=5, cores=1)) == (
        "trainer.ranks 5 asks for 5 cores and 4 are free: lower them, or set core_binding to auto"
    )
    assert _refusal([HOST], Ask(name="t", field="t", memory_bytes=3 * 2**30)).startswith(
        "h has 2.0 GiB of memory and the run needs about 3.0 GiB: lower "
    )


def test_a_mesh_lies_on_one_host() -> None:
    others = [HOST, Host(name="i", cores=(), gpus=("0", "1"), memory_bytes=None)]
    wanted = Ask(name="g", field="generators.replicas 1 x tensor_parallel 4", processes=4, gpus=1)
    assert "asks for 4 GPUs on one host, where no more than 2 are left" in _refusal(others, wanted)


def test_large_asks_find_room_beside_small_ones() -> None:
    small = Host(name="s", cores=(), gpus=("0",), memory_bytes=None)
    allocator = Allocator([HOST, small])
    assert allocator.take(Ask(name="one", field="f", gpus=1)).host == "s"
    assert allocator.take(Ask(name="two", field="f", processes=2, gpus=1)).host == "h"
