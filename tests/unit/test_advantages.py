"""Estimators of advantages, and what is taken off rewards, against a second implementation in NumPy."""

import numpy as np
import numpy_losses
import pytest
import torch

from forge_core.algorithms.advantages import (
    estimated_advantages,
    group_advantages,
    leave_one_out_advantages,
    overlong_penalty,
    whitened,
)
from forge_core.algorithms.metrics import Mean
from forge_core.config import AlgorithmConfig, LossName

REWARDS = [[0.0, 1.0, 0.25, 1.0], [-3.0, 5.0, 5.0, 100.0], [0.5, 0.5, 0.5, 0.5 + 1e-9]]


def tensor(values: list[list[float]], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_those_of_each_group_alone(scale: bool) -> None:
    found, told = group_advantages(tensor(REWARDS), scale=scale)
    wanted = [numpy_losses.group_advantages(group, scale=scale) for group in REWARDS]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-14)
    assert told == {"frac_groups_without_signal": Mean(0.0, 3.0)}


def test_without_scale_one_out_is_compared_with_the_others() -> None:
    found, _ = leave_one_out_advantages(tensor(REWARDS), scale=False)
    wanted = [numpy_losses.leave_one_out(group) for group in REWARDS]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-14)


def test_with_scale_one_out_is_whitened_over_the_batch() -> None:
    found, _ = leave_one_out_advantages(tensor(REWARDS), scale=True)
    plain = np.array([numpy_losses.leave_one_out(group) for group in REWARDS])
    wanted = (plain - plain.mean()) / (plain.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("loss", ["grpo", "rloo"])
def test_equal_rewards_give_exact_zeros(loss: LossName, dtype: torch.dtype, scale: bool) -> None:
    # The mean of equal numbers is not always that number: of seven times 0.1 it is off by a rounding error.
    rewards = tensor([[0.1] * 7, [0.4] * 7, [0.0] * 6 + [1.0]], dtype)
    assert bool((rewards - rewards.mean(dim=1, keepdim=True))[:2].any())
    config = AlgorithmConfig(loss=loss, scale_advantages=scale)
    found, told = estimated_advantages(rewards, config)
    if loss == "grpo" or not scale:
        assert found[:2].tolist() == [[0.0] * 7] * 2
    assert bool((found[2] != 0).all())
    assert told["frac_groups_without_signal"] == Mean(2.0, 3.0)


@pytest.mark.parametrize(
    ("loss", "is_scaled"), [("grpo", True), ("dr_grpo", False), ("dapo", True), ("gspo", True)]
)
def test_a_loss_has_its_advantages(loss: LossName, is_scaled: bool) -> None:
    found, _ = estimated_advantages(tensor(REWARDS), AlgorithmConfig(loss=loss))
    wanted, _ = group_advantages(tensor(REWARDS), scale=is_scaled)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("scale", [True, False])
def test_rloo_leaves_one_out(scale: bool) -> None:
    config = AlgorithmConfig(loss="rloo", scale_advantages=scale)
    found, _ = estimated_advantages(tensor(REWARDS), config)
    wanted, _ = leave_one_out_advantages(tensor(REWARDS), scale=scale)
    assert torch.equal(found, wanted)


def test_whitening_is_over_the_mask_alone() -> None:
    values = tensor([[3.0, np.nan, -1.0], [7.0, 2.5, np.inf]])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    kept = np.array([3.0, -1.0, 7.0, 2.5])
    wanted = np.zeros((2, 3))
    wanted[mask.numpy()] = (kept - kept.mean()) / (kept.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(whitened(values, mask).numpy(), wanted, rtol=1e-12)
    two = torch.tensor([[True, False, True], [False, False, False]])
    half = 4 / 2 / (8**0.5 + 1e-4)
    assert whitened(values, two).tolist() == [
        [pytest.approx(half), 0.0, pytest.approx(-half)],
        [0.0] * 3,
    ]
    one = torch.tensor([[False, False, True], [False, False, False]])
    assert whitened(values, one).tolist() == [[0.0] * 3] * 2
    assert whitened(values, one & False).tolist() == [[0.0] * 3] * 2


def test_length_costs_reward_in_the_last_tokens_alone() -> None:
    lengths = torch.tensor([[0, 11, 12, 13], [14, 15, 16, 17]])
    lost, told = overlong_penalty(lengths, max_tokens=16, overlong_tokens=4, penalty=1.0)
    wanted = [[numpy_losses.overlong(int(n), 16, 4) for n in row] for row in lengths]
    assert lost.tolist() == wanted
    assert told == {"overlong_penalty": Mean(np.sum(wanted), 8.0)}
    half, _ = overlong_penalty(lengths, max_tokens=16, overlong_tokens=4, penalty=0.5)
    assert half.tolist() == [[each / 2 for each in row] for row in wanted]
    none, told = overlong_penalty(lengths, max_tokens=16, overlong_tokens=0, penalty=1.0)
    assert (none.dtype, none.tolist(), told) == (torch.float64, [[0.0] * 4] * 2, {})
