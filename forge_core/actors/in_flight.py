"""Groups that one engine generates over many calls, begun at any time and collected as they finish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from forge_core.actors.messages import DrawnPrompt
from forge_core.rollout import Episode

if TYPE_CHECKING:
    from forge_core.actors.engine import Engine


class OpenGroup:
    """One group under way: a task per sample."""

    def __init__(
        self, drawn: DrawnPrompt, start: Callable[[], Sequence[asyncio.Task[Episode]]]
    ) -> None:
        self.drawn = drawn
        self._start = start
        self._begin()

    def _begin(self) -> None:
        self._tasks = self._start()
        self._left = len(self._tasks)
        self._started_at = time.monotonic()
        self.finished_at: float | None = None
        """On the monotonic clock; None while a sample is under way."""
        self.failure: BaseException | None = None
        """What the first sample that failed raised."""
        for task in self._tasks:
            task.add_done_callback(self._note)

    async def begin_again(self) -> None:
        """Give up what its samples came to, and begin anew with the same seeds."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._begin()

    def _note(self, task: asyncio.Task[Episode]) -> None:
        self._left -= 1
        if not task.cancelled() and self.failure is None:
            self.failure = task.exception()
        if self._left == 0:
            self.finished_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """From its begin to its last token."""
        assert self.finished_at is not None
        return self.finished_at - self._started_at

    @property
    def episodes(self) -> list[Episode]:
        """Its samples, in order, once it is finished."""
        return [task.result() for task in self._tasks]


class InFlight:
    """What is under way in an engine. Weights may be swapped between any two calls."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._groups: dict[str, OpenGroup] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._groups

    def begin(
        self, drawn: DrawnPrompt, start: Callable[[], Sequence[asyncio.Task[Episode]]]
    ) -> None:
        """Take a group in, whose tasks `start` starts; they get on whenever the engine is driven."""
        self._groups[drawn.group_id] = OpenGroup(drawn, start)

    async def advance(
        self, *, part_groups: int, budget_seconds: float, hold_seconds: float
    ) -> list[OpenGroup]:
        """Drive the engine; groups that are to be stored now, in the order in which they were begun.

        Returns when `part_groups` are finished or nothing is under way any more, and after `budget_seconds` in any
        case: then with nothing, unless the oldest finished group has waited for `hold_seconds`. What is returned stays
        until `forget`. Raises what a sample raised; asked again, it begins that sample's group again.
        """
        for group in self._groups.values():
            if group.failure is not None:
                await group.begin_again()
        deadline = time.monotonic() + budget_seconds

        def is_due() -> bool:
            return len(self._finished()) >= min(part_groups, len(self._groups))

        await self._engine.drive(
            lambda: is_due() or time.monotonic() >= deadline or self._failure() is not None
        )
        if failure := self._failure():
            raise failure
        finished = self._finished()
        oldest = min((at for g in finished if (at := g.finished_at) is not None), default=None)
        if is_due() or (oldest is not None and time.monotonic() - oldest >= hold_seconds):
            return finished
        return []

    def forget(self, groups: Sequence[OpenGroup]) -> None:
        """The groups are stored."""
        for group in groups:
            del self._groups[group.drawn.group_id]

    def _finished(self) -> list[OpenGroup]:
        return [group for group in self._groups.values() if group.finished_at is not None]

    def _failure(self) -> BaseException | None:
        return next((g.failure for g in self._groups.values() if g.failure is not None), None)
