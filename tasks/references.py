"""What passes between stages: ids, keys, versions and figures."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from storage.records import PartRef


class Reference(BaseModel):
    """Base: immutable, closed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Generation(Reference):
    """A round's unscored parts."""

    round: int
    """Round of generation, which in sync is the step."""
    parts: tuple[PartRef, ...]
    """One per replica that had something to sample."""
    replicas: tuple[int, ...]
    """Who wrote each part."""
    response_tokens: int
    """Tokens sampled."""
    seconds: float
    """Time of the slowest engine."""


class Scored(Reference):
    """A round's committed parts."""

    round: int
    """The round."""
    commits: tuple[str, ...]
    """Keys of the commit records."""


class StepBatch(Reference):
    """What a step is to train on."""

    step: int
    """The step, from 1."""
    commits: tuple[str, ...]
    """Keys of the commit records that hold the groups."""
    group_ids: tuple[str, ...]
    """The groups, in order."""
    metrics: dict[str, float]
    """Rewards over all of the round's groups, the dropped ones among them."""
