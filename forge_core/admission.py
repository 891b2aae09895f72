"""Admission: which draws may be under way, so that no group is ever too old to be trained on.

              admit(r)            finish             take(step)             serve(r, step)
    draw ──────────────▶ UNDER WAY ──────▶ READY ──────────────▶ BATCHED ──────────────────▶ SETTLED
                          ▲     │                                                 (slot free at replica r)
                 adopt(r) │     │ lose(r)
                          └─ ORPHANED
          UNDER WAY, ORPHANED or READY ── drop ──▶ DROPPED (slot free at once)
          BATCHED ── give_up(step) ──▶ DROPPED (slots free at once); the step takes P others

    who                waits for                                           which ends by
    replica r          a slot: pending(r) < (S+1)P                         serve(r, step), drop
    replica r          weights, once nothing is under way and no slot free a publish
    an orphan          a replica that serves no older weights than those   serve(r, v)
                       it was admitted under
    a step's batch     P ready groups within the window                    finish, drop
    a publish          every replica serving the version before it         serve

P groups make a step; A is `max_policy_age`, W the window. A step takes P ready groups, first in first out but for the
window: none whose ordinal is W or more above the oldest that no step has taken. pending(r) counts the groups that are
admitted, neither dropped nor in the batch of a step whose weights r serves.

**Bound.** With S = A - ceil((W-1)/P) >= 0, no group is trained on at an age above A. Proof: let draw o be admitted to
replica r, which serves version v; its tokens are of version v or newer. Of the draws before it, vP are in batches of
steps that r knows of and some, d, were dropped; so o - d - vP < (S+1)P. Steps take before o at most the draws below o
that are not dropped, o - d, and W-1 above it. So o is in a step whose number less one, the version before its first
update, is at most ((v+S+1)P - 1 + W-1) / P, rounded down: v + S + ceil((W-1)/P) = v + A. A batch that is given up
counts among the dropped: P other draws are in the batch of its step, and no step's number changes.

**Progress.** Once every replica serves the newest step, pending(r) counts only what no step has taken, so up to
(S+1)P >= P groups can be got ready; then the oldest is among them and the window excludes none.

Nothing here knows of processes, time or Prefect.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto


def spare_steps(*, max_policy_age: int, window: int, groups_per_step: int) -> int:
    """S = A - ceil((W-1)/P): batches beyond the one in training that may be pending; below 0 the bound cannot hold."""
    return max_policy_age - -(-(window - 1) // groups_per_step)


class _State(Enum):
    UNDER_WAY = auto()
    ORPHANED = auto()
    READY = auto()


@dataclass(slots=True)
class _Open:
    """A group that is in no batch yet."""

    state: _State
    replica: int
    version: int
    """What the replica that admitted it served then: no token is older."""


@dataclass(slots=True, kw_only=True)
class Admission:
    """The bookkeeping of one run. Ordinals are those of draws, from 0 without gaps.

    Example:
        admission = Admission(groups_per_step=64, max_policy_age=2, window=64, steps=48, replicas=1)
        drawn = admission.admit(replica=0, most=16)
        admission.finish(drawn[0])
        batch = admission.take(step=1)  # None until 64 are ready
        admission.serve(replica=0, version=1)
    """

    groups_per_step: int
    """P."""
    max_policy_age: int
    """A."""
    window: int
    """W."""
    steps: int
    """Steps of the run; no more is admitted than they use up."""
    replicas: int
    """Generator replicas; each begins by serving the version before the first step."""
    first_step: int = 1
    """The first step; the draws of those before it were another run's."""
    admitted: int = 0
    """Draws admitted so far."""
    dropped: int = 0
    """Draws dropped outside a batch so far."""
    taken: int = 0
    """Steps that have their batch."""
    served: dict[int, int] = field(default_factory=dict)
    """Version that each living replica serves."""
    _open: dict[int, _Open] = field(default_factory=dict)
    _last_batch: tuple[int, ...] = ()
    _again: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Other batches of steps whose first was given up; empty while one is due."""

    def __post_init__(self) -> None:
        if self._spare < 0:
            raise ValueError(
                f"max_policy_age {self.max_policy_age} is below ceil((window - 1) / groups_per_step) = "
                f"{self.max_policy_age - self._spare}"
            )
        before = self.first_step - 1
        self.admitted, self.taken = before * self.groups_per_step, before
        self.served = {replica: before for replica in range(self.replicas)}

    def resume(
        self,
        *,
        taken: int,
        served: int,
        admitted: int,
        dropped: int,
        ready: Collection[int],
        under_way: Collection[int],
        orphaned: Collection[int],
        given_up: Collection[int] = (),
    ) -> None:
        """Stand where a controller broke off that had these groups open, with new replicas that all serve `served`.

        `given_up` are steps before the last one taken that need another batch.

        The bound holds on: a replica that serves newer weights than those that a group was admitted under only makes
        it younger. Nobody generates what is `under_way` any more, and it is going to be finished all the same.
        """
        self.taken, self.admitted, self.dropped = taken, admitted, dropped
        self.served = {replica: served for replica in range(self.replicas)}
        states = ((_State.READY, ready), (_State.UNDER_WAY, under_way), (_State.ORPHANED, orphaned))
        # No replica has the number -1.
        self._open = {
            ordinal: _Open(state, -1, served) for state, ordinals in states for ordinal in ordinals
        }
        self._last_batch = ()
        self._again = {step: () for step in given_up}

    @property
    def _spare(self) -> int:
        return spare_steps(
            max_policy_age=self.max_policy_age,
            window=self.window,
            groups_per_step=self.groups_per_step,
        )

    def free_slots(self, replica: int) -> int:
        """How many draws may be admitted to a replica now; 0 for one that is lost."""
        if replica not in self.served:
            return 0
        size = self.groups_per_step
        pending = self.admitted - self.dropped - self.served[replica] * size
        left = self.steps * size + self.dropped - self.admitted
        return max(0, min((self._spare + 1) * size - pending, left))

    def admit(self, replica: int, most: int) -> list[int]:
        """Admit up to `most` further draws to a replica; their ordinals."""
        count = min(most, self.free_slots(replica))
        ordinals = list(range(self.admitted, self.admitted + count))
        for ordinal in ordinals:
            self._open[ordinal] = _Open(_State.UNDER_WAY, replica, self.served[replica])
        self.admitted += count
        return ordinals

    def under_way(self, replica: int) -> list[int]:
        """Ordinals that a replica is generating."""
        return [
            ordinal
            for ordinal, group in self._open.items()
            if group.state is _State.UNDER_WAY and group.replica == replica
        ]

    def finish(self, ordinal: int) -> None:
        """A group is generated, scored and committed. Safe to repeat, also when it is in a batch by now."""
        if ordinal in self._open:
            self._open[ordinal].state = _State.READY

    def drop(self, ordinal: int) -> None:
        """A group will never be trained on, and no step has considered it. Safe to repeat."""
        if self._open.pop(ordinal, None) is not None:
            self.dropped += 1

    def give_up(self, step: int) -> None:
        """The batch of a step is dropped as a whole; `take` gives the step another one.

        Raises ValueError for a step that has none, or whose weights a replica serves.
        """
        newest = max(self.served.values(), default=0)
        if not newest < step <= self.taken or self._again.get(step) == ():
            raise ValueError(f"step {step} has no batch that could be given up")
        self._again[step] = ()
        self.dropped += self.groups_per_step

    def serve(self, replica: int, version: int) -> None:
        """A replica serves a version from now on; one that was lost is back.

        Raises ValueError for a version that no batch precedes, or an older one than it served.
        """
        if not self.served.get(replica, 0) <= version <= self.taken:
            raise ValueError(
                f"replica {replica} cannot go from version {self.served.get(replica)} to {version} "
                f"when {self.taken} steps have their batch"
            )
        self.served[replica] = version

    def lose(self, replica: int) -> list[int]:
        """A replica is gone; the ordinals that it leaves behind, which others have to adopt."""
        self.served.pop(replica, None)
        orphans = self.under_way(replica)
        for ordinal in orphans:
            self._open[ordinal].state = _State.ORPHANED
        return orphans

    def orphans(self, replica: int) -> list[int]:
        """Orphans that a replica may adopt: those to which it gives no older tokens than the bound counts on."""
        if (serves := self.served.get(replica)) is None:
            return []
        return [
            ordinal
            for ordinal, group in sorted(self._open.items())
            if group.state is _State.ORPHANED and group.version <= serves
        ]

    def adopt(self, replica: int, ordinals: Collection[int]) -> None:
        """A replica generates these orphans from now on, from their first token. Raises ValueError if it may not."""
        if refused := set(ordinals) - set(self.orphans(replica)):
            raise ValueError(f"replica {replica} cannot adopt {sorted(refused)}")
        for ordinal in ordinals:
            self._open[ordinal] = _Open(_State.UNDER_WAY, replica, self._open[ordinal].version)

    def take(self, step: int) -> tuple[int, ...] | None:
        """The batch of a step in the order of draws, or None while too few groups are ready.

        A step whose batch was given up comes before the next one, which would else take the groups that are left for
        it, and keep it waiting for weights that never come. Safe to repeat for the step that was asked for last, and
        for those whose batch was given up; raises ValueError for any other but the next.
        """
        if step in self._again:
            self._again[step] = self._again[step] or self._take() or ()
            return self._again[step] or None
        if step == self.taken and step > 0:
            return self._last_batch
        if step != self.taken + 1:
            raise ValueError(f"step {step} does not follow step {self.taken}")
        is_owed = any(batch == () for batch in self._again.values())
        chosen = None if is_owed else self._take()
        if chosen is None:
            return None
        self.taken, self._last_batch = step, chosen
        return chosen

    def _take(self) -> tuple[int, ...] | None:
        chosen = self._choose()
        if chosen is None:
            return None
        for ordinal in chosen:
            del self._open[ordinal]
        return tuple(sorted(chosen))

    def _choose(self) -> list[int] | None:
        ready = [o for o in sorted(self._open) if self._open[o].state is _State.READY]
        if len(ready) < self.groups_per_step:
            return None
        waiting = iter([o for o in sorted(self._open) if self._open[o].state is not _State.READY])
        # The oldest that no step has taken: a ready one is taken next itself, so only the others hold the window back.
        oldest_waiting = next(waiting, None)
        chosen = ready[: self.groups_per_step]
        if oldest_waiting is not None and chosen[-1] >= oldest_waiting + self.window:
            return None
        return chosen
