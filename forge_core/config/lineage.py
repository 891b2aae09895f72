"""What a run is made from, where that is another run."""

from __future__ import annotations

from pydantic import Field

from forge_core.config.base import Section


class ReplayConfig(Section):
    """Training on stored episodes of past runs instead of generating."""

    runs: list[str] = Field(min_length=1)
    """Ids of the runs, in the same store, whose committed groups are trained on, in this order."""
    scores: str = "run"
    """Which scores count: `run` are those that the runs were trained on, others a set that `rescore` wrote."""
    epochs: int = Field(1, ge=1)
    """How often each group is trained on."""
    environment: str | None = None
    """Only groups of this environment."""
    min_policy_version: int | None = Field(None, ge=0)
    """Only groups none of whose tokens are of an older version."""
    max_policy_version: int | None = Field(None, ge=0)
    """Only groups none of whose tokens are of a newer version."""
    min_reward: float | None = None
    """Only groups whose mean reward is at least this."""
    max_reward: float | None = None
    """Only groups whose mean reward is at most this."""
