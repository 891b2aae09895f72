"""Losses and estimators a second time: NumPy, one token after another, by cases, sharing nothing with what they check.

Arrays have one row a sequence and one column a position. `frozen` are the logprobs that weights without gradient are
made from: the same as `logprobs` for a value, and left where they are while a slope is taken.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a loss is computed from."""

    logprobs: Array
    sampled: Array
    advantages: Array
    mask: Array
    entropy: Array
    proximal: Array | None = None
    num_tokens: float = 1.0
    num_sequences: float = 1.0
    max_tokens: int = 12
    loss: str = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    weights: str = "none"
    level: str = "token"
    low: float = 0.5
    high: float = 2.0
    entropy_coefficient: float = 0.0
    reference: Array | None = None
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    frozen: Array | None = field(default=None)


def loss(case: Case) -> float:
    """The loss of a case, sequence by sequence."""
    frozen = case.logprobs if case.frozen is None else case.frozen
    anchor = case.sampled if case.proximal is None else case.proximal
    total = 0.0
    for row in range(len(case.mask)):
        columns = [int(column) for column in np.flatnonzero(case.mask[row])]
        if not columns:
            continue
        logs = [case.logprobs[row, t] - anchor[row, t] for t in columns]
        frozen_logs = [frozen[row, t] - anchor[row, t] for t in columns]
        newer = frozen if case.proximal is None else case.proximal
        weights = _weights(case, [newer[row, t] - case.sampled[row, t] for t in columns])
        ratios = _ratios(case.loss, logs)
        terms = []
        for place, t in enumerate(columns):
            advantage = case.advantages[row, t]
            if case.loss == "cispo":
                ratio = math.exp(frozen_logs[place])
                bounded = max(1 - case.clip_low, min(ratio, 1 + case.clip_high))
                gain = bounded * advantage * case.logprobs[row, t]
            else:
                gain = clipped(ratios[place], advantage, case.clip_low, case.clip_high)
            terms.append(-weights[place] * gain)
            if case.reference is not None:
                apart = kl(case.logprobs[row, t], case.reference[row, t], case.kl_estimator)
                terms[-1] += case.kl_coefficient * apart
        total += _averaged(case, terms)
        bonus = sum(case.entropy[row, t] for t in columns) / case.num_tokens
        total -= case.entropy_coefficient * bonus
    return total


def clipped(ratio: float, advantage: float, clip_low: float, clip_high: float) -> float:
    """By cases instead of a minimum."""
    if advantage > 0:
        return min(ratio, 1 + clip_high) * advantage
    return max(ratio, 1 - clip_low) * advantage


def kl(logprob: float, reference: float, estimator: str) -> float:
    """Schulman's estimators, by the ratio r = p_ref / p: -log r, (log r)^2 / 2, r - 1 - log r."""
    ratio = math.exp(reference - logprob)
    if estimator == "k1":
        return -math.log(ratio)
    if estimator == "k2":
        return math.log(ratio) ** 2 / 2
    return ratio - 1 - math.log(ratio)


def _ratios(name: str, logs: list[float]) -> list[float]:
    if name == "gspo":
        return [math.exp(sum(logs) / len(logs))] * len(logs)
    if name == "rloo":
        return [math.prod(math.exp(each) for each in logs)] * len(logs)
    return [math.exp(each) for each in logs]


def _weights(case: Case, logs: list[float]) -> list[float]:
    if case.weights == "none":
        return [1.0] * len(logs)
    if case.level == "sequence":
        logs = [sum(logs)] * len(logs)
    kept = []
    for each in map(math.exp, logs):
        if case.weights == "truncated":
            kept.append(min(each, case.high))
        elif case.weights == "masked" and not case.low <= each <= case.high:
            kept.append(0.0)
        else:
            kept.append(each if case.proximal is not None else 1.0)
    return kept


def _averaged(case: Case, terms: list[float]) -> float:
    if case.loss in ("dapo", "cispo", "ppo"):
        return sum(terms) / case.num_tokens
    if case.loss == "dr_grpo":
        return sum(terms) / (case.num_sequences * case.max_tokens)
    return sum(terms) / len(terms) / case.num_sequences


def slopes(case: Case, step: float = 1e-6) -> Array:
    """Finite differences of the loss by each logprob."""
    found = np.zeros_like(case.logprobs)
    for place in np.ndindex(found.shape):
        ends = []
        for sign in (1, -1):
            moved = case.logprobs.copy()
            moved[place] += sign * step
            ends.append(loss(replace(case, logprobs=moved, frozen=case.logprobs)))
        found[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def group_advantages(rewards: list[float], *, scale: bool) -> list[float]:
    """One group: sample standard deviation, zeros where all are equal."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    divisor = variance**0.5 + 1e-4 if scale else 1.0
    return [(reward - mean) / divisor for reward in rewards]


def leave_one_out(rewards: list[float]) -> list[float]:
    """One group: each reward less the mean of the others."""
    found = []
    for place, reward in enumerate(rewards):
        others = [each for other, each in enumerate(rewards) if other != place]
        found.append(reward - math.fsum(others) / len(others))
    return found


def overlong(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's equation 13, by its three cases."""
    if length <= max_tokens - buffer:
        return 0.0
    if length <= max_tokens:
        return ((max_tokens - buffer) - length) / buffer
    return -1.0


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """One sequence: each advantage as the sum of all later errors, weighed (Schulman et al. 2016, equation 16)."""
    following = [*values, 0.0][1:]
    errors = [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=True)]
    return [
        math.fsum((gamma * lam) ** (later - t) * errors[later] for later in range(t, len(errors)))
        for t in range(len(errors))
    ]


def value_loss(value: float, old: float, target: float, clip: float) -> float:
    """One token, by cases: what moved by more than `clip` is judged where it may go, if that is worse."""
    error = (value - target) ** 2
    if clip and abs(value - old) > clip:
        bound = old + math.copysign(clip, value - old)
        error = max(error, (bound - target) ** 2)
    return error / 2
