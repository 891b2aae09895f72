"""Prioritised replay: groups drawn by a power of their priority (Schaul et al. 2016, arXiv 1511.05952)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from forge_core.buffers.chance import fraction
from forge_core.buffers.fifo import Fifo
from forge_core.buffers.source import Drawn
from forge_core.buffers.sum_tree import SumTree


class Prioritised(Fifo):
    """The newest groups. Group i is drawn with probability P(i) = p_i^alpha / sum_k p_k^alpha (equation 1).

    Its weight is (N P(i))^-beta, over the largest of those that are drawn with it (section 3.4). Groups of a batch are
    drawn one after another, and none twice, which differs from the paper's draws with replacement: P(i) is that of the
    first draw. After each use p_i is multiplied by `use_discount`.
    """

    def __init__(
        self,
        *,
        capacity: int,
        max_age: int | None = None,
        min_reward: float | None = None,
        alpha: float = 0.6,
        beta: float = 0.4,
        use_discount: float = 1.0,
    ) -> None:
        super().__init__(capacity=capacity, max_age=max_age, min_reward=min_reward)
        self._alpha = alpha
        self.beta = beta
        """How far weights make up for the drawing, from 0, not at all, to 1."""
        self._use_discount = use_discount
        self._tree = SumTree()
        """Of p^alpha, by place."""

    def priority(self, group_id: str) -> float:
        """The priority of a group. Raises KeyError if it is not here."""
        return self._items[self._places[group_id]].priority

    def update(self, group_id: str, priority: float) -> None:
        """Give a group another priority. Raises KeyError if it is not here, ValueError unless it is above 0."""
        if not 0.0 < priority < float("inf"):
            raise ValueError(f"priority {priority} of group {group_id} is not above 0 and finite")
        place = self._places[group_id]
        self._items[place] = replace(self._items[place], priority=priority)
        self._moved(place)

    def use(self, group_id: str) -> None:
        """A group that is here was trained on: there is less to learn of it."""
        # Not to 0: a group that is held can be drawn.
        self.update(group_id, max(self.priority(group_id) * self._use_discount, 1e-300))

    def sample(self, most: int, bits: Iterator[int], without: Collection[str] = ()) -> list[Drawn]:
        """Up to `most` groups, each at most once and none of `without`, by priority and with importance weights."""
        tree = self._tree
        hidden = {
            place for group_id in without if (place := self._places.get(group_id)) is not None
        }
        for place in hidden:
            tree[place] = 0.0
        number, total = len(self) - len(hidden), tree.total
        chosen: list[tuple[int, float]] = []
        while len(chosen) < min(most, number):
            place = tree.find(fraction(next(bits)) * tree.total)
            chosen.append((place, tree[place] / total))
            tree[place] = 0.0
        for place in (*hidden, *(place for place, _ in chosen)):
            self._moved(place)
        weights = [(number * probability) ** -self.beta for _, probability in chosen]
        largest = max(weights, default=1.0)
        return [
            Drawn(group_id=self._items[place].group_id, weight=weight / largest)
            for (place, _), weight in zip(chosen, weights, strict=True)
        ]

    def _moved(self, place: int) -> None:
        there = place < len(self._items)
        self._tree[place] = self._items[place].priority ** self._alpha if there else 0.0
