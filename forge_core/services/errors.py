"""How a call to a service fails, other than by what the called endpoint itself raises."""

from __future__ import annotations


class ReplicaFailed(RuntimeError):
    """A replica died or hung while it had the request, and there was no other attempt left."""


class ServiceFailed(RuntimeError):
    """The service is over: what failed is not handled by its policy, or failed too often. The cause is chained."""


class Overloaded(RuntimeError):
    """The queue is full, and the caller did not want to wait."""


class DeadlineExceeded(TimeoutError):
    """A request was not answered in time."""


class ReplicaLost(Exception):
    """Between a replica and its service: the replica is at fault, not the endpoint. Callers never see it."""
