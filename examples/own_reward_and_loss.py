"""A reward and a loss of your own: credit for every digit in its place, and REINFORCE with a clipped weight.

    python examples/own_reward_and_loss.py

or, from the command line, with the same two functions:

    forgeflow run --preset tiny --set reward=examples/own_reward_and_loss.py:digits_in_place \
        --set loss=examples/own_reward_and_loss.py:truncated_reinforce

Other processes import this file, so what it runs stands under `if __name__ == "__main__"`. Arguments are further
overrides, such as `steps=8`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from flows import run

if TYPE_CHECKING:
    from torch import Tensor


def digits_in_place(
    prompts: list[str], completions: list[str], fields: list[dict[str, Any]], **columns: Any
) -> list[float]:
    """TRL's signature. Half a point for the right digits in their places, the other half for a right list of them."""
    rewards = []
    for completion, task in zip(completions, fields, strict=True):
        wanted = [number[0] for number in task["sorted_numbers"]]
        given = [character for character in completion if character.isdigit()]
        in_place = sum(a == b for a, b in zip(given, wanted, strict=False)) / len(wanted)
        is_list = completion == f"[{','.join(given)}]" and len(given) == len(wanted)
        rewards.append(0.5 * in_place + 0.5 * is_list * (given == wanted))
    return rewards


def truncated_reinforce(
    logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """Per token, -min(ratio, 2) A log p: policy gradient with truncated importance weights (Espeholt et al. 2018)."""
    weight = (logprobs - sampled_logprobs).exp().clamp(max=2.0).detach()
    return -weight * advantages[:, None] * logprobs


if __name__ == "__main__":
    summary = run(
        preset="tiny",
        reward=digits_in_place,
        loss=truncated_reinforce,
        overrides=["steps=16", *sys.argv[1:]],
    )
    print(f"score {summary['eval']['initial']:.3f} -> {summary['eval']['final']:.3f}")
