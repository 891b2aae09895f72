"""Supervised data of a run: what is trained on, what is put aside, and which examples a step has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forge_core.algorithms.batch import Sequence
from forge_core.config import WarmStartConfig
from forge_core.supervised.encoding import encode
from forge_core.supervised.examples import read_examples
from forge_core.supervised.split import split_examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Sequences to learn from, and to validate with."""

    train: list[Sequence]
    """In the order of the files."""
    validation: list[Sequence]
    """What is put aside."""
    seed: int
    """Seeds the order of each pass."""

    def batch(self, step: int, size: int) -> list[Sequence]:
        """The sequences of a step, from 0: pass after pass over all, each in an order of its own."""
        places = range(step * size, (step + 1) * size)
        number = len(self.train)
        orders = {
            each: np.random.Generator(np.random.Philox([self.seed, each])).permutation(number)
            for each in {place // number for place in places}
        }
        return [self.train[orders[place // number][place % number]] for place in places]


def load_data(
    config: WarmStartConfig, tokenizer: Any, seed: int, *, context_length: int | None
) -> Data:
    """The data as sequences, none longer than the model's context.

    Raises ValueError naming file and row for one that cannot be made into one.
    """
    assert config.data is not None
    train, validation = split_examples(read_examples(config.data, config.split), config)
    limit, named = config.max_tokens, f"warm_start.max_tokens {config.max_tokens}"
    if context_length is not None and context_length < limit:
        limit, named = context_length, f"the model's context of {context_length}"
    train_sequences, held_out = (
        [encode(tokenizer, each, max_tokens=limit, limit=named) for each in part]
        for part in (train, validation)
    )
    return Data(train=train_sequences, validation=held_out, seed=seed)
