"""The learning rate of a step."""

from __future__ import annotations

import math

from forge_core.config import OptimizerConfig


def learning_rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Of a step, from 1, of a run of so many: peak x warm-up x decay.

    Warm-up is min(1, step / warmup_steps). Decay goes with s = (step - 1) / (steps - 1) from 1 to the final fraction f:
    1 - (1 - f) s where it is linear, f + (1 - f) (1 + cos(pi s)) / 2 where it is a cosine (Loshchilov and Hutter 2017,
    arXiv 1608.03983, equation 5, without restarts), and 1 where it is constant.
    """
    rising = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
    # A loop of the user's may go on beyond the steps that the schedule was made for.
    progress = min(1.0, (step - 1) / max(1, steps - 1))
    final = settings.final_learning_rate_fraction
    if settings.schedule == "cosine":
        falling = final + (1.0 - final) * (1.0 + math.cos(math.pi * progress)) / 2.0
    else:  # A constant rate has a final fraction of 1.
        falling = 1.0 - (1.0 - final) * progress
    return settings.learning_rate * rising * falling
