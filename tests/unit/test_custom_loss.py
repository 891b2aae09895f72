"""A loss of the user's: what it gives is checked, and its mean is over the batch's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forge_core.algorithms.custom_loss import CustomLoss
from forge_core.algorithms.tokens import Tokens

LOSSES = """
import torch

def reinforce(logprobs, sampled_logprobs, advantages, mask):
    return torch.where(mask, -advantages[:, None] * logprobs, float("nan"))

def scalar(logprobs, sampled_logprobs, advantages, mask):
    return logprobs.mean()

def raises(logprobs, sampled_logprobs, advantages, mask):
    raise KeyError("beta")

def detached(logprobs, sampled_logprobs, advantages, mask):
    return logprobs.detach()
"""
MASK = torch.tensor([[True, True, False], [False, True, True]])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "losses.py"
    path.write_text(LOSSES)
    return path


def _loss(file: Path, name: str, logprobs: torch.Tensor) -> torch.Tensor:
    sampled, advantages = logprobs.detach() - 0.1, torch.tensor([1.0, -2.0])
    tokens = Tokens(
        logprobs_BT=logprobs,
        sampled_logprobs_BT=sampled,
        advantages_BT=advantages[:, None].expand_as(logprobs),
        entropy_BT=torch.zeros_like(sampled),
        mask_BT=MASK,
        num_tokens=8.0,
        num_sequences=2.0,
        max_tokens=3,
    )
    return CustomLoss(f"{file}:{name}")(tokens, advantages).loss


def test_it_is_the_sum_over_the_policys_tokens_by_the_batchs_tokens(file: Path) -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]], requires_grad=True)
    loss = _loss(file, "reinforce", logprobs)
    assert float(loss.detach()) == (1.0 * 3 - 2.0 * 48) / 8
    loss.backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, torch.tensor([[-1.0, -1.0, 0.0], [0.0, 2.0, 2.0]]) / 8)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scalar", r"returned Tensor of shape \(\); a tensor of shape \(2, 3\) is due"),
        ("raises", "raised KeyError: 'beta'"),
        ("detached", "without a gradient"),
    ],
)
def test_what_is_no_loss_is_one_error_that_names_it(file: Path, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        _loss(file, name, torch.full((2, 3), -1.0, requires_grad=True))
    assert f"{file}:{name}" in str(caught.value)
