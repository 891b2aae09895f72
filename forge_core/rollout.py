"""One episode from a prompt: the function that every regime runs.

`generate_episode()` sees a policy and a prompt and nothing of engines, weights or regimes. It may take as many
turns as it likes; tokens are never decoded and encoded again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forge_core.user_code import load_object

TRUNCATED = "length"
"""Finish reason of what was cut off by a limit."""


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
    """`stop` at the end-of-sequence token or a text that was to end it, `length` at the limit."""
    stopped_at: str | None = None
    """The text that ended it, which its tokens hold; None at the end-of-sequence token and at the limit."""


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

    async def sample(
        self,
        token_ids: list[int],
        *,
        seed: int,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
    ) -> Sample:
        """Continue `token_ids` as the config's sampling section says; with nothing where the context is full.

        Ends with the token that completes one of the texts `stop`, and after `max_tokens`, if that is less than
        `sampling.max_tokens`.
        """
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
    """Why the last turn ended; `length` also where another budget of the episode was used up."""
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
        self.stopped_at: str | None = None
        """The text of `stop` that ended the policy's last turn, if one did."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the response so far."""
        return len(self._tokens)

    @property
    def is_truncated(self) -> bool:
        """Whether the policy's last turn ended at a limit."""
        return self._finish_reason == TRUNCATED

    async def policy_writes(
        self, *, stop: Sequence[str] = (), max_tokens: int | None = None
    ) -> str:
        """Have the policy go on, to the end or one of the texts `stop`; the text that it wrote."""
        # Each turn has random numbers of its own; the first has those of an episode of one turn.
        own_turns = sum(turn.role == "policy" for turn in self._turns)
        seed = derive_seed(self._seed, own_turns) if own_turns else self._seed
        sample = await self._policy.sample(
            self._prompt + self._tokens, seed=seed, stop=stop, max_tokens=max_tokens
        )
        self._add(
            "policy", sample.token_ids, sample.logprobs, sample.token_policy_versions, is_ours=True
        )
        self._finish_reason = sample.finish_reason
        self.stopped_at = sample.stopped_at
        return self._policy.decode(sample.token_ids)

    def tell(self, role: str, text: str) -> None:
        """Append what somebody else says; it is seen by the policy and not trained on."""
        self.tell_tokens(role, self._policy.encode(text))

    def tell_tokens(self, role: str, tokens: list[int]) -> None:
        """The same, as tokens."""
        version = self._versions[-1] if self._versions else 0
        zeros = [0.0] * len(tokens)
        self._add(role, tokens, zeros, [version] * len(tokens), is_ours=False)

    def truncate(self) -> None:
        """Mark that the episode did not come to its end: a budget was used up."""
        self._finish_reason = TRUNCATED

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
    name = f"generate_episode {reference!r}"

    async def generate(policy: Policy, prompt_text: str, *, seed: int) -> Episode:
        making = function(policy, prompt_text, seed=seed)
        return await own_episode(name, making, prompt_text, timeout_seconds=timeout_seconds)

    return generate


async def own_episode(
    name: str, making: Awaitable[Any], prompt_text: str, *, timeout_seconds: float
) -> Episode:
    """An episode that code of the user's makes. Raises EpisodeError, naming the code, for anything else."""
    try:
        async with asyncio.timeout(timeout_seconds) as deadline:
            episode = await making
    except EpisodeError:
        raise
    except Exception as error:  # It is the user's: it may raise anything.
        what = (
            f"gave no episode within {timeout_seconds:g} s"
            if deadline.expired()
            else f"raised {type(error).__name__}: {error}"
        )
        raise EpisodeError(f"{name} {what}, on the prompt {prompt_text[:200]!r}") from error
    if not isinstance(episode, Episode):
        raise EpisodeError(
            f"{name} returned {type(episode).__name__} where an Episode is due, on the prompt "
            f"{prompt_text[:200]!r}"
        )
    return episode
