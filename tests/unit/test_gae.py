"""Generalized advantages and the critic's loss against a second implementation in NumPy."""

import numpy as np
import numpy_losses
import pytest
import torch

from forge_core.algorithms.advantages import whitened
from forge_core.algorithms.batch import Sequence
from forge_core.algorithms.gae import (
    final_rewards,
    generalized_advantages,
    value_loss,
    with_advantages,
)
from forge_core.algorithms.metrics import Mean
from forge_core.config import AlgorithmConfig, CriticConfig

MASK = np.array(
    [
        [True, True, True, True, True],
        [True, False, False, True, False],  # a tool's answer between, padding on the right
        [False, False, True, True, True],  # padding on the left
        [False, False, False, False, False],
    ]
)


def arrays(count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=MASK.shape) for _ in range(count)]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.8, 0.0)])
def test_advantages_are_those_of_the_sum_over_all_later_errors(
    gamma: float, gae_lambda: float
) -> None:
    rewards, values = arrays(2)
    # What stands off the mask has no say.
    found = generalized_advantages(
        torch.tensor(np.where(MASK, rewards, np.nan)),
        torch.tensor(np.where(MASK, values, np.inf)),
        torch.tensor(MASK),
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    wanted = np.zeros(MASK.shape)
    for row, mask in enumerate(MASK):
        wanted[row, mask] = numpy_losses.gae(
            rewards[row, mask].tolist(), values[row, mask].tolist(), gamma, gae_lambda
        )
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-14)


def test_without_a_discount_an_advantage_is_what_was_gained_over_the_value() -> None:
    rewards, values = arrays(2, seed=3)
    full = torch.ones(MASK.shape, dtype=torch.bool)
    found = generalized_advantages(
        torch.tensor(rewards), torch.tensor(values), full, gamma=1.0, gae_lambda=1.0
    )
    to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(found.numpy(), to_go - values, rtol=1e-12)


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_the_value_loss_and_its_gradient(clip: float) -> None:
    values, old, returns = arrays(3, seed=5)
    old = values - old / 2

    def of_mask(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.where(MASK, array, np.nan))

    tensor = of_mask(values).requires_grad_()
    loss, told = value_loss(
        tensor, of_mask(old), of_mask(returns), torch.tensor(MASK), clip=clip, num_tokens=16
    )
    loss.backward()

    def total(changed: np.ndarray) -> float:
        places = zip(*np.nonzero(MASK), strict=True)
        return sum(
            numpy_losses.value_loss(changed[p], old[p], returns[p], clip) / 16 for p in places
        )

    assert loss.item() == pytest.approx(total(values), rel=1e-12)
    slopes = np.zeros(MASK.shape)
    for place in np.ndindex(MASK.shape):
        ends = []
        for sign in (1, -1):
            moved = values.copy()
            moved[place] += sign * 1e-6
            ends.append(total(moved))
        slopes[place] = (ends[0] - ends[1]) / 2e-6
    assert tensor.grad is not None
    np.testing.assert_allclose(tensor.grad.numpy(), slopes, rtol=1e-6, atol=1e-9)
    means = {name: metric for name, metric in told.items() if isinstance(metric, Mean)}
    assert means["loss/value_avg"].count == MASK.sum()
    assert means["loss/value_avg"].total == pytest.approx(16 * loss.item(), rel=1e-12)
    assert (means["val/clipfrac_avg"].total > 0) == (clip > 0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_value_that_ran_ahead_gains_nothing_by_it(sign: float) -> None:
    """From 0 to 1 of 2: allowed is 0.3, and the loss is that of 0.3, without a gradient."""
    value = torch.tensor([[sign]], requires_grad=True)
    old, target = torch.zeros(1, 1), torch.full((1, 1), 2 * sign)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, told = value_loss(value, old, target, mask, clip=0.3, num_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(1.7**2 / 2)
    assert value.grad is not None and value.grad.item() == 0.0
    assert told["val/clipfrac_avg"] == Mean(1.0, 1.0)


def test_returns_that_are_all_equal_explain_nothing() -> None:
    sequence = Sequence(
        token_ids=[7, 7, 7], num_prompt_tokens=1, mask=[True, True], figures={"values": [0.5, 1.0]}
    )
    config = AlgorithmConfig(loss="ppo", critic=CriticConfig(gamma=1.0, gae_lambda=1.0))
    _, told = with_advantages([sequence], final_rewards([2.0], [sequence.mask]), config)
    assert told == {
        "val/explained_variance": Mean(0.0, 1.0),
        "val/value_mean": Mean(1.5, 2.0),
        "val/return_mean": Mean(4.0, 2.0),
    }


def test_a_token_alone_is_enough() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    found = generalized_advantages(3 * one, one, one.bool(), gamma=0.9, gae_lambda=0.5)
    assert found.tolist() == [[2.0]]
    with pytest.raises(ValueError, match="zip"):
        final_rewards([1.0, 2.0], [[True]])


def test_rewards_stand_at_the_last_token_that_the_policy_wrote() -> None:
    found = final_rewards([1.0, 2.0, 3.0], [[True, True], [True, False, True, False], [False]])
    assert found.tolist() == [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("scale", [True, False])
def test_sequences_get_advantages_and_returns(scale: bool) -> None:
    masks = [[True, True, True], [True, False, True, True]]
    values = [[0.5, -0.25, 1.0], [0.25, 9.0, 0.5, 0.125]]
    sequences = [
        Sequence(
            token_ids=[7] * (2 + len(mask)),
            num_prompt_tokens=2,
            mask=mask,
            figures={"values": of_tokens},
        )
        for mask, of_tokens in zip(masks, values, strict=True)
    ]
    config = AlgorithmConfig(
        loss="ppo", scale_advantages=scale, critic=CriticConfig(gamma=0.9, gae_lambda=0.5)
    )
    rewards = final_rewards([1.0, -1.0], masks)
    found, told = with_advantages(sequences, rewards, config)
    first = numpy_losses.gae([0.0, 0.0, 1.0], values[0], 0.9, 0.5)
    second = numpy_losses.gae([0.0, 0.0, -1.0], [0.25, 0.5, 0.125], 0.9, 0.5)
    plain = torch.tensor([[*first, 0.0], [second[0], 0.0, *second[1:]]])
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    wanted = whitened(plain, mask) if scale else plain
    assert found[0].figures["advantages"] == pytest.approx(wanted[0, :3].tolist(), rel=1e-5)
    assert found[1].figures["advantages"] == pytest.approx(wanted[1].tolist(), rel=1e-5)
    returns = [a + v for a, v in zip(first, values[0], strict=True)]
    assert found[0].figures["returns"] == pytest.approx(returns, rel=1e-12)
    assert found[1].figures["returns"][1] == 0.0
    assert found[0].figures["values"] == values[0]
    explained = told["val/explained_variance"]
    all_values = np.array([*values[0], 0.25, 0.5, 0.125])
    all_returns = np.array(
        [*returns, *(a + v for a, v in zip(second, all_values[3:], strict=True))]
    )
    wanted_share = 1 - np.var(all_returns - all_values) / np.var(all_returns)
    assert isinstance(explained, Mean) and explained.total == pytest.approx(wanted_share)
