"""What is done about a failure: the table of failure units, and the choice that each leaves.

    fail_fast      the run ends with the failure, resumable
    restart        the unit is started again, and what it was doing is done again once it is back
    route_around   what it was doing moves to the other replicas at once; it is started again meanwhile

A run's units default to what the table says of them, and `[faults]` in the config tightens or loosens that. What no
row covers, such as an actor of the user's own, fails fast unless it says otherwise with `@faults` or `options`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

Policy = Literal["fail_fast", "restart", "route_around"]
"""What is done about a failure."""

RestartPolicy = Literal["fail_fast", "restart"]
"""The same for a unit that no other can stand in for."""

POLICIES: tuple[Policy, ...] = get_args(Policy)

UNHANDLED: Policy = "fail_fast"
"""The policy of whatever says nothing."""

UnitName = Literal[
    "generators",
    "last_generator",
    "verifier",
    "trainer",
    "reference",
    "critic",
    "weights",
    "flow_process",
    "prefect_server",
    "object_store",
]

T = TypeVar("T", bound=type)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureUnit:
    """Something that dies or hangs as one."""

    name: UnitName
    """Its key in `[faults]`, if it has policies."""
    unit: str
    """What it is, in words."""
    default: Policy | None
    """The policy of a run that does not choose; None where there is nothing to choose."""
    allowed: tuple[Policy, ...]
    """What a config may choose."""
    then: str
    """What happens under the default."""


FAILURE_UNITS: tuple[FailureUnit, ...] = (
    FailureUnit(
        name="generators",
        unit="a generator replica",
        default="route_around",
        allowed=POLICIES,
        then="requests move to the others; it restarts with back-off, loads the current version and passes the probe, "
        "and only then serves",
    ),
    FailureUnit(
        name="last_generator",
        unit="the last replica",
        default=None,
        allowed=(),
        then="callers wait for the restart up to their deadline; then the stage fails and is tried again. Under "
        "fail_fast as any other replica",
    ),
    FailureUnit(
        name="verifier",
        unit="a verifier",
        default="route_around",
        allowed=POLICIES,
        then="its requests are tried again elsewhere, or on it once it is back; after that the group is dropped as "
        "failed, never scored 0",
    ),
    FailureUnit(
        name="trainer",
        unit="a trainer rank",
        default="restart",
        allowed=get_args(RestartPolicy),
        then="the mesh restarts as a whole from the last checkpoint and trains again what the log has beyond it; the "
        "stage is tried again",
    ),
    FailureUnit(
        name="reference",
        unit="the reference policy",
        default="restart",
        allowed=get_args(RestartPolicy),
        then="it restarts and loads its weights again from the checkpoint that has them; the stage is tried again",
    ),
    FailureUnit(
        name="critic",
        unit="the critic",
        default="restart",
        allowed=get_args(RestartPolicy),
        then="it restarts from the last checkpoint and learns what the log has beyond it; the stage is tried again",
    ),
    FailureUnit(
        name="weights",
        unit="the weight store",
        default="restart",
        allowed=get_args(RestartPolicy),
        then="it is started again and filled from the trainer's current weights",
    ),
    FailureUnit(
        name="flow_process",
        unit="the flow process",
        default=None,
        allowed=(),
        then="its children die with it within a second; `forgeflow resume` goes on",
    ),
    FailureUnit(
        name="prefect_server",
        unit="the Prefect server",
        default=None,
        allowed=(),
        then="the run goes on or is resumed; its log, not Prefect, is the truth",
    ),
    FailureUnit(
        name="object_store",
        unit="the object store",
        default=None,
        allowed=(),
        then="writes are tried again with back-off; nothing is acknowledged before it is committed",
    ),
)
"""Every failure unit of a run."""


def failure_unit(name: UnitName) -> FailureUnit:
    """The row of the table."""
    [found] = [row for row in FAILURE_UNITS if row.name == name]
    return found


def faults(*, policy: Policy) -> Callable[[T], T]:
    """Give a class of actors the policy that its services have unless they say otherwise.

    Example:
        @faults(policy="route_around")
        class Judge(ServedActor): ...
    """
    checked = check_policy(policy)

    def mark(actor: T) -> T:
        actor.__fault_policy__ = checked  # type: ignore[attr-defined]
        return actor

    return mark


def policy_of(actor: type[Any]) -> Policy:
    """What `@faults` gave the class, or `fail_fast`."""
    policy: Policy = getattr(actor, "__fault_policy__", UNHANDLED)
    return policy


def check_policy(policy: str) -> Policy:
    """`policy` itself. Raises ValueError, with the choices, if it is none."""
    for known in POLICIES:
        if policy == known:
            return known
    raise ValueError(f"policy {policy!r} is none: choose one of {', '.join(POLICIES)}")
