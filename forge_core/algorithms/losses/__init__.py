"""The losses, by name: each is a composition of primitives, in a file of its own that can be read and changed alone."""

from __future__ import annotations

from collections.abc import Callable

from forge_core.algorithms.losses.cispo import cispo_loss
from forge_core.algorithms.losses.dapo import dapo_loss
from forge_core.algorithms.losses.dr_grpo import dr_grpo_loss
from forge_core.algorithms.losses.grpo import grpo_loss
from forge_core.algorithms.losses.gspo import gspo_loss
from forge_core.algorithms.losses.ppo import ppo_loss
from forge_core.algorithms.losses.rloo import rloo_loss
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig, LossName

Loss = Callable[[Tokens, AlgorithmConfig], LossShare]

LOSSES: dict[LossName, Loss] = {
    "grpo": grpo_loss,
    "dr_grpo": dr_grpo_loss,
    "dapo": dapo_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
    "rloo": rloo_loss,
    "ppo": ppo_loss,
}
"""What `algorithm.loss` chooses from."""
