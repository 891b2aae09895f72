"""Supervised data: right answers to training prompts, and the probe of held-out ones."""

from __future__ import annotations

from typing import Any

from forge_core.algorithms.batch import Sequence
from forge_core.chat import encode_answer, encode_prompt
from forge_core.environments.base import Environment, Prompt
from forge_core.tools import Toolbox

_MAX_PROBE_PROMPTS = 256


def _sequence(tokenizer: Any, prompt: Prompt, toolbox: Toolbox | None) -> Sequence:
    """A prompt and its right answer. Results of tools in it are seen and not learned, and encoded as in an episode."""
    prompt_ids = encode_prompt(tokenizer, prompt.text)
    pieces = toolbox.split(prompt.target) if toolbox else [(True, prompt.target)]
    if not pieces or not pieces[-1][0]:
        pieces.append((True, ""))
    answer_ids: list[int] = []
    mask: list[bool] = []
    for place, (is_learned, text) in enumerate(pieces):
        is_last = place == len(pieces) - 1
        ids = (
            encode_answer(tokenizer, text)
            if is_last
            else tokenizer(text, add_special_tokens=False).input_ids
        )
        answer_ids += ids
        mask += [is_learned] * len(ids)
    return Sequence(token_ids=prompt_ids + answer_ids, num_prompt_tokens=len(prompt_ids), mask=mask)


def sequences(
    environment: Environment,
    tokenizer: Any,
    step: int,
    batch_size: int,
    toolbox: Toolbox | None = None,
) -> list[Sequence]:
    """The batch of a supervised step (from 0): the next training prompts with their reference answers."""
    ordinals = range(step * batch_size, (step + 1) * batch_size)
    return [
        _sequence(tokenizer, environment.train_prompt(ordinal), toolbox) for ordinal in ordinals
    ]


def probe(
    environment: Environment, tokenizer: Any, num_tokens: int, toolbox: Toolbox | None = None
) -> tuple[tuple[int, ...], ...]:
    """Token ids of held-out prompts with their answers; at least `num_tokens` tokens that are predicted.

    The same for every run of an environment and tokenizer. Raises ValueError if the held-out prompts are too
    few.
    """
    chosen: list[tuple[int, ...]] = []
    predicted = 0
    for prompt in environment.test_prompts(_MAX_PROBE_PROMPTS):
        ids = tuple(_sequence(tokenizer, prompt, toolbox).token_ids)
        chosen.append(ids)
        predicted += len(ids) - 1
        if predicted >= num_tokens:
            return tuple(chosen)
    raise ValueError(
        f"environment {environment.name!r} has {len(chosen)} held-out prompts with {predicted} tokens, "
        f"fewer than parity.probe_tokens {num_tokens}; raise environment.test_fraction"
    )
