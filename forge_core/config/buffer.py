"""Which groups are trained on again."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from forge_core.config.base import Section


class _HeldConfig(Section):
    """What a source holds, for how long, and how it is drawn."""

    capacity: int = Field(4096, ge=1)
    """Most groups that are held."""
    max_age: int | None = Field(None, ge=1)
    """Age, in versions, up to which a group is trained on. Unless given: the run's `max_policy_age`, or any age where
    `unbounded`."""
    unbounded: bool = False
    """The run's `max_policy_age` does not hold for these groups. Needs importance weights: `algorithm.correction`."""
    min_reward: float | None = None
    """Only groups whose mean reward is at least this."""
    alpha: float = Field(0.6, ge=0.0)
    """In `prioritised`, groups are drawn in proportion to this power of their priority; 0: evenly."""
    beta: float = Field(0.4, ge=0.0, le=1.0)
    """In `prioritised`, how far importance weights make up for that; 1: in full."""
    use_discount: float = Field(0.5, gt=0.0, le=1.0)
    """In `prioritised`, what the priority of a group, at first the spread of its rewards, is multiplied by when it is
    trained on."""


class SourceConfig(_HeldConfig):
    """One source of a mixture."""

    policy: Literal["fresh", "fifo", "prioritised", "reservoir"]
    """`fresh`: the step's own groups, all of them; others as in `buffer.policy`."""
    fraction: float = Field(gt=0.0, le=1.0)
    """Its share of a batch, in groups."""


class BufferConfig(_HeldConfig):
    """Groups that are trained on more than once."""

    policy: Literal["once", "fifo", "prioritised", "reservoir", "hybrid"] = "once"
    """`once`: each group once, in the step that it was drawn for. Otherwise a step's groups go into the buffer and its
    batch is drawn from there: from the newest (`fifo`), from these by priority (`prioritised`), from an even sample of
    all (`reservoir`), or from each of several `sources` (`hybrid`)."""
    max_uses: int = Field(1, ge=1)
    """Most steps that train on a group."""
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """By a name of yours, the sources of a `hybrid` buffer: each has a `policy` (those above or `fresh`, the step's own
    groups), a `fraction` of the batch and the keys that say what is held. With `fresh` the batch is as much larger than
    `groups_per_step` as its fraction says."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.policy == "hybrid") != bool(self.sources):
            raise ValueError(
                f"policy {self.policy!r} with {len(self.sources)} sources: hybrid needs some, others have none"
            )
        if self.policy == "once" and self.max_uses != 1:
            raise ValueError(
                f"max_uses {self.max_uses} is for groups that are kept: set policy to fifo, prioritised, reservoir or "
                "hybrid"
            )
        if self.sources:
            self._check_mixture()
        return self

    def _check_mixture(self) -> None:
        total = sum(source.fraction for source in self.sources.values())
        if abs(total - 1.0) > 1e-6:
            shown = ", ".join(f"{name} {s.fraction:g}" for name, s in self.sources.items())
            raise ValueError(f"sources have fractions {shown}, which sum to {total:g}: make it 1")
        fresh = [name for name, source in self.sources.items() if source.policy == "fresh"]
        if len(fresh) > 1 or len(fresh) == len(self.sources):
            raise ValueError(
                f"sources {', '.join(fresh)} are fresh: take one such source at most, and another to replay from"
            )
        if fresh and self.max_uses == 1:
            raise ValueError(
                "max_uses 1 lets no fresh group be trained on again: set it to 2 or more"
            )

    @property
    def held(self) -> dict[str, BufferConfig | SourceConfig]:
        """By name, what groups are replayed from."""
        if self.policy == "once":
            return {}
        if self.policy != "hybrid":
            return {self.policy: self}
        return {name: each for name, each in self.sources.items() if each.policy != "fresh"}

    @property
    def fresh_fraction(self) -> float:
        """Share of a batch that is the step's own groups; 0 if they have none of their own."""
        return sum(s.fraction for s in self.sources.values() if s.policy == "fresh")

    def shares(self, groups_per_step: int) -> dict[str, int]:
        """By name, how many groups of a batch are drawn from each source."""
        size = groups_per_step / (self.fresh_fraction or 1.0)
        return {
            name: round(size * (each.fraction if isinstance(each, SourceConfig) else 1.0))
            for name, each in self.held.items()
        }


def check_buffer(
    buffer: BufferConfig, *, groups_per_step: int, max_policy_age: int, is_corrected: bool
) -> None:
    """Raise ValueError for a buffer that could replay nothing, or what nothing makes up for."""
    for name, share in buffer.shares(groups_per_step).items():
        held = buffer.held[name]
        where = f"sources.{name}." if isinstance(held, SourceConfig) else ""
        if share < 1:
            raise ValueError(
                f"{where}fraction gives source {name!r} no group of a step: raise it, or groups_per_step "
                f"{groups_per_step}"
            )
        if held.capacity < groups_per_step:
            raise ValueError(
                f"{where}capacity {held.capacity} is below groups_per_step {groups_per_step}, the groups of one step: "
                "raise it"
            )
        if held.unbounded:
            if not is_corrected:
                raise ValueError(
                    f"{where}unbounded trains on groups of any age, and nothing makes up for that: set "
                    "algorithm.correction.weights to 'masked', or algorithm.correction.anchor to 'proximal'"
                )
        elif (held.max_age or 0) > max_policy_age:
            raise ValueError(
                f"{where}max_age {held.max_age} is above max_policy_age {max_policy_age}: lower it, or set "
                f"{where}unbounded"
            )
        elif max_policy_age == 0:
            raise ValueError(
                f"{where}unbounded is false and max_policy_age 0, which no group keeps after its step: set "
                f"{where}unbounded, or take a regime with a max_policy_age"
            )
