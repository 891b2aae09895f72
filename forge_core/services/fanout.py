"""One call to every replica at once, with an outcome for each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge_core.services.answering import Answering
from forge_core.services.dispatch import QueuedRequest
from forge_core.services.errors import DeadlineExceeded, ReplicaFailed, ReplicaLost
from forge_core.services.replica import State
from forge_core.services.supervision import Supervisor


@dataclass(frozen=True, slots=True)
class Answered:
    """A replica answered."""

    value: Any
    """What."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A replica did not answer."""

    error: BaseException
    """What the endpoint raised, or ReplicaFailed or DeadlineExceeded."""


Outcome = Answered | Failed


async def fan_out(
    answering: Answering,
    supervisors: Iterable[Supervisor],
    endpoint: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    timeout_seconds: float,
) -> dict[str, Outcome]:
    """The outcome by replica. Nothing is tried again; a replica that does not serve has failed."""
    asked = list(supervisors)
    outcomes = await asyncio.gather(
        *(
            _ask(
                answering,
                each,
                answering.request(endpoint, args, kwargs, timeout_seconds),
                timeout_seconds,
            )
            for each in asked
        )
    )
    return {each.seat.name: outcome for each, outcome in zip(asked, outcomes, strict=True)}


async def _ask(
    answering: Answering, supervisor: Supervisor, request: QueuedRequest, seconds: float
) -> Outcome:
    replica, name, endpoint = supervisor.replica, supervisor.seat.name, request.endpoint
    if replica is None or supervisor.state is not State.SERVING:
        return Failed(ReplicaFailed(f"{name} does not serve: it is {supervisor.state}"))
    try:
        async with asyncio.timeout_at(request.deadline) as limit:
            try:
                value = await replica.call(
                    endpoint,
                    request.args,
                    request.kwargs,
                    number=request.number,
                    timeout_seconds=2 * seconds,  # a backstop: `limit` knows whose time-out it is
                )
                return Answered(value)
            except asyncio.CancelledError:
                answering.give_up(supervisor, replica, request)
                raise
    except ReplicaLost as lost:
        return Failed(ReplicaFailed(f"{name} failed under {endpoint}: {lost}"))
    except TimeoutError as error:
        if not limit.expired():  # the endpoint's own
            return Failed(error)
        return Failed(DeadlineExceeded(f"{name} did not answer {endpoint} within {seconds:g} s"))
    except Exception as error:
        return Failed(error)
