"""Reward functions of the user's, with TRL's signature, in a process that can be killed."""

from __future__ import annotations

from forge_core.rewards.pool import RewardPool
from forge_core.rewards.process import RewardError, RewardLost, RewardProcess

__all__ = ["RewardError", "RewardLost", "RewardPool", "RewardProcess"]
