"""The optimizer, the warm start, and how far both sides may be apart."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from forge_core.config.base import Section


class OptimizerConfig(Section):
    """AdamW for post-training, with warm-up and a schedule."""

    learning_rate: float = Field(3e-4, ge=0.0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls from the first step to the last: not at all, along a line, or along half a cosine."""
    final_learning_rate_fraction: float = Field(1.0, ge=0.0, le=1.0)
    """Share of the peak that it has fallen to at the last step; 1: it does not fall."""
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

    @model_validator(mode="after")
    def _falls_as_it_says(self) -> Self:
        final = self.final_learning_rate_fraction
        if self.schedule == "constant" and final != 1.0:
            raise ValueError(
                f"final_learning_rate_fraction {final:g} is what the rate falls to, and schedule is 'constant': set "
                "schedule to 'linear' or 'cosine', or leave the fraction out"
            )
        if self.schedule == "cosine" and final == 1.0:
            raise ValueError(
                "schedule 'cosine' falls nowhere with final_learning_rate_fraction 1: set the fraction, to 0 for "
                "instance"
            )
        return self


class WarmStartConfig(Section):
    """Supervised training before reinforcement, on the environment's reference answers or on data of yours."""

    steps: int = Field(0, ge=0)
    """Optimizer steps, at most where there is `patience`; 0: none."""
    batch_size: int = Field(256, ge=1)
    """Answers per step."""
    learning_rate: float = Field(1e-3, ge=0.0)
    """Peak learning rate, linear warm-up over a tenth of the steps."""
    data: str | None = None
    """A JSONL, Parquet or Arrow file, or a folder of them such as a Hugging Face dataset, whose rows have `messages` or
    `prompt` and `completion`; none: reference answers of training prompts."""
    split: str = "train"
    """Which files of a folder, where they are named after splits."""
    max_tokens: int = Field(4096, ge=2)
    """A row of `data` with more tokens is refused."""
    validation_fraction: float = Field(0.0, ge=0.0, le=0.5)
    """Share of `data` that is put aside by a hash of what is asked, to validate with."""
    validate_every: int = Field(10, ge=1)
    """Steps between validations. The weights of the best one become version 0."""
    patience: int | None = Field(None, ge=1)
    """Validations in a row without a lower loss after which training stops; none: it never stops early."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.data is not None and not self.steps:
            raise ValueError(f"data {self.data!r} is trained on in steps, and steps is 0: set it")
        if self.validation_fraction and self.data is None:
            raise ValueError(
                f"validation_fraction {self.validation_fraction:g} is a share of data, and there is none: set data"
            )
        if self.patience is not None and not self.validation_fraction:
            raise ValueError(
                f"patience {self.patience} waits for validations, and there are none: set validation_fraction"
            )
        return self


class ParityConfig(Section):
    """How far the logprobs of trainer and generator may be apart on the probe, at each publish."""

    max_mean: float = Field(1e-3, gt=0.0)
    """Bound on the mean absolute difference, in nats."""
    max_max: float = Field(1e-2, gt=0.0)
    """Bound on the largest absolute difference, in nats."""
    probe_tokens: int = Field(256, ge=256)
    """Least number of tokens in the probe batch."""
    min_entropy: float = Field(0.1, gt=0.0)
    """Mean entropy of the probe, in nats, below which a warning says that it shows little: a probe without doubt shows
    nothing."""
