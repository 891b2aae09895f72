"""Services of real actors: what calls come to, and what becomes of processes that die, freeze or hang."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
import pytest
from served import Echo, FailsToStart
from service_load import ENVIRONMENT, STACK, Way, echo, load

from forge_core.placement.allocator import Allocator, DoesNotFit
from forge_core.placement.hosts import Host
from forge_core.services.actor import RemoteError
from forge_core.services.errors import DeadlineExceeded, ReplicaFailed, ServiceFailed
from forge_core.services.fanout import Answered
from forge_core.services.fault_hook import UnhandledFault, dying_loudly, handle_faults_of
from forge_core.services.options import ServiceOptions
from forge_core.services.places import Places
from forge_core.services.restarts import RestartOptions
from forge_core.services.service import Service
from forge_core.services.serving import serve

SECONDS = 60.0
"""Longest that anything here may take, on a machine with much else to do."""


def children() -> set[int]:
    """Processes of ours that run."""
    return {
        each.pid
        for each in psutil.Process().children(recursive=True)
        if each.status() != psutil.STATUS_ZOMBIE
    }


def run(body: Callable[[Service], Awaitable[None]], declaration: Any, **how: Any) -> None:
    """The body with a service; none of its processes outlives it."""

    async def main() -> None:
        async with asyncio.timeout(120), serve(declaration, **how) as service:
            await body(service)

    before = children()
    try:
        asyncio.run(main())
    finally:
        left = [psutil.Process(pid) for pid in children() - before if psutil.pid_exists(pid)]
        _, alive = psutil.wait_procs(left, timeout=10)
        assert not alive


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def _calls(service: Service) -> None:
    assert await service.call("say", "hello") == "> hello"
    assert await service.call("say", value="by name", seconds=0.01) == "> by name"
    assert await service.fanout("given_up") == {"echo-0": Answered(0), "echo-1": Answered(0)}
    async with service.session() as session:
        pids = {await session.call("pid") for _ in range(4)}
        assert len(pids) == 1
        orders = await asyncio.gather(*(session.call("in_turn", i) for i in range(3)))
        assert orders[-1] == [0, 0, 1, 1, 2, 2], "plain endpoints run one at a time"


async def _errors(service: Service) -> None:
    with pytest.raises(ValueError, match="bad idea") as caught:
        await service.call("fail", "idea")
    assert 'raise ValueError(f"bad {how}")' in "".join(caught.value.__notes__)
    with pytest.raises(RemoteError, match=r"Unsendable: one\n(.|\n)*served.py"):
        await service.call("fail", "unsendable")
    with pytest.raises(TypeError, match="pickle"):
        await service.call("unsendable_answer")
    with pytest.raises(AttributeError, match=r"Echo has no endpoint 'shout': it has .*fail.*say"):
        await service.call("shout")
    assert all(each.restarts == 0 for each in service.metrics().replicas)


async def _giving_up(service: Service) -> None:
    async with service.session() as session:
        with pytest.raises(DeadlineExceeded, match=r"echo did not answer wait within 0.2 s"):
            await session.call("wait", timeout_seconds=0.2)
        call = asyncio.create_task(session.call("wait"))
        await asyncio.sleep(0.2)
        call.cancel()
        await asyncio.wait([call])
        async with asyncio.timeout(SECONDS):
            while await session.call("given_up") < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    await until(lambda: all(each.under_way == 0 for each in service.metrics().replicas))


async def _ends_of_a_process(service: Service) -> None:
    with pytest.raises(ReplicaFailed, match=r"echo-. failed under exit"):
        await service.call("exit", 3, attempts=1)
    [failed] = [each for each in service.metrics().replicas if each.failures]
    await until(lambda: "exited with non-zero code 3" in _last_reason(service, failed.name))
    await until(lambda: all(each.state == "serving" for each in service.metrics().replicas))
    assert await service.call("say", "again") == "> again"


def _last_reason(service: Service, name: str) -> str:
    [replica] = [each for each in service.metrics().replicas if each.name == name]
    return replica.failures[-1].reason


async def _scaling(service: Service) -> None:
    await service.scale_to(3)
    assert len(await service.fanout("pid")) == 3
    [leaving] = service.metrics().replicas[2].pids
    await service.scale_to(2)
    assert leaving is not None and leaving not in children()


def test_a_service_of_actors() -> None:
    async def body(service: Service) -> None:
        for part in (_calls, _errors, _giving_up, _ends_of_a_process, _scaling):
            await part(service)

    run(body, echo(replicas=2).with_arguments("> "))


def test_under_load_failing_replicas_are_replaced_and_each_request_is_answered_once() -> None:
    """Short form of `make prove BAR=services`, which holds the times against their bounds on a quiet machine."""
    ways: list[Way] = ["kill", "stop", "loop", "kill"]
    result = asyncio.run(load(ways, num_requests=1000, every_seconds=1.0))
    assert not result.wrong
    assert result.answers == dict.fromkeys(range(1000), 1)
    assert [blow.way for blow in result.blows] == ways
    for blow in result.blows:
        assert blow.found_seconds < (2.0 if blow.way == "kill" else 15.0), blow
        assert blow.start_seconds - blow.found_seconds < 2.0, blow
        assert blow.others_seconds < 5.0, blow


def test_the_example_loses_no_answer() -> None:
    example = STACK.parents[1] / "examples" / "own_service.py"
    environment = {**os.environ, "PYTHONPATH": str(STACK.parents[1])}
    done = subprocess.run(
        [sys.executable, example], capture_output=True, text=True, timeout=SECONDS, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "300 answers, mean score 0.67" in done.stdout


def test_an_endless_loop_that_lets_others_run_is_found_by_turns() -> None:
    async def body(service: Service) -> None:
        assert await service.call("block", 0.5, timeout_seconds=SECONDS) is None
        with pytest.raises(ReplicaFailed, match="computes without letting anything else run"):
            await service.call("loop", attempts=1, timeout_seconds=SECONDS)
        assert await service.call("say", "again", timeout_seconds=SECONDS) == "again"

    run(body, echo(turn_seconds=1.0))


def test_a_replica_of_two_processes_is_one_unit() -> None:
    async def body(service: Service) -> None:
        pids = await service.call("pid")
        assert len(set(pids)) == 2 and pids == list(service.metrics().replicas[0].pids)
        os.kill(pids[1], signal.SIGKILL)
        after = await service.call("pid", timeout_seconds=SECONDS)
        assert not set(pids) & set(after)
        await until(lambda: not set(pids) & children())

    run(body, echo(processes=2))


def test_setup_that_fails_is_raised_and_leaves_no_process() -> None:
    async def body(service: Service) -> None:
        raise AssertionError("the service opened")

    with pytest.raises(KeyError, match="no such weights"):
        run(body, FailsToStart.options(replicas=2, environment=ENVIRONMENT))


def test_fail_fast_ends_the_service_with_one_readable_error() -> None:
    async def body(service: Service) -> None:
        [pid] = service.metrics().replicas[0].pids
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(SECONDS)

    with pytest.raises(ServiceFailed) as caught:
        run(body, Echo.options(replicas=2, environment=ENVIRONMENT))
    told = str(caught.value)
    assert "echo is over: process" in told and "Killed(sig=9)" in told and "fail_fast" in told
    assert "\n" not in told


def test_a_crash_loop_ends_with_what_it_ended_of() -> None:
    async def body(service: Service) -> None:
        crashing = [asyncio.create_task(service.call("exit", 4, attempts=9)) for _ in range(2)]
        await asyncio.wait(crashing)
        await asyncio.sleep(SECONDS)

    options = ServiceOptions(restarts=RestartOptions(most=1, delay_seconds=0.0))
    with pytest.raises(ServiceFailed, match=r"exited with non-zero code 4.*the last of 2 failures"):
        run(body, echo(), options=options)


def test_replicas_have_devices_of_their_own_and_give_them_back() -> None:
    places = Places(Allocator([Host(name="h", cores=(0, 1), gpus=("5", "6"), memory_bytes=None)]))

    async def body(service: Service) -> None:
        cores = [each.value for each in (await service.fanout("where")).values()]
        assert cores == [((0,), "5", "1"), ((1,), "6", "1")]
        with pytest.raises(DoesNotFit, match="GPU"):
            await service.scale_to(3)
        [pid] = service.metrics().replicas[0].pids
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: service.metrics().replicas[0].restarts == 1)
        await until(lambda: service.metrics().replicas[0].state == "serving")
        assert (await service.fanout("where"))["echo-0"] == Answered(((0,), "5", "1"))

    run(body, echo(replicas=2, cores=1, gpus=1), places=places)
    assert not places._allocator.grants


def test_only_faults_that_nobody_handles_end_the_program() -> None:
    from monarch.actor import this_host

    async def main() -> None:
        raw = this_host().spawn_procs(per_host={"procs": 1}, name="raw")
        try:
            actors = raw.spawn("raw", Echo)
            handled = this_host().spawn_procs(per_host={"procs": 1}, name="handled")
            handle_faults_of("somebodys")
            others = handled.spawn("somebodys", Echo)
            async with asyncio.timeout(SECONDS):
                pids = [await each.pid.call_one() for each in (others, actors)]
            async with asyncio.timeout(120), serve(echo()) as service, dying_loudly():
                [served] = service.metrics().replicas[0].pids
                assert served is not None
                os.kill(served, signal.SIGKILL)
                os.kill(pids[0], signal.SIGKILL)
                assert await service.call("say", "on", timeout_seconds=SECONDS) == "on"
                await asyncio.sleep(2.0)  # time for reports
                reached.append("the faults that are handled are survived")
                os.kill(pids[1], signal.SIGKILL)
                await asyncio.sleep(SECONDS)
        finally:
            for mesh in (raw, handled):
                async with asyncio.timeout(SECONDS):
                    await mesh.stop("test ended")

    reached: list[str] = []
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = ENVIRONMENT["PYTHONPATH"]
    try:
        with pytest.raises(UnhandledFault, match=r"mesh raw-\w+: .*Killed\(sig=9\)"):
            asyncio.run(main())
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    assert reached
