"""One episode from a prompt: the function that every regime runs.

`generate_episode()` sees a policy and a prompt and nothing of engines, weights or regimes. It may take as many
turns as it likes; tokens are never decoded and encoded again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from forge_core.user_code import load_object


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

    def encode(self, text: str) -> list[int]:
        """Token ids of text that goes on from what is there, such as a tool's answer; no special tokens are added."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens, special tokens left out."""
        ...

    async def sample(self, token_ids: list[int], *, seed: int) -> Sample:
        """Continue `token_ids` as the config's sampling section says; with nothing where the context is full."""
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


EpisodeFunction = Callable[..., Awaitable[Episode]]
"""`async (policy, prompt_text, *, seed) -> Episode`."""


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on every part and on nothing else."""
    text = json.dumps(parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Transcript:
    """An episode under way: what the policy writes and what it is told, as one sequence of tokens.

    Example:
        async def generate_episode(policy, prompt_text, *, seed):
            transcript = Transcript(policy, prompt_text, seed=seed)
            answer = await transcript.policy_writes()
            if "search:" in answer:
                transcript.tell("tool", look_up(answer))
                await transcript.policy_writes()
            return transcript.episode()
    """

    def __init__(self, policy: Policy, prompt_text: str, *, seed: int) -> None:
        self._policy = policy
        self._prompt = policy.encode_prompt(prompt_text)
        self._seed = seed
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._mask: list[bool] = []
        self._versions: list[int] = []
        self._turns: list[Turn] = []
        self._finish_reason = "stop"

    async def policy_writes(self) -> str:
        """Have the policy go on; the text that it wrote."""
        # Each turn has random numbers of its own; the first has those of an episode of one turn.
        own_turns = sum(turn.role == "policy" for turn in self._turns)
        seed = derive_seed(self._seed, own_turns) if own_turns else self._seed
        sample = await self._policy.sample(self._prompt + self._tokens, seed=seed)
        self._add(
            "policy", sample.token_ids, sample.logprobs, sample.token_policy_versions, is_ours=True
        )
        self._finish_reason = sample.finish_reason
        return self._policy.decode(sample.token_ids)

    def tell(self, role: str, text: str) -> None:
        """Append what somebody else says; it is seen by the policy and not trained on."""
        tokens = self._policy.encode(text)
        version = self._versions[-1] if self._versions else 0
        zeros = [0.0] * len(tokens)
        self._add(role, tokens, zeros, [version] * len(tokens), is_ours=False)

    def _add(
        self,
        role: str,
        tokens: list[int],
        logprobs: list[float],
        versions: list[int],
        *,
        is_ours: bool,
    ) -> None:
        start = len(self._tokens)
        self._tokens += tokens
        self._logprobs += logprobs
        self._versions += versions
        self._mask += [is_ours] * len(tokens)
        self._turns.append(Turn(role=role, start=start, end=len(self._tokens)))

    def episode(self) -> Episode:
        """What came of it."""
        return Episode(
            prompt_token_ids=self._prompt,
            response_token_ids=self._tokens,
            logprobs=self._logprobs,
            mask=self._mask,
            token_policy_versions=self._versions,
            finish_reason=self._finish_reason,
            response=self._policy.decode(self._tokens),
            turns=self._turns,
            seed=self._seed,
        )


async def generate_episode(policy: Policy, prompt_text: str, *, seed: int) -> Episode:
    """One question, one answer."""
    transcript = Transcript(policy, prompt_text, seed=seed)
    await transcript.policy_writes()
    return transcript.episode()


class EpisodeError(Exception):
    """A `generate_episode` of the user's failed; the message names it and the prompt."""


def custom_generate_episode(reference: str, *, timeout_seconds: float) -> EpisodeFunction:
    """A user's `generate_episode`, whose failures name it and the prompt, an overrun deadline among them.

    Raises ValueError if it does not resolve.
    """
    function = load_object("generate_episode", reference)

    async def generate(policy: Policy, prompt_text: str, *, seed: int) -> Episode:
        try:
            async with asyncio.timeout(timeout_seconds) as deadline:
                episode = await function(policy, prompt_text, seed=seed)
        except Exception as error:  # It is the user's: it may raise anything.
            what = (
                f"gave no episode within {timeout_seconds:g} s"
                if deadline.expired()
                else f"raised {type(error).__name__}: {error}"
            )
            raise EpisodeError(
                f"generate_episode {reference!r} {what}, on the prompt {prompt_text[:200]!r}"
            ) from error
        if not isinstance(episode, Episode):
            raise EpisodeError(
                f"generate_episode {reference!r} returned {type(episode).__name__} where an Episode is due, on the "
                f"prompt {prompt_text[:200]!r}"
            )
        return episode

    return generate
