"""What all sources of replayed groups are: the groups that are held, and who leaves when room is needed.

admit ──▶ HELD ──▶ left: EVICTED, PASSED_OVER (room), STALE (age), USED_UP (uses), END_OF_RUN
           │  ▲
           └──┘ sample: each group at most once a batch, with the weight that makes up for how it was drawn
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

from forge_core.buffers.chance import below


class Reason(StrEnum):
    """Why a group left a buffer."""

    UNWANTED = "unwanted"
    """No source takes groups of its mean reward."""
    EVICTED = "evicted"
    """It was the oldest of a full source, or a reservoir's even sample went on without it."""
    PASSED_OVER = "passed_over"
    """A reservoir's even sample did not take it."""
    STALE = "stale"
    """Its oldest token lies further behind the weights than its sources allow."""
    USED_UP = "used_up"
    """It was trained on as often as it may be."""
    END_OF_RUN = "end_of_run"
    """There is no further step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A group, as a buffer knows it."""

    group_id: str
    """The group."""
    policy_version: int
    """Oldest version of any of its tokens."""
    reward: float = 0.0
    """Mean reward of its samples."""
    priority: float = 1.0
    """How much there is to learn of it, above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A group that was sampled."""

    group_id: str
    """The group."""
    weight: float = 1.0
    """Importance weight, at most 1."""


class Source(ABC):
    """Groups that are held, evenly drawn unless a policy says otherwise. Every method takes logarithmic time a group.

    Example:
        source = Fifo(capacity=2)
        source.admit(item_a), source.admit(item_b)  # None, None: nobody leaves
        source.admit(item_c)  # ("a", Reason.EVICTED)
        source.sample(1, chance.stream(seed, "fifo", step))  # b or c
    """

    def __init__(
        self, *, capacity: int, max_age: int | None = None, min_reward: float | None = None
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity {capacity} holds no group: set it to 1 or more")
        self._capacity = capacity
        self._max_age = max_age
        self._min_reward = min_reward
        self._items: list[Item] = []
        """Without gaps, in no order that means anything."""
        self._places: dict[str, int] = {}
        """Of each group in `_items`."""
        self._by_version: list[tuple[int, str]] = []
        """A heap; of groups that have left, too, until they come to its top."""

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._places

    def __iter__(self) -> Iterator[str]:
        """Ids of the groups that are held."""
        return (item.group_id for item in self._items)

    def wants(self, item: Item) -> bool:
        """Whether a group's mean reward is high enough."""
        return self._min_reward is None or item.reward >= self._min_reward

    def admit(self, item: Item) -> tuple[str, Reason] | None:
        """Take a group in, if the policy does; the group that leaves for it, which may be itself.

        Raises ValueError for a group that is here, and for a priority that is not above 0.
        """
        if item.group_id in self._places:
            raise ValueError(f"group {item.group_id} is in the buffer already")
        if not 0.0 < item.priority < float("inf"):
            raise ValueError(
                f"priority {item.priority} of group {item.group_id} is not above 0 and finite"
            )
        left = self._make_room(item)
        if left is None or left[0] != item.group_id:
            self._put(item)
        return left

    @abstractmethod
    def _make_room(self, item: Item) -> tuple[str, Reason] | None:
        """Discard whoever leaves for a group that is about to be put here; itself if it is not to be put here."""

    def expire(self, step: int) -> list[str]:
        """Discard the groups that are too old to be trained on at a step; their ids, the oldest first."""
        if self._max_age is None:
            return []
        oldest_allowed = step - 1 - self._max_age
        gone = []
        while self._by_version and self._by_version[0][0] < oldest_allowed:
            _, group_id = heapq.heappop(self._by_version)
            if self.discard(group_id):
                gone.append(group_id)
        return gone

    def discard(self, group_id: str) -> bool:
        """Let go of a group; whether it was here."""
        place = self._places.pop(group_id, None)
        if place is None:
            return False
        last = self._items.pop()
        if place < len(self._items):
            self._items[place] = last
            self._places[last.group_id] = place
            self._moved(place)
        self._moved(len(self._items))
        return True

    def use(self, group_id: str) -> None:  # noqa: B027, to most policies it is nothing
        """A group that is here was trained on."""

    def sample(self, most: int, bits: Iterator[int], without: Collection[str] = ()) -> list[Drawn]:
        """Up to `most` groups, each at most once and none of `without`, as the policy draws them."""
        # Fisher and Yates' shuffle, as far as it is needed, of places that are not written down.
        moved: dict[int, int] = {}
        drawn: list[Drawn] = []
        for first in range(len(self._items)):
            if len(drawn) == most:
                break
            other = first + below(len(self._items) - first, next(bits))
            place = moved.get(other, other)
            moved[other] = moved.get(first, first)
            group_id = self._items[place].group_id
            if group_id not in without:
                drawn.append(Drawn(group_id=group_id))
        return drawn

    def _put(self, item: Item) -> None:
        self._places[item.group_id] = len(self._items)
        self._items.append(item)
        if self._max_age is not None:
            heapq.heappush(self._by_version, (item.policy_version, item.group_id))
        self._moved(len(self._items) - 1)

    def _moved(self, place: int) -> None:  # noqa: B027, to most policies it is nothing
        """Another group is at a place, or none any more."""
