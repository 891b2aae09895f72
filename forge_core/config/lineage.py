"""What a run is made from, where that is another run."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from forge_core.config.base import Section


class CollectConfig(Section):
    """Collecting one round for another run, which trains on it; `forgeflow collect` fills it in.

    The other run is `parent_run_id`, and the round is sampled with its weights of `parent_step`.
    """

    round: int = Field(ge=1)
    """Number of the round in the other run."""
    first_step: int = Field(ge=1)
    """First step of the other run that will train on it."""
    last_step: int = Field(ge=1)
    """Last step that will."""


class ReplayConfig(Section):
    """Training on stored episodes of past runs instead of generating; `forgeflow replay` fills it in."""

    runs: list[str] = Field(min_length=1)
    """Ids of the runs, in the same store, whose committed groups are trained on, in this order."""
    log_ends: list[str]
    """For each run, the last entry of its log that counts here, as `<incarnation>-<number>`: what a run does afterwards
    changes no replay."""
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
    """Only groups whose mean reward, by the scores that count, is at least this."""
    max_reward: float | None = None
    """Only groups whose mean reward, by the scores that count, is at most this."""

    @property
    def filters(self) -> bool:
        """Whether only some groups are wanted."""
        wanted = (
            self.environment,
            self.min_policy_version,
            self.max_policy_version,
            self.min_reward,
            self.max_reward,
        )
        return wanted != (None,) * len(wanted)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        twice = [run for run in self.runs if self.runs.count(run) > 1]
        if twice:
            raise ValueError(
                f"runs names {twice[0]!r} twice: set epochs to train on its groups more than once"
            )
        if len(self.log_ends) != len(self.runs):
            raise ValueError(
                f"log_ends has {len(self.log_ends)} entries for {len(self.runs)} runs: leave the section to "
                "`forgeflow replay`, which fills it in"
            )
        for name in ("policy_version", "reward"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{name} {least} is above max_{name} {most}: no group fits")
        return self
