"""A reservoir: an even sample of all groups there ever were (Vitter 1985, algorithm R; doi 10.1145/3147.3165)."""

from __future__ import annotations

from forge_core.buffers.chance import below, number
from forge_core.buffers.source import Item, Reason, Source


class Reservoir(Source):
    """Of n groups that came by, each is held with probability capacity / n.

    A group that leaves for its age or its uses keeps its seat, empty, until another takes it: so that those that are
    held stay an even sample of all that may be held.
    """

    def __init__(
        self,
        *,
        capacity: int,
        max_age: int | None = None,
        min_reward: float | None = None,
        seed: int,
        name: str = "reservoir",
    ) -> None:
        super().__init__(capacity=capacity, max_age=max_age, min_reward=min_reward)
        self._seed = seed
        self._name = name
        self._seats: list[str] = []
        """Ids of the groups that took them last; they may have left."""
        self._came_by = 0

    def _make_room(self, item: Item) -> tuple[str, Reason] | None:
        self._came_by += 1
        if len(self._seats) < self._capacity:
            self._seats.append(item.group_id)
            return None
        seat = below(self._came_by, number(self._seed, self._name, self._came_by))
        if seat >= self._capacity:
            return item.group_id, Reason.PASSED_OVER
        before, self._seats[seat] = self._seats[seat], item.group_id
        return (before, Reason.EVICTED) if self.discard(before) else None
