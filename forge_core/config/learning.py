"""The optimizer, the warm start, and how far both sides may be apart."""

from __future__ import annotations

from pydantic import Field

from forge_core.config.base import Section


class OptimizerConfig(Section):
    """AdamW for post-training, with linear warm-up and decay."""

    learning_rate: float = Field(3e-4, ge=0.0)
    """Peak learning rate."""
    final_learning_rate_fraction: float = Field(1.0, ge=0.0, le=1.0)
    """Share of the peak that the rate has fallen to, linearly, at the last step; 1: constant."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0.0)
    """Added to the denominator."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay per step, times the learning rate."""
    max_gradient_norm: float = Field(1.0, gt=0.0)
    """The gradient is scaled down to this norm."""


class WarmStartConfig(Section):
    """Supervised training on reference answers before reinforcement."""

    steps: int = Field(0, ge=0)
    """Optimizer steps; 0: none."""
    batch_size: int = Field(256, ge=1)
    """Answers per step."""
    learning_rate: float = Field(1e-3, ge=0.0)
    """Peak learning rate, linear warm-up over a tenth of the steps."""


class ParityConfig(Section):
    """How far the logprobs of trainer and generator may be apart on the probe, at each publish."""

    max_mean: float = Field(1e-3, gt=0.0)
    """Bound on the mean absolute difference, in nats."""
    max_max: float = Field(1e-2, gt=0.0)
    """Bound on the largest absolute difference, in nats."""
    probe_tokens: int = Field(256, ge=256)
    """Least number of tokens in the probe batch."""
    min_entropy: float = Field(0.1, gt=0.0)
    """Least mean entropy of the probe, in nats: a probe without doubt shows nothing."""
