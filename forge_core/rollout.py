"""One episode from a prompt: the function that every regime runs.

`generate_episode()` sees a policy and a prompt and nothing of engines, weights or regimes. It may take as many
turns as it likes; tokens are never decoded and encoded again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the policy wrote in one go."""

    token_ids: list[int]
    """Sampled tokens, the end-of-sequence token among them when there is one."""
    logprobs: list[float]
    """Logprob of each token under the distribution it was sampled from, in nats."""
    token_policy_versions: list[int]
    """Version of the weights that sampled each token."""
    finish_reason: str
    """`stop` at the end-of-sequence token, `length` at the limit."""


class Policy(Protocol):
    """The model, as an episode sees it."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a user's message, through the chat template where the model has one."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens, special tokens left out."""
        ...

    async def sample(self, token_ids: list[int], *, seed: int) -> Sample:
        """Continue `token_ids` as the config's sampling section says."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A stretch of an episode's response by one speaker."""

    role: str
    """`policy`, or who else wrote it."""
    start: int
    """First token of the response that belongs to it."""
    end: int
    """One past the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One finished, unscored sample."""

    prompt_token_ids: list[int]
    """Tokens of the prompt as the policy saw them."""
    response_token_ids: list[int]
    """Everything after the prompt, of all turns."""
    logprobs: list[float]
    """Per response token, in nats; 0 where the policy did not write it."""
    mask: list[bool]
    """Per response token: did the policy write it?"""
    token_policy_versions: list[int]
    """Per response token: version of the weights."""
    finish_reason: str
    """Why the last turn ended."""
    response: str
    """The response as text."""
    turns: list[Turn]
    """Who wrote what."""
    seed: int
    """Seed of the episode's samples."""


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on every part and on nothing else."""
    text = json.dumps(parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


async def generate_episode(policy: Policy, prompt_text: str, *, seed: int) -> Episode:
    """One question, one answer."""
    prompt = policy.encode_prompt(prompt_text)
    sample = await policy.sample(prompt, seed=seed)
    return Episode(
        prompt_token_ids=prompt,
        response_token_ids=sample.token_ids,
        logprobs=sample.logprobs,
        mask=[True] * len(sample.token_ids),
        token_policy_versions=sample.token_policy_versions,
        finish_reason=sample.finish_reason,
        response=policy.decode(sample.token_ids),
        turns=[Turn(role="policy", start=0, end=len(sample.token_ids))],
        seed=seed,
    )
