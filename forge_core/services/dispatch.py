"""Which request goes to which replica, and when: the queue of a service.

    call ──▶ has a replica room, and does nobody wait? ──▶ under way ──▶ given back
              │ no                                            ▲
              ├─ queue not full ──▶ queued ── room ───────────┘
              └─ queue full ──▶ Overloaded, or waits for a place in the queue

| waits | for | unblocked by |
|---|---|---|
| a caller outside the queue | a place in it | a request that leaves the queue |
| a request in the queue of all | any replica with room | a request given back, a replica that begins to serve |
| a request in the queue of one replica | that replica's room | the same; joins the queue of all when it fails |
| each of them | | its deadline, its caller's cancellation, the end of the service |

Nothing here takes time or awaits, but for `wait`; all of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forge_core.services.errors import Overloaded, ServiceFailed
from forge_core.services.metrics import Latencies
from forge_core.services.routing import Candidates, Router


@dataclass(slots=True, eq=False)
class Seat:
    """A replica's place in a service, through all of its lives."""

    index: int
    """Place, from 0."""
    name: str
    """Name of the replica."""
    life: int = 0
    """Counts up when a replica fails: what was under way in an earlier life is not under way any more."""
    is_serving: bool = False
    """Takes requests."""
    has_left: bool = False
    """Will never serve again."""
    load: float = 0.0
    """Sum of the costs of what is under way."""
    under_way: int = 0
    """Requests that the replica has."""
    waiting: OrderedDict[int, QueuedRequest] = field(default_factory=OrderedDict)
    """Requests that only this replica may have, oldest first."""
    on_idle: Callable[[], None] | None = None
    """Called when nothing is under way any more."""


@dataclass(slots=True, eq=False, kw_only=True)
class QueuedRequest:
    """One call, through all of its attempts."""

    number: int
    """Counts the calls of a service; older ones are lower."""
    endpoint: str
    """What is called."""
    args: Sequence[Any] = ()
    """With what, by position."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """With what, by name."""
    cost: float = 1.0
    """What it weighs."""
    wants: Seat | None = None
    """The only seat that may have it."""
    may_move: bool = True
    """Whether another may have it once that one fails."""
    deadline: float = math.inf
    """On the event loop's clock."""
    attempts: int = 0
    """Replicas that had it and failed."""
    attempts_left: int = 1
    """Replicas that may still fail under it."""
    is_admitted: bool = False
    """Has been in the queue, or with a replica."""
    seat: Seat | None = None
    """Who has it."""
    life: int = 0
    """In which life."""
    granted: asyncio.Future[Seat] | None = None
    """Resolves when it may go to a replica."""
    queue: OrderedDict[int, QueuedRequest] | None = None
    """Where it waits."""


class Dispatch:
    """The queue of a service and the load of its replicas."""

    def __init__(
        self, router: Router, *, max_queued: int, max_under_way: int, max_load: float | None
    ) -> None:
        self._router = router
        self._max_under_way = max_under_way
        self._max_load = max_load
        self._max_queued = max_queued
        self._candidates = Candidates()
        self._waiting: OrderedDict[int, QueuedRequest] = OrderedDict()
        self._places = asyncio.Semaphore(max_queued)
        self._error: ServiceFailed | None = None
        self.overloaded = 0
        self.queued = 0
        self.queued_most = 0
        self.waits = Latencies()

    def take(self, request: QueuedRequest) -> Seat | None:
        """A seat at once, if one has room and nobody waits before; else None.

        Raises ServiceFailed once the service is over, and what the router raises.
        """
        self.check()
        wanted = request.wants
        if wanted is None:
            if self._waiting or not self._candidates:
                return None
            wanted = self._choose(request)
        elif wanted.waiting or wanted not in self._candidates:
            return None
        self._assign(request, wanted)
        return wanted

    async def wait(self, request: QueuedRequest, *, is_patient: bool) -> Seat:
        """A seat, when the request's turn has come.

        Raises Overloaded if the queue is full and the caller not patient; otherwise as `take`. A request that had been
        with a replica before goes first, and finds no queue too full.
        """
        was_admitted = request.is_admitted
        if not was_admitted:
            if self._places.locked() and not is_patient:
                self.overloaded += 1
                raise Overloaded(
                    f"{self.queued} requests are queued, of at most {self._max_queued}"
                )
            await self._places.acquire()
        try:
            self.check()
            request.is_admitted = True
            return await self._queue(request, first=was_admitted)
        finally:
            if not was_admitted:
                self._places.release()

    async def _queue(self, request: QueuedRequest, *, first: bool) -> Seat:
        loop = asyncio.get_running_loop()
        began = loop.time()
        request.granted = loop.create_future()
        wanted = request.wants
        if wanted is not None and not wanted.is_serving and (request.may_move or wanted.has_left):
            request.wants = None  # it failed or left meanwhile
        self._line_up(request, first=first)
        # Room may have been made while this waited for a place in the queue.
        self._hand_out(request.wants)
        try:
            seat = await request.granted
        except asyncio.CancelledError:
            granted = request.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.give_back(request)
            raise
        finally:
            self._leave_line(request)
            request.granted = None
        self.waits.add(loop.time() - began)
        return seat

    def give_back(self, request: QueuedRequest) -> None:
        """The request is not under way any more."""
        seat, request.seat = request.seat, None
        if seat is None or request.life != seat.life:
            return
        seat.under_way -= 1
        seat.load = seat.load - request.cost if seat.under_way else 0.0
        self._changed(seat)
        self._hand_out(seat)
        if seat.under_way == 0 and seat.on_idle is not None:
            seat.on_idle()

    def open(self, seat: Seat) -> None:
        """The seat's replica serves."""
        seat.is_serving = True
        self._changed(seat)
        self._hand_out(seat)

    def close(self, seat: Seat, *, failed: bool) -> None:
        """The seat's replica takes no requests any more; what it has goes on unless it `failed`."""
        seat.is_serving = False
        if failed:
            seat.life += 1
            seat.under_way, seat.load = 0, 0.0
        self._changed(seat)
        movable = [r for r in seat.waiting.values() if r.may_move or seat.has_left]
        for request in movable:
            self._leave_line(request)
            request.wants = None
            self._line_up(request, first=False)
        if movable:
            self._in_order()
            self._hand_out(None)

    def fail(self, error: ServiceFailed, seats: Sequence[Seat]) -> None:
        """Raise from everything that waits and will come."""
        self._error = error
        for queue in (self._waiting, *(seat.waiting for seat in seats)):
            for request in list(queue.values()):
                self._leave_line(request)
                if request.granted is not None and not request.granted.done():
                    request.granted.set_exception(_again(error))

    def check(self) -> None:
        """Raises ServiceFailed once the service is over."""
        if self._error is not None:
            raise _again(self._error)

    def _choose(self, request: QueuedRequest) -> Seat:
        chosen: Any = self._router.choose(self._candidates, request)
        if chosen not in self._candidates:
            raise ValueError(
                f"router {type(self._router).__name__} chose {chosen!r}, which is none of its candidates"
            )
        seat: Seat = chosen
        return seat

    def _assign(self, request: QueuedRequest, seat: Seat) -> None:
        seat.under_way += 1
        seat.load += request.cost
        request.seat, request.life, request.is_admitted = seat, seat.life, True
        self._changed(seat)

    def _changed(self, seat: Seat) -> None:
        """A seat's load, or whether it serves, is another."""
        has_room = (
            seat.is_serving
            and seat.under_way < self._max_under_way
            and (self._max_load is None or seat.load < self._max_load)
        )
        if not has_room:
            self._candidates.remove(seat)
        elif seat in self._candidates:
            self._candidates.update(seat)
        else:
            self._candidates.add(seat)

    def _hand_out(self, seat: Seat | None) -> None:
        """Give what waits, oldest first, to whom it may go: any replica, or `seat` where only that will do."""
        while (request := self._next(seat)) is not None:
            self._leave_line(request)
            granted = request.granted
            if granted is None or granted.done():
                continue
            try:
                chosen = request.wants or self._choose(request)
            except Exception as error:
                # The router is the caller's code: its error is the request's, not that of whoever made room.
                granted.set_exception(error)
                continue
            self._assign(request, chosen)
            granted.set_result(chosen)

    def _next(self, seat: Seat | None) -> QueuedRequest | None:
        oldest = next(iter(self._waiting.values()), None) if self._candidates else None
        if seat is not None and seat.waiting and seat in self._candidates:
            own = next(iter(seat.waiting.values()))
            if oldest is None or own.number < oldest.number:
                return own
        return oldest

    def _line_up(self, request: QueuedRequest, *, first: bool) -> None:
        request.queue = self._waiting if request.wants is None else request.wants.waiting
        request.queue[request.number] = request
        if first:
            request.queue.move_to_end(request.number, last=False)
        self.queued += 1
        self.queued_most = max(self.queued_most, self.queued)

    def _leave_line(self, request: QueuedRequest) -> None:
        if request.queue is not None:
            del request.queue[request.number]
            request.queue = None
            self.queued -= 1

    def _in_order(self) -> None:
        """What moved here from a failed replica may be older than what waits."""
        for number in sorted(self._waiting):
            self._waiting.move_to_end(number)


def _again(error: ServiceFailed) -> ServiceFailed:
    """The same error for another caller: a shared one would gather the traceback of each."""
    copy = ServiceFailed(*error.args)
    copy.__cause__ = error.__cause__
    return copy
