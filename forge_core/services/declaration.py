"""What an actor needs, said before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from forge_core.services.policy import Policy, check_policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """An actor class, what it is made with, and what each of its replicas needs.

    Example:
        echo = Declaration(actor=Echo, replicas=4, cores=1).with_arguments("prefix")
    """

    actor: type[Any]
    """A Monarch actor; only a `ServedActor` can be asked to give requests up, and is set up."""
    arguments: tuple[Any, ...] = ()
    """What it is made with, by position."""
    named_arguments: Mapping[str, Any] = field(default_factory=dict)
    """What it is made with, by name."""
    replicas: int = 1
    """Number of replicas, each a failure unit of its own."""
    processes: int = 1
    """Processes of each replica, which live and die together; beyond one, a call asks all and answers in rank order."""
    gpus: int = 0
    """GPUs of each process."""
    cores: int = 0
    """Cores that each process is bound to; 0: it runs on any, with one thread."""
    hosts: tuple[str, ...] | None = None
    """Names of the hosts that a replica may lie on; None: any."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables of each process."""
    policy: Policy | None = None
    """What is done about a failure; None: what `@faults` says of the class, or else fail_fast."""
    turn_seconds: float | None = None
    """Longest that an endpoint may compute without awaiting anything; None: as long as it likes."""

    def __post_init__(self) -> None:
        called = self.actor.__name__
        for name, least in (("replicas", 1), ("processes", 1), ("gpus", 0), ("cores", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{called} was given {name} {getattr(self, name)}: give {least} or more"
                )
        if self.policy is not None:
            check_policy(self.policy)

    def with_arguments(self, *arguments: Any, **named_arguments: Any) -> Declaration:
        """The same, whose actors are made with these."""
        return replace(self, arguments=arguments, named_arguments=named_arguments)
