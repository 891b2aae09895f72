"""A task with tools: a calculator that pays for products and not for sums, and a look-up of your own.

    forgeflow run --preset tiny --config examples/own_tools.toml

`7+5=` the model can do itself, `38*47=` it cannot. What the episode says, character by character:

    38*47=  [38*47]    the policy calls                masked in
            1786;      the calculator answers          masked out
            1786       the policy's answer             masked in

The warm start shows the form, with a call before half of the answers, by chance: were it always the same for a
question, the model would know it by heart, and a group's samples would all call or none. When it pays is learned from
rewards, for a call costs a part of one.
"""

from __future__ import annotations

import itertools
import operator
import random

from forge_core.config import EnvironmentConfig
from forge_core.environments.base import Prompt, is_held_out, prompt_id

_SIGNS = {"+": operator.add, "*": operator.mul}


class Sums:
    """Sums of digits, and products of numbers from 32 to 99 in the same number."""

    name = "sums_and_products"

    def __init__(self, config: EnvironmentConfig, seed: int) -> None:
        self._test_fraction = config.test_fraction
        self._seed = seed

    def train_prompt(self, ordinal: int) -> Prompt:
        """Draws until one is not held out; the same for the same seed and ordinal."""
        draws = random.Random(f"{self._seed}/{ordinal}")
        easy = ordinal % 2 == 0
        while is_held_out(text := _text(draws, easy=easy), self._test_fraction):
            pass
        return self._prompt(text, ordinal, calls=draws.random() < 0.5)

    def test_prompts(self, num_prompts: int) -> list[Prompt]:
        """Those held out, both kinds in turns as far as there are sums; the same whatever the seed."""
        sums = [f"{a}+{b}=" for a, b in itertools.product(range(10), repeat=2)]
        products = [f"{a}*{b}=" for a, b in itertools.product(range(32, 100), repeat=2)]
        random.Random(0).shuffle(products)
        kinds = [[t for t in texts if self._is_test(t)] for texts in (sums, products)]
        texts = [t for pair in itertools.zip_longest(*kinds) for t in pair if t is not None]
        return [
            self._prompt(text, index, calls=index % 4 < 2)
            for index, text in enumerate(texts[:num_prompts])
        ]

    def score(self, prompt: Prompt, response: str) -> float:
        """1 for the right number and nothing else. `response` is what was written after the last result."""
        return float(response == prompt.answer)

    def _is_test(self, text: str) -> bool:
        return is_held_out(text, self._test_fraction)

    def _prompt(self, text: str, index: int, *, calls: bool) -> Prompt:
        answer = _value(text)
        return Prompt(
            prompt_id=prompt_id(self.name, text, answer),
            text=text,
            answer=answer,
            target=f"[{text[:-1]}]{answer};{answer}" if calls else answer,
            index=index,
            environment=self.name,
            metadata={},
        )


def _text(draws: random.Random, *, easy: bool) -> str:
    low, high, sign = (0, 9, "+") if easy else (32, 99, "*")
    return f"{draws.randint(low, high)}{sign}{draws.randint(low, high)}="


def _value(text: str) -> str:
    sign = "+" if "+" in text else "*"
    left, right = text[:-1].split(sign)
    return str(_SIGNS[sign](int(left), int(right)))
