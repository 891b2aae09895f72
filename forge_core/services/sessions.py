"""Sessions: calls that belong together go to one replica, which may keep state for them or their prefixes in a cache.

    no replica ──first call──▶ bound to a replica ──it fails or leaves──▶ bound to another: a move

A session belongs to the service that made it. It does not survive its replica: the next call goes to another one, which
knows nothing of it. So that this is never silent, a move is logged, counted in `moves` and in the service's metrics,
and told to `on_move`, which may build up what was lost before the call that moved goes on.

Example:
    async def rebuild(session: Session) -> None:
        await session.call("open", history)

    async with service.session(on_move=rebuild) as session:
        await session.call("open", [])
        answer = await session.call("continue_with", "a second turn")
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from forge_core.services.answering import Answering
from forge_core.services.dispatch import QueuedRequest, Seat

logger = logging.getLogger(__name__)

OnMove = Callable[["Session"], Awaitable[None]]
"""Told of a move, before the call that moved is made."""

_numbers = itertools.count()


class Session:
    """Made by `Service.session`."""

    def __init__(self, answering: Answering, on_move: OnMove | None) -> None:
        self.moves = 0
        """Times that it went on with another replica, or with another life of one."""
        self._number = next(_numbers)
        self._answering = answering
        self._on_move = on_move
        self._seat: Seat | None = None
        self._life = 0
        self._is_open = True

    @property
    def replica(self) -> str | None:
        """Name of the replica that it is bound to; None before the first call."""
        return None if self._seat is None else self._seat.name

    async def call(
        self,
        endpoint: str,
        *args: Any,
        timeout_seconds: float | None = None,
        cost: float = 1.0,
        attempts: int | None = None,
        patient: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `Service.call`. Raises RuntimeError once the session is closed."""
        if not self._is_open:
            raise RuntimeError(f"session {self._number} is closed")
        return await self._answering.ask(
            endpoint,
            args,
            kwargs,
            timeout_seconds=timeout_seconds,
            cost=cost,
            attempts=attempts,
            patient=patient,
            binding=self,
        )

    def close(self) -> None:
        """No further calls."""
        self._is_open = False

    def aim(self, request: QueuedRequest) -> None:
        """Have the request want the replica that the session is bound to, if it lives."""
        if self._is_bound():
            request.wants = self._seat

    def takes(self, seat: Seat) -> bool:
        """Whether the seat is the session's, or may become so."""
        return self._seat is seat or not self._is_bound()

    async def arrive(self, seat: Seat) -> None:
        """A request is about to go to the seat; if that is a move, say so."""
        before, has_moved = self._seat, self._seat is not None and not self._is_bound()
        self._seat, self._life = seat, seat.life
        if before is None or not has_moved:
            return
        self.moves += 1
        self._answering.moved_sessions += 1
        logger.warning(
            "session %d moves from %s, which failed or left, to %s",
            self._number,
            before.name,
            seat.name,
        )
        if self._on_move is not None:
            await self._on_move(self)

    def _is_bound(self) -> bool:
        seat = self._seat
        return seat is not None and not seat.has_left and seat.life == self._life
