"""A task of reasoning-gym whose parameters grow harder. Which level a prompt is of, whoever draws it says."""

from __future__ import annotations

import dataclasses
import itertools

from forge_core.config import CurriculumConfig, EnvironmentConfig
from forge_core.environments import base
from forge_core.environments.reasoning_gym import ReasoningGymEnvironment


class CurriculumEnvironment:
    """One task at several levels. Test prompts are of all of them in turns, so that evaluations can be compared."""

    def __init__(self, config: EnvironmentConfig, seed: int) -> None:
        self._config = config
        self._levels = [
            ReasoningGymEnvironment(config.at_level(level), seed)
            for level in range(len(config.curriculum.levels))
        ]

    @property
    def name(self) -> str:
        return self._config.name

    @property
    def curricula(self) -> dict[str, CurriculumConfig]:
        return {self.name: self._config.curriculum}

    def task_of(self, ordinal: int) -> str:
        return self.name

    def train_prompt(self, ordinal: int, level: int = 0) -> base.Prompt:
        return _at(self._levels[level].train_prompt_at(ordinal), level)

    def test_prompts(self, num_prompts: int) -> list[base.Prompt]:
        share = -(-num_prompts // len(self._levels))
        by_level = [
            [_at(prompt, level) for prompt in task.test_prompts(share)]
            for level, task in enumerate(self._levels)
        ]
        in_turns = itertools.chain.from_iterable(itertools.zip_longest(*by_level))
        distinct: dict[str, base.Prompt] = {}
        for prompt in in_turns:
            if prompt is not None:
                distinct.setdefault(prompt.text, prompt)
        return list(distinct.values())[:num_prompts]

    def score(self, prompt: base.Prompt, response: str) -> float:
        return self._levels[base.level_of(prompt)].score(prompt, response)


def _at(prompt: base.Prompt, level: int) -> base.Prompt:
    return dataclasses.replace(prompt, metadata={**prompt.metadata, "level": level})
