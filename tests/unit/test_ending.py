"""SIGTERM lets the trainer's step end, then cancels, and keeps nothing of a step that does not end in time."""

import asyncio
import os
import signal
import time

import pytest

from tasks.ending import Ending
from tasks.interrupts import cancelled_by


async def _ended_by_sigterm(ending: Ending, step_seconds: float) -> list[str]:
    """What a run did whose step takes so long, when the signal comes in the midst of it."""
    did: list[str] = []
    try:
        async with cancelled_by(signal.SIGTERM, first=ending.let_step_end):
            for number in (1, 2):
                async with ending.during_a_step():
                    did.append(f"begins {number}")
                    if number == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    await asyncio.sleep(step_seconds)
                did.append(f"ends {number}")
    except asyncio.CancelledError:
        did.append("keeps" if ending.may_keep_state else "gives up")
    return did


@pytest.fixture(autouse=True)
def _heard() -> object:
    """The signal is handed on to a handler that does nothing."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_step_under_way_ends_and_none_begins() -> None:
    ending = Ending(grace_seconds=30.0)
    assert asyncio.run(_ended_by_sigterm(ending, 0.05)) == ["begins 1", "ends 1", "keeps"]
    assert 0.0 < ending.seconds_left < 30.0


def test_a_step_that_outlasts_the_grace_is_given_up() -> None:
    began = time.monotonic()
    ending = Ending(grace_seconds=0.05)
    assert asyncio.run(_ended_by_sigterm(ending, 60.0)) == ["begins 1", "gives up"]
    assert ending.seconds_left == 0.0 and time.monotonic() - began < 30.0


def test_between_steps_it_ends_at_once() -> None:
    async def waiting() -> bool:
        ending = Ending(grace_seconds=30.0)
        try:
            async with cancelled_by(signal.SIGTERM, first=ending.let_step_end):
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            return ending.may_keep_state
        return False

    assert asyncio.run(waiting())


def test_a_step_that_fails_leaves_the_trainer_between_steps() -> None:
    async def failing() -> bool:
        ending = Ending(grace_seconds=30.0)
        with pytest.raises(RuntimeError):
            async with ending.during_a_step():
                raise RuntimeError
        await ending.let_step_end()
        return ending.may_keep_state

    assert asyncio.run(failing())
