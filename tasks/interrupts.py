"""A signal that ends a run does so in order: as a cancellation, wherever the event loop stands."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import FrameType

from storage.contract import hurry


@asynccontextmanager
async def cancelled_by(
    number: signal.Signals, *, first: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[None]:
    """Have a signal cancel the current task, and hand it on to the handler before once the context is left.

    What is to be done `first` is awaited before the task is cancelled; it bounds its own time and raises nothing.

    Prefect's own handler of SIGTERM raises in the midst of whatever runs, which may be the writing of an entry; with
    this it raises when the run has been left in order. Does nothing outside the main thread, which alone is told of
    signals.
    """
    task = asyncio.current_task()
    if task is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    caught: list[int] = []
    leaving: list[asyncio.Task[None]] = []

    async def leave() -> None:
        if first is not None:
            await first()
        if not task.cancelling():
            task.cancel()

    def cancel() -> None:
        # Once: a second cancellation would break off the leaving itself.
        if not leaving and not task.cancelling():
            leaving.append(asyncio.create_task(leave()))

    def handler(caught_number: int, frame: FrameType | None) -> None:
        caught.append(caught_number)
        # The loop may be held up by a store that waits for its server.
        hurry.set()
        loop.call_soon_threadsafe(cancel)

    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)
        for each in leaving:
            each.cancel()
        if caught and callable(previous):
            previous(number, None)
