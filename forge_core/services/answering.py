"""Gets a request answered, once, whatever happens to replicas meanwhile.

    ask ──▶ Dispatch ──▶ replica ──▶ answer, or what the endpoint raised
              ▲             │
              └── again ◀── ReplicaLost, within attempts, budget and deadline

A call that is cancelled or late is cancelled in its replica too. Its place there stays taken until the replica says
that it gave it up; a replica that does not, `cancel_seconds` after the deadline, has failed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from forge_core.services.dispatch import Dispatch, QueuedRequest, Seat
from forge_core.services.errors import DeadlineExceeded, ReplicaFailed, ReplicaLost, ServiceFailed
from forge_core.services.health import Failure, FailureKind, end_tasks
from forge_core.services.options import ServiceOptions
from forge_core.services.replica import Replica
from forge_core.services.restarts import RetryBudget, back_off
from forge_core.services.supervision import Supervisor

_BACKSTOP_SECONDS = 10.0


class Binding(Protocol):
    """What a session has to say about where its requests go."""

    def aim(self, request: QueuedRequest) -> None:
        """Set what the request wants."""

    def takes(self, seat: Seat) -> bool:
        """Whether the request may go to the seat that it was given."""

    async def arrive(self, seat: Seat) -> None:
        """The request is about to go there."""


class Answering:
    """The requests of one service."""

    def __init__(
        self,
        name: str,
        dispatch: Dispatch,
        supervisors: Mapping[Seat, Supervisor],
        options: ServiceOptions,
    ) -> None:
        self.requests = self.retries = self.late = 0
        self.open_sessions = self.moved_sessions = 0
        self._name = name
        self._dispatch = dispatch
        self._supervisors = supervisors
        self._options = options
        self._budget = RetryBudget(share=options.retry_share, reserve=options.retry_reserve)
        self._clock = asyncio.get_running_loop().time
        self._numbers = itertools.count()
        self._giving_up: set[asyncio.Task[None]] = set()

    def request(
        self,
        endpoint: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        seconds: float,
        *,
        cost: float = 1.0,
        attempts: int = 1,
    ) -> QueuedRequest:
        """One with a number that no other has, due in `seconds`."""
        return QueuedRequest(
            number=next(self._numbers),
            endpoint=endpoint,
            args=args,
            kwargs=kwargs,
            cost=cost,
            deadline=self._clock() + seconds,
            attempts_left=attempts,
        )

    async def ask(
        self,
        endpoint: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        timeout_seconds: float | None,
        cost: float,
        attempts: int | None,
        patient: bool,
        binding: Binding | None = None,
    ) -> Any:
        """The answer. Raises what the endpoint raised, or one of `forge_core.services.errors`."""
        options = self._options
        seconds = options.timeout_seconds if timeout_seconds is None else timeout_seconds
        request = self.request(
            endpoint,
            args,
            kwargs,
            seconds,
            cost=cost,
            attempts=options.attempts if attempts is None else attempts,
        )
        self.requests += 1
        self._budget.earn()
        try:
            async with asyncio.timeout_at(request.deadline) as limit:
                return await self._answer(request, patient, binding)
        except TimeoutError:
            if not limit.expired():  # the endpoint's own
                raise
            self.late += 1
            where = "in the queue" if request.seat is None else f"with {request.seat.name}"
            raise DeadlineExceeded(
                f"{self._name} did not answer {endpoint} within {seconds:g} s; it was {where}"
            ) from None

    async def _answer(self, request: QueuedRequest, patient: bool, binding: Binding | None) -> Any:
        while True:
            if binding is not None:
                binding.aim(request)
            seat = self._dispatch.take(request)
            if seat is None:
                seat = await self._dispatch.wait(request, is_patient=patient)
            if request.life != seat.life:  # it failed between grant and now
                continue
            if binding is not None and not binding.takes(seat):
                self._dispatch.give_back(request)
                continue
            supervisor = self._supervisors[seat]
            replica = supervisor.replica
            assert replica is not None, "a seat that serves has a replica"
            began = self._clock()
            try:
                if binding is not None:
                    await binding.arrive(seat)
                answer = await replica.call(
                    request.endpoint,
                    request.args,
                    request.kwargs,
                    number=request.number,
                    # The deadline of `ask` comes first, and tells where the request was.
                    timeout_seconds=request.deadline - began + _BACKSTOP_SECONDS,
                )
            except ReplicaLost as lost:
                self._dispatch.give_back(request)
                supervisor.report(replica, Failure(FailureKind.DIED, str(lost), lost.__cause__))
                await self._before_next(request, seat, lost)
            except asyncio.CancelledError:
                supervisor.metrics.cancelled += 1
                self.give_up(supervisor, replica, request)
                raise
            except BaseException:
                supervisor.metrics.errors += 1
                self._dispatch.give_back(request)
                raise
            else:
                now = self._clock()
                supervisor.metrics.answer(now, now - began)
                self._dispatch.give_back(request)
                return answer

    async def _before_next(self, request: QueuedRequest, seat: Seat, lost: ReplicaLost) -> None:
        """Wait before another attempt. Raises if there is to be none."""
        options = self._options
        self._dispatch.check()
        if options.policy == "fail_fast":
            raise ServiceFailed(
                f"{self._name} is over: {lost}; its policy is fail_fast"
            ) from lost.__cause__
        request.attempts += 1
        request.attempts_left -= 1
        told = f"{seat.name} failed under {request.endpoint}: {lost}"
        if request.attempts_left < 1:
            raise ReplicaFailed(f"{told}; the last of {request.attempts} attempts") from lost
        if not self._budget.spend():
            raise ReplicaFailed(f"{told}; the service has no further attempts to spare") from lost
        self.retries += 1
        if options.policy == "restart":
            # What it was doing is done again by it, and by no other.
            request.wants, request.may_move = seat, False
        await asyncio.sleep(
            back_off(
                request.attempts,
                options.retry_delay_seconds,
                options.longest_retry_delay_seconds,
            )
        )

    def give_up(self, supervisor: Supervisor, replica: Replica, request: QueuedRequest) -> None:
        """Have a replica give a request up; its place there is taken until it says so."""
        task = asyncio.create_task(self._until_given_up(supervisor, replica, request))
        self._giving_up.add(task)
        task.add_done_callback(self._giving_up.discard)

    async def _until_given_up(
        self, supervisor: Supervisor, replica: Replica, request: QueuedRequest
    ) -> None:
        options = self._options
        patience = max(request.deadline - self._clock(), 0.0) + options.cancel_seconds
        try:
            await replica.cancel(request.number, timeout_seconds=patience)
        except ReplicaLost as lost:
            supervisor.report(replica, Failure(FailureKind.DIED, str(lost), lost.__cause__))
        except TimeoutError:
            late = f"{options.cancel_seconds:g} s after its deadline"
            reason = f"{replica.name} did not give {request.endpoint} up, {late}"
            supervisor.report(replica, Failure(FailureKind.DEAF, reason))
        finally:
            self._dispatch.give_back(request)

    async def close(self) -> None:
        """Wait no longer for what was given up."""
        await end_tasks(*self._giving_up)
