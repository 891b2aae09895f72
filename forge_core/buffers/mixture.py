"""The buffer of a run: sources, their shares of a batch, and who may be used how often.

    the step's own groups ──▶ batch (a share of the mixture, if `fresh` is one of its sources)
              │
              └─admit─▶ source ─sample─▶ batch ──▶ used once more ──▶ held on, or USED_UP

    order of a step     with fresh groups in the batch     without
    1                   too old ones leave                 too old ones leave
    2                   sources are sampled                the step's groups are admitted
    3                   uses are counted                   sources are sampled
    4                   the step's groups are admitted,    uses are counted
                        as used once

A group is held as long as one source holds it. What a step does follows from the seed, the groups that were admitted
and the uses before it; of a step that the log has, uses are as the log says (`recall`), so that the rounding of another
machine's powers changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from forge_core.buffers.chance import stream
from forge_core.buffers.source import Item, Reason, Source

FRESH = "fresh"
"""Name of the source that is the step's own groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A group in a batch."""

    group_id: str
    """The group."""
    source: str
    """Where it is from."""
    weight: float = 1.0
    """Importance weight of how it was drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a step takes from the buffer, and who leaves it."""

    picks: tuple[Pick, ...]
    """The batch: fresh groups first, then by source."""
    left: dict[Reason, tuple[str, ...]]
    """Groups that no source holds any more, by reason."""


class ReplayBuffer:
    """The groups of one run that may be trained on again.

    Example:
        buffer = ReplayBuffer({"success": Fifo(capacity=512, min_reward=0.5)}, {"success": 64}, max_uses=4,
                              has_fresh=True, seed=0)
        choice = buffer.choose(1, fresh)
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        shares: Mapping[str, int],
        *,
        max_uses: int,
        has_fresh: bool,
        seed: int,
    ) -> None:
        self._sources = dict(sources)
        self._shares = dict(shares)
        self._max_uses = max_uses
        self._has_fresh = has_fresh
        self._seed = seed
        self._held: dict[str, int] = {}
        """How many sources hold a group."""
        self._uses: Counter[str] = Counter()
        """Of groups that are held."""
        self.step = 0
        """The step that was chosen last."""

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._held

    def uses(self, group_id: str) -> int:
        """How often a group that is held was used."""
        return self._uses[group_id]

    def choose(self, step: int, fresh: Sequence[Item], *, is_last: bool = False) -> Choice:
        """The batch of the next step, and who leaves."""
        return self._go_on(step, fresh, None, is_last=is_last)

    def recall(
        self, step: int, fresh: Sequence[Item], picks: Sequence[Pick], *, is_last: bool = False
    ) -> Choice:
        """Do what was chosen for a step before. Raises ValueError for a group that is neither held nor fresh."""
        return self._go_on(step, fresh, picks, is_last=is_last)

    def _go_on(
        self, step: int, fresh: Sequence[Item], known: Sequence[Pick] | None, *, is_last: bool
    ) -> Choice:
        if step <= self.step:
            raise ValueError(f"step {step} does not follow step {self.step}")
        self.step = step
        left: dict[Reason, list[str]] = {}
        for source in self._sources.values():
            self._leave(source.expire(step), Reason.STALE, left)
        if not self._has_fresh:
            self._admit(fresh, left)
        picks = self._draw(step, fresh) if known is None else list(known)
        self._check(picks, fresh)
        self._use([pick for pick in picks if pick.source != FRESH], left)
        if self._has_fresh:
            self._admit(fresh, left)
            self._use([pick for pick in picks if pick.source == FRESH], left)
        if is_last:
            for group_id in tuple(self._held):
                self._discard(group_id, Reason.END_OF_RUN, left)
        return Choice(
            picks=tuple(picks), left={reason: tuple(groups) for reason, groups in left.items()}
        )

    def _draw(self, step: int, fresh: Sequence[Item]) -> list[Pick]:
        picks = (
            [Pick(group_id=item.group_id, source=FRESH) for item in fresh]
            if self._has_fresh
            else []
        )
        for name, source in self._sources.items():
            drawn = source.sample(
                self._shares[name],
                stream(self._seed, "sample", name, step),
                {pick.group_id for pick in picks},
            )
            picks += [Pick(group_id=d.group_id, source=name, weight=d.weight) for d in drawn]
        return picks

    def _check(self, picks: Iterable[Pick], fresh: Sequence[Item]) -> None:
        new = {item.group_id for item in fresh} if self._has_fresh else set()
        for pick in picks:
            if pick.group_id not in self._held and pick.group_id not in new:
                raise ValueError(
                    f"group {pick.group_id} of source {pick.source!r} is not in the buffer at step {self.step}: the "
                    "log is another code's, or damaged"
                )

    def _admit(self, fresh: Sequence[Item], left: dict[Reason, list[str]]) -> None:
        for item in fresh:
            takers = [source for source in self._sources.values() if source.wants(item)]
            self._held[item.group_id] = len(takers)
            if not takers:
                self._forget(item.group_id, Reason.UNWANTED, left)
            for source in takers:
                if (gone := source.admit(item)) is not None:
                    self._leave([gone[0]], gone[1], left)

    def _use(self, picks: Iterable[Pick], left: dict[Reason, list[str]]) -> None:
        for pick in picks:
            if pick.group_id not in self._held:  # fresh, and left at once
                continue
            self._uses[pick.group_id] += 1
            for source in self._sources.values():
                if pick.group_id in source:
                    source.use(pick.group_id)
            if self._uses[pick.group_id] >= self._max_uses:
                self._discard(pick.group_id, Reason.USED_UP, left)

    def _leave(
        self, group_ids: Iterable[str], reason: Reason, left: dict[Reason, list[str]]
    ) -> None:
        """A source holds these no more."""
        for group_id in group_ids:
            self._held[group_id] -= 1
            if not self._held[group_id]:
                self._forget(group_id, reason, left)

    def _discard(self, group_id: str, reason: Reason, left: dict[Reason, list[str]]) -> None:
        """No source is to hold this any more."""
        for source in self._sources.values():
            source.discard(group_id)
        self._forget(group_id, reason, left)

    def _forget(self, group_id: str, reason: Reason, left: dict[Reason, list[str]]) -> None:
        self._held.pop(group_id)
        self._uses.pop(group_id, None)
        left.setdefault(reason, []).append(group_id)
