"""GRPO against a second implementation in NumPy: values, gradients, clip sides, signs and shares."""

from typing import Any

import numpy as np
import pytest
import torch

from forge_core.algorithms.grpo import LossSums, group_advantages, grpo_loss
from forge_core.config import AlgorithmConfig

CONFIG = AlgorithmConfig(clip_low=0.2, clip_high=0.28)
STD_OFFSET = 1e-4
"""Keeps the division by the spread of almost equal rewards finite."""

Arrays = dict[str, Any]


def expected_advantages(rewards: list[float], *, scale: bool) -> list[float]:
    """One group, by hand: sample standard deviation, zeros where all are equal."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    divisor = variance**0.5 + STD_OFFSET if scale else 1.0
    return [(reward - mean) / divisor for reward in rewards]


def expected_loss(arrays: Arrays, num_tokens: float, config: AlgorithmConfig = CONFIG) -> float:
    """Token by token, by cases instead of a minimum."""
    total = 0.0
    for row, advantage in enumerate(arrays["advantages"]):
        for column in np.flatnonzero(arrays["mask"][row]):
            ratio = np.exp(arrays["logprobs"][row, column] - arrays["sampled"][row, column])
            if advantage > 0:
                ratio = min(ratio, 1 + config.clip_high)
            else:
                ratio = max(ratio, 1 - config.clip_low)
            total += ratio * advantage
    return float(-total / num_tokens)


@pytest.fixture
def arrays() -> Arrays:
    """Five episodes of twelve positions; ratios lie on both sides of both clips, and none near them."""
    random = np.random.default_rng(3)
    logprobs = -random.uniform(0.1, 3.0, (5, 12))
    distances = random.choice([-0.6, -0.15, -0.02, 0.0, 0.1, 0.2, 0.7], (5, 12))
    mask = random.random((5, 12)) < 0.6
    mask[:, 3], mask[2] = True, False
    advantages = np.array([1.5, -0.7, 2.0, -1.1, 0.4])
    return {
        "logprobs": logprobs,
        "sampled": logprobs - distances,
        "advantages": advantages,
        "mask": mask,
    }


def loss_of(arrays: Arrays, num_tokens: float, logprobs: torch.Tensor | None = None) -> LossSums:
    return grpo_loss(
        torch.tensor(arrays["logprobs"]) if logprobs is None else logprobs,
        torch.tensor(arrays["sampled"]),
        torch.tensor(arrays["advantages"]),
        torch.tensor(arrays["mask"]),
        num_tokens=num_tokens,
        config=CONFIG,
    )


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_those_of_each_group_alone(scale: bool) -> None:
    rewards = [[0.0, 1.0, 0.25, 1.0], [-3.0, 5.0, 5.0, 100.0], [0.5, 0.5, 0.5, 0.5 + 1e-9]]
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale=scale)
    wanted = [expected_advantages(group, scale=scale) for group in rewards]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_exact_zeros(dtype: torch.dtype, scale: bool) -> None:
    # The mean of equal numbers is not always that number: of seven times 0.1 it is off by a rounding error.
    rewards = torch.tensor([[0.1] * 7, [0.4] * 7, [0.0] * 6 + [1.0]], dtype=dtype)
    assert bool((rewards - rewards.mean(dim=1, keepdim=True))[:2].any())
    found = group_advantages(rewards, scale=scale)
    assert found[:2].tolist() == [[0.0] * 7] * 2
    assert bool((found[2] != 0).all())


def test_loss_is_that_of_the_second_implementation(arrays: Arrays) -> None:
    assert float(loss_of(arrays, 13.0).loss) == pytest.approx(
        expected_loss(arrays, 13.0), rel=1e-12
    )


def test_gradients_are_the_slopes_of_the_second_implementation(arrays: Arrays) -> None:
    logprobs = torch.tensor(arrays["logprobs"], requires_grad=True)
    loss_of(arrays, 13.0, logprobs).loss.backward()
    assert logprobs.grad is not None
    slopes = np.zeros_like(arrays["logprobs"])
    for place in np.ndindex(slopes.shape):
        above, below = ({**arrays, "logprobs": arrays["logprobs"].copy()} for _ in range(2))
        above["logprobs"][place] += 1e-6
        below["logprobs"][place] -= 1e-6
        slopes[place] = (expected_loss(above, 13.0) - expected_loss(below, 13.0)) / 2e-6
    assert np.count_nonzero(slopes) > 5
    np.testing.assert_allclose(logprobs.grad.numpy(), slopes, rtol=1e-6, atol=1e-9)


def test_on_policy_the_gradient_is_the_policy_gradient(arrays: Arrays) -> None:
    """At ratio 1 a positive advantage raises a token's logprob and a negative lowers it."""
    arrays["sampled"] = arrays["logprobs"]
    logprobs = torch.tensor(arrays["logprobs"], requires_grad=True)
    loss_of(arrays, 4.0, logprobs).loss.backward()
    assert logprobs.grad is not None
    wanted = -arrays["advantages"][:, None] * arrays["mask"] / 4.0
    np.testing.assert_allclose(logprobs.grad.numpy(), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "slope", "low", "high"),
    [
        (0.5, 1.0, 0.0, 0.0, 1.0),
        (-0.5, 1.0, -np.exp(-0.5), 0.0, 0.0),
        (0.5, -1.0, np.exp(0.5), 0.0, 0.0),
        (-0.5, -1.0, 0.0, 1.0, 0.0),
        (np.log(1.25), 1.0, -1.25, 0.0, 0.0),
        (np.log(0.78), -1.0, 0.0, 1.0, 0.0),
    ],
)
def test_only_the_ratio_that_ran_ahead_of_its_advantage_is_clipped(
    log_ratio: float, advantage: float, slope: float, low: float, high: float
) -> None:
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    sums = grpo_loss(
        logprobs,
        torch.tensor([[-1.0 - log_ratio]], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([[True]]),
        num_tokens=1.0,
        config=CONFIG,
    )
    sums.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, rel=1e-12)
    assert sums.metrics["clip_ratio/low_mean"] == low
    assert sums.metrics["clip_ratio/high_mean"] == high


def test_a_mask_shifted_by_one_is_another_loss(arrays: Arrays) -> None:
    right = float(loss_of(arrays, 13.0).loss)
    for shift in (-1, 1):
        shifted = {**arrays, "mask": np.roll(arrays["mask"], shift, axis=1)}
        found = float(loss_of(shifted, 13.0).loss)
        assert abs(found - right) > 1e-3
        assert found == pytest.approx(expected_loss(shifted, 13.0), rel=1e-12)


def test_what_lies_off_the_mask_has_no_say(arrays: Arrays) -> None:
    before = loss_of(arrays, 13.0)
    off = ~arrays["mask"]
    arrays["logprobs"][off] -= 40.0
    arrays["sampled"][off] = 0.0
    logprobs = torch.tensor(arrays["logprobs"], requires_grad=True)
    after = loss_of(arrays, 13.0, logprobs)
    after.loss.backward()
    assert after.loss.item() == before.loss.item()
    assert after.metrics == before.metrics
    assert logprobs.grad is not None
    assert not logprobs.grad[torch.tensor(off)].any()


def test_shares_of_a_batch_add_up_to_the_whole(arrays: Arrays) -> None:
    num_tokens = float(arrays["mask"].sum())
    whole = loss_of(arrays, num_tokens)
    shares = [
        loss_of({name: array[rows] for name, array in arrays.items()}, num_tokens)
        for rows in (slice(0, 2), slice(2, 5))
    ]
    assert sum(float(part.loss) for part in shares) == pytest.approx(float(whole.loss), rel=1e-12)
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in shares) == pytest.approx(value, rel=1e-12)


def test_metrics_are_sums_over_the_masked_tokens(arrays: Arrays) -> None:
    log_ratios = (arrays["logprobs"] - arrays["sampled"])[arrays["mask"]]
    metrics = loss_of(arrays, 13.0).metrics
    difference = metrics["sampling/sampling_logp_difference/mean"]
    assert difference == pytest.approx(np.abs(log_ratios).sum(), rel=1e-12)
    divergence = (np.exp(log_ratios) - 1 - log_ratios).sum()
    assert metrics["sampling/kl"] == pytest.approx(divergence, rel=1e-12)
    positive = np.broadcast_to(arrays["advantages"][:, None] > 0, arrays["mask"].shape)
    signs = positive[arrays["mask"]]
    assert metrics["clip_ratio/high_mean"] == np.sum(signs & (log_ratios > np.log(1.28)))
    assert metrics["clip_ratio/low_mean"] == np.sum(~signs & (log_ratios < np.log(0.8)))
    assert metrics["clip_ratio/high_mean"] > 0 and metrics["clip_ratio/low_mean"] > 0
