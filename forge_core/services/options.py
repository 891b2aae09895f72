"""How a service treats requests and replicas."""

from __future__ import annotations

from dataclasses import dataclass, field

from forge_core.services.health import HealthOptions
from forge_core.services.policy import UNHANDLED, Policy
from forge_core.services.restarts import RestartOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """Bounds of a service, with defaults that suit short requests."""

    policy: Policy = UNHANDLED
    """What is done about a failure."""

    max_queued: int = 1024
    """Requests that may wait for a replica; at least 1."""
    max_under_way: int = 16
    """Requests that a replica has at once; at least 1."""
    max_load: float | None = None
    """Cost of the requests under way from which on a replica gets no more; None: their number alone counts."""
    timeout_seconds: float = 60.0
    """Deadline of a call that names none."""
    cancel_seconds: float = 5.0
    """What a replica gets, past a request's deadline, to give it up; one that does not fails."""

    attempts: int = 3
    """Replicas that may fail under one request, which may be what kills them."""
    retry_delay_seconds: float = 0.02
    """Before the second attempt; doubles each time, with jitter."""
    longest_retry_delay_seconds: float = 5.0
    """Longest wait before an attempt."""
    retry_share: float = 0.2
    """Further attempts per call, in the long run."""
    retry_reserve: float = 256.0
    """Further attempts beyond that, saved up while all is well."""

    health: HealthOptions = field(default_factory=HealthOptions)
    """How long silence is borne."""
    turn_seconds: float | None = None
    """Longest that an endpoint may compute without awaiting anything; None: as long as it likes."""
    restarts: RestartOptions = field(default_factory=RestartOptions)
    """Bounds of restarts."""
    startup_seconds: float = 300.0
    """Until a replica serves."""
    drain_seconds: float = 60.0
    """What requests under way get when a replica leaves."""
    grace_seconds: float = 1.5
    """What a replica that leaves gets to stop by itself before its processes are killed."""

    def __post_init__(self) -> None:
        for bound in ("max_queued", "max_under_way", "attempts"):
            if getattr(self, bound) < 1:
                raise ValueError(f"{bound} {getattr(self, bound)} of a service must be at least 1")
