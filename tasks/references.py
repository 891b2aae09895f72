"""What passes between stages: ids, keys, versions and figures."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from storage.layout import RUN_SCORES
from storage.records import PartRef


class Reference(BaseModel):
    """Base: immutable, closed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Round(Reference):
    """Groups that are collected together, for one or more steps."""

    number: int
    """From 1; in sync, the step."""
    first_step: int
    """First step that trains on them, from 1."""
    last_step: int
    """Last step that does."""
    spare_draws: tuple[int, int] | None = None
    """First ordinal and number of its draws, where they are beyond those that were planned for its one step."""

    @property
    def steps(self) -> range:
        """Its steps."""
        return range(self.first_step, self.last_step + 1)

    def ordinals(self, groups_per_step: int) -> range:
        """Ordinals of its draws."""
        if self.spare_draws is not None:
            first, number = self.spare_draws
            return range(first, first + number)
        return range((self.first_step - 1) * groups_per_step, self.last_step * groups_per_step)


class Generation(Reference):
    """A round's unscored parts."""

    round: Round
    """The round."""
    parts: tuple[PartRef, ...]
    """One per replica that had something to sample."""
    replicas: tuple[int, ...]
    """Who wrote each part."""
    tokens_per_second: float
    """Response tokens of all replicas over the time of the slowest; 0 without tokens."""


class Scored(Reference):
    """A round whose episodes are committed."""

    round: Round
    """The round."""
    tokens_per_second: float
    """As its generation says."""


class StepBatch(Reference):
    """What a step is to train on."""

    step: int
    """The step, from 1."""
    commits: tuple[str, ...]
    """Keys of the commit records that hold the groups."""
    group_ids: tuple[str, ...]
    """The groups, in order."""
    metrics: dict[str, float]
    """Rewards over all groups that were considered, the dropped ones among them, and how they came about."""
    advantages: dict[str, float] | None = None
    """By episode id, 0 for the others, where they are not the algorithm's."""
    score_set: str = RUN_SCORES
    """Which scores of the episodes count."""
    weights: tuple[float, ...] | None = None
    """Of each group, the importance weight of how it was drawn, where the run has a buffer."""


class Segment(Reference):
    """A run of steps that async puts into one task of each stage."""

    first_step: int
    """From 1."""
    last_step: int
    """Last step."""

    @property
    def steps(self) -> range:
        """Its steps."""
        return range(self.first_step, self.last_step + 1)
