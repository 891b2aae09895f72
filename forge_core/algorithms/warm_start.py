"""Supervised data: right answers to training prompts, and the probe of held-out ones."""

from __future__ import annotations

from typing import Any

from forge_core.algorithms.batch import Sequence
from forge_core.chat import encode_answer, encode_prompt
from forge_core.environments.base import Environment, Prompt

_MAX_PROBE_PROMPTS = 256


def _sequence(tokenizer: Any, prompt: Prompt) -> Sequence:
    prompt_ids = encode_prompt(tokenizer, prompt.text)
    answer_ids = encode_answer(tokenizer, prompt.target)
    return Sequence(
        token_ids=prompt_ids + answer_ids,
        num_prompt_tokens=len(prompt_ids),
        mask=[True] * len(answer_ids),
    )


def sequences(
    environment: Environment, tokenizer: Any, step: int, batch_size: int
) -> list[Sequence]:
    """The batch of a supervised step (from 0): the next training prompts with their reference answers."""
    ordinals = range(step * batch_size, (step + 1) * batch_size)
    return [_sequence(tokenizer, environment.train_prompt(ordinal)) for ordinal in ordinals]


def probe(environment: Environment, tokenizer: Any, num_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Token ids of held-out prompts with their answers; at least `num_tokens` tokens that are predicted.

    The same for every run of an environment and tokenizer. Raises ValueError if the held-out prompts are too
    few.
    """
    chosen: list[tuple[int, ...]] = []
    predicted = 0
    for prompt in environment.test_prompts(_MAX_PROBE_PROMPTS):
        ids = tuple(_sequence(tokenizer, prompt).token_ids)
        chosen.append(ids)
        predicted += len(ids) - 1
        if predicted >= num_tokens:
            return tuple(chosen)
    raise ValueError(
        f"environment {environment.name!r} has {len(chosen)} held-out prompts with {predicted} tokens, "
        f"fewer than parity.probe_tokens {num_tokens}; raise environment.test_fraction"
    )
