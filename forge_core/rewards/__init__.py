"""Reward functions of the user's, with TRL's signature, in a process that can be killed."""

from __future__ import annotations

from forge_core.rewards.process import RewardError, RewardProcess

__all__ = ["RewardError", "RewardProcess"]
