"""A task of your own: which of some digits is the largest?

    forgeflow run --preset tiny --set environment.name=examples/own_task.py:LargestDigit

An environment is a class that is made from the config's `environment` section and a seed, and has a name, training
prompts by ordinal, held-out prompts, and a score. Every process of the run imports this file.
"""

from __future__ import annotations

import itertools
import random

from forge_core.config import EnvironmentConfig
from forge_core.environments.base import Prompt, is_held_out, prompt_id


class LargestDigit:
    """`3928>` asks for `9`."""

    name = "largest_digit"

    def __init__(self, config: EnvironmentConfig, seed: int) -> None:
        self._test_fraction = config.test_fraction
        self._seed = seed

    def train_prompt(self, ordinal: int) -> Prompt:
        """Draws until one is not held out; the same for the same seed and ordinal."""
        draws = random.Random(f"{self._seed}/{ordinal}")
        while is_held_out(text := f"{draws.randrange(10**6):06d}>", self._test_fraction):
            pass
        return self._prompt(text, ordinal)

    def test_prompts(self, num_prompts: int) -> list[Prompt]:
        """The first numbers that are held out, whatever the seed."""
        texts = (f"{number:06d}>" for number in range(10**6))
        held_out = (text for text in texts if is_held_out(text, self._test_fraction))
        chosen = itertools.islice(held_out, num_prompts)
        return [self._prompt(text, index) for index, text in enumerate(chosen)]

    def score(self, prompt: Prompt, response: str) -> float:
        """1 for the largest digit and nothing else."""
        return float(response.strip() == prompt.answer)

    def _prompt(self, text: str, index: int) -> Prompt:
        answer = max(text[:-1])
        return Prompt(
            prompt_id=prompt_id(self.name, text, answer),
            text=text,
            answer=answer,
            target=answer,
            index=index,
            environment=self.name,
            metadata={},
        )
