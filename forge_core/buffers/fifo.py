"""First in, first out: the newest groups, drawn evenly. What most replay buffers are (Lin 1992; Mnih et al. 2015)."""

from __future__ import annotations

from collections import deque

from forge_core.buffers.source import Item, Reason, Source


class Fifo(Source):
    """The newest groups. When there is no room, the one that was admitted first leaves."""

    def __init__(
        self, *, capacity: int, max_age: int | None = None, min_reward: float | None = None
    ) -> None:
        super().__init__(capacity=capacity, max_age=max_age, min_reward=min_reward)
        self._order: deque[str] = deque()
        """As admitted; groups that have left, too, until they come to its front."""

    def _make_room(self, item: Item) -> tuple[str, Reason] | None:
        self._order.append(item.group_id)
        if len(self) < self._capacity:
            return None
        while not self.discard(oldest := self._order.popleft()):
            pass
        return oldest, Reason.EVICTED
