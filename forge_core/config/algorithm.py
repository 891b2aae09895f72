"""Which loss is trained with, and its numbers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from forge_core.config.base import Section

Estimator = Literal["k1", "k2", "k3"]
"""Of a token's divergence from the reference policy."""

LossName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "ppo"]

OF_ONE_LOSS: dict[str, dict[str, Any]] = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale_advantages": True},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale_advantages": False},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "scale_advantages": True},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "scale_advantages": True},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0, "scale_advantages": True},
    "rloo": {"clip_low": 0.2, "clip_high": 0.2, "scale_advantages": False},
    "ppo": {"clip_low": 0.2, "clip_high": 0.2, "scale_advantages": True},
}
"""By loss, the values of keys that nobody has set."""

OF_WEIGHTS: dict[str, dict[str, Any]] = {
    "truncated": {"high": 2.0},
    "masked": {"low": 0.5, "high": 5.0},
}
"""By kind of importance weights, the bounds that nobody has set."""


def _filled(given: Any, defaults: dict[str, Any]) -> Any:
    """`given` with these defaults; what says nothing counts as not given."""
    if not isinstance(given, dict):
        return given
    return {**defaults, **{key: value for key, value in given.items() if value is not None}}


class CorrectionConfig(Section):
    """What makes up for tokens that were sampled by older weights, or by an engine that computes otherwise."""

    anchor: Literal["sampled", "proximal"] = "sampled"
    """The policy that the loss's ratio is taken against and clipped around: `sampled`, by the logprobs that were
    recorded at sampling; `proximal`, the trainer's weights at the start of the step (Hilton et al. 2021,
    arXiv 2110.00641), which costs a forward pass."""
    weights: Literal["none", "plain", "truncated", "masked"] = "none"
    """Importance weights that the loss of a token is multiplied by: `plain`; `truncated` at `high`; `masked`, 0 beyond
    `low` and `high`. With the anchor `proximal` they are those of the proximal policy against the sampled logprobs, and
    `truncated` unless given; `none` then corrects nothing. With the anchor `sampled` the ratio is the weight, and
    `masked` leaves out what lies beyond the bounds."""
    level: Literal["token", "sequence"] = "token"
    """Whether each token has a weight, or all of a sequence the product of its tokens'."""
    low: float | None = Field(None, ge=0.0, lt=1.0)
    """Weights below it are masked. Unless given: 0.5 where weights are masked."""
    high: float | None = Field(None, ge=1.0)
    """Weights above it are truncated or masked. Unless given: 2 where they are truncated, 5 where masked."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("anchor") == "proximal":
            given = _filled(given, {"weights": "truncated"})
        weights = given.get("weights") if isinstance(given, dict) else None
        return _filled(given, OF_WEIGHTS.get(weights, {}) if isinstance(weights, str) else {})

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.anchor == "sampled" and self.weights in ("plain", "truncated"):
            raise ValueError(
                f"weights {self.weights!r} would count twice with anchor 'sampled', whose ratio is the importance "
                "weight already: set anchor to 'proximal'"
            )
        for name in ("low", "high"):
            if getattr(self, name) is not None and name not in OF_WEIGHTS.get(self.weights, {}):
                raise ValueError(
                    f"{name} {getattr(self, name)} bounds nothing with weights {self.weights!r}: leave it out"
                )
        return self


class KLConfig(Section):
    """What holds the policy near a reference policy. With a coefficient of 0 there is no reference, and no process for
    it."""

    coefficient: float = Field(0.0, ge=0.0)
    """Times the estimate, in nats, that is added to the loss of a token or subtracted from its reward."""
    place: Literal["loss", "reward"] = "loss"
    """Whether the estimate is part of the loss, by the weights in training, or of the reward, by the logprobs that were
    recorded at sampling."""
    estimator: Estimator = "k3"
    """How a token's divergence from the reference is estimated, with x = log p - log p_ref: k1 = x, k2 = x^2 / 2,
    k3 = exp(-x) - 1 + x. In the loss k1 has a gradient of mean 0 on-policy: it belongs in the reward."""
    refresh_steps: int = Field(0, ge=0)
    """The reference is the policy as it was after the newest step that is a multiple of this, counted from where the
    run begins; 0: as it was at the run's beginning. Each refresh takes a checkpoint."""

    @model_validator(mode="after")
    def _has_a_reference(self) -> Self:
        if self.coefficient == 0.0:
            for name in ("place", "estimator", "refresh_steps"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} {value!r} says nothing with coefficient 0: set coefficient above 0 or leave it out"
                    )
        return self


class CriticConfig(Section):
    """The critic, which only ppo has: a model of values that begins with the policy's weights, and its learning."""

    gamma: float = Field(1.0, gt=0.0, le=1.0)
    """What a reward is worth one token earlier."""
    gae_lambda: float = Field(0.95, ge=0.0, le=1.0)
    """How far advantages look at what came of a token (1) rather than at the next value (0)."""
    learning_rate: float = Field(1e-3, ge=0.0)
    """Learning rate, constant; AdamW's other settings are those of `optimizer`."""
    clip: float = Field(0.2, ge=0.0)
    """A value that moved further than this from the one before the step gains nothing by it; 0: no bound."""
    minibatches: int = Field(4, ge=1)
    """Optimizer updates that one pass over a batch is split into."""
    epochs: int = Field(1, ge=1)
    """Passes over a batch."""


class AlgorithmConfig(Section):
    """The loss, by name; keys that are not given follow from it."""

    loss: LossName = "dapo"
    """One of the losses under docs/algorithms, each with its advantages, ratios and mean."""
    clip_low: float = Field(0.2, ge=0.0, le=1.0)
    """The importance ratio is clipped below at 1 - clip_low. Unless given: 0.2, 0.0003 in gspo, 1 in cispo."""
    clip_high: float = Field(0.28, ge=0.0)
    """The importance ratio is clipped above at 1 + clip_high. Unless given: 0.28 in dapo, 0.0004 in gspo, 4 in cispo,
    0.2 elsewhere."""
    scale_advantages: bool = True
    """Divide advantages by a standard deviation: that of the group's rewards, in rloo and ppo that of the batch's
    advantages, less their mean. Unless given: not in dr_grpo and rloo."""
    entropy_coefficient: float = Field(0.0, ge=0.0)
    """Times the mean entropy of a token, in nats, that is subtracted from the loss."""
    overlong_tokens: int = Field(0, ge=0)
    """The last tokens before `sampling.max_tokens` in which a response loses reward, linearly up to `overlong_penalty`
    (DAPO, equation 13); 0: none."""
    overlong_penalty: float = Field(1.0, ge=0.0)
    """Reward that a response of full length loses."""
    minibatches: int = Field(1, ge=1)
    """Optimizer updates that one pass over a batch is split into."""
    epochs: int = Field(1, ge=1)
    """Passes over a batch."""
    dynamic_sampling_attempts: int = Field(0, ge=0)
    """How often a step whose groups have too few with a signal is filled up with further draws (DAPO, equation 11); in
    async, how many steps' worth of groups without one give way to others. 0: it trains on fewer."""
    max_nonfinite: int = Field(3, ge=1)
    """Batches in a row whose loss or gradient is not finite, after which the run stops; fewer are dropped, and others
    take their place."""
    correction: CorrectionConfig = CorrectionConfig()
    """Importance weights."""
    kl: KLConfig = KLConfig()
    """Divergence from a reference policy."""
    critic: CriticConfig = CriticConfig()
    """The critic of ppo."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        loss = given.get("loss", "dapo") if isinstance(given, dict) else None
        return _filled(given, OF_ONE_LOSS.get(loss, {}) if isinstance(loss, str) else {})

    @model_validator(mode="after")
    def _has_its_critic(self) -> Self:
        if self.loss != "ppo" and self.critic != CriticConfig():
            raise ValueError(
                f"critic is a part of ppo, and loss {self.loss!r} has none: set loss to 'ppo' or leave critic out"
            )
        if self.loss == "ppo" and self.dynamic_sampling_attempts:
            raise ValueError(
                f"dynamic_sampling_attempts {self.dynamic_sampling_attempts} makes up for groups without a signal, and "
                "loss 'ppo' learns from every group: set it to 0"
            )
        return self
