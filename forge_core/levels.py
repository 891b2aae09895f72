"""How far the tasks of a run have come in their curricula, by success."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from forge_core.config import CurriculumConfig


@dataclass(slots=True, kw_only=True)
class Level:
    """How far a task has come by success."""

    number: int = 0
    """Its level."""
    rewards: deque[float] = field(default_factory=deque)
    """Mean rewards of the newest groups that were drawn at this level."""

    def add(self, curriculum: CurriculumConfig, drawn_at: int, reward: float) -> None:
        """A group was committed that was drawn at a level; groups of levels that are past count no more."""
        if drawn_at != self.number or self.number == len(curriculum.levels) - 1:
            return
        assert curriculum.success is not None
        self.rewards.append(reward)
        if len(self.rewards) > curriculum.groups:
            self.rewards.popleft()
        is_full = len(self.rewards) == curriculum.groups
        if is_full and math.fsum(self.rewards) / curriculum.groups >= curriculum.success:
            self.number += 1
            self.rewards.clear()


@dataclass(slots=True, kw_only=True)
class Levels:
    """The levels by success of a run's tasks, as far as its commits were looked at."""

    by_task: dict[str, Level] = field(default_factory=dict)
    """By the name that prompts carry."""
    num_commits: int = 0
    """Commits of the log that are in it."""
