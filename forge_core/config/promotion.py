"""When a checkpoint takes the place of the one that was promoted last."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from forge_core.config.base import Section


class PromotionConfig(Section):
    """What an experiment's checkpoint is held against, and how much better it must be."""

    line: str = "default"
    """Name of the line of promoted checkpoints that the experiment belongs to; each line has one newest."""
    score: Literal["sampled", "greedy"] = "sampled"
    """Which answers to the held-out prompts are compared: those sampled as in training, or the greedy ones."""
    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """Share of the bootstrap's means that lie within the interval of the gain."""
    min_gain: float = Field(0.0, ge=0.0)
    """What the lower end of that interval must exceed, in the score's unit."""
    min_score: float | None = None
    """Mean score below which nothing is promoted, the first checkpoint of a line among it; none: no such bound."""
    resamples: int = Field(10_000, ge=1_000, le=1_000_000)
    """How often the bootstrap draws prompts."""
