"""Several environments as one: each training prompt is of one of them, by their weights.

The n-th is of the task into whose share of the unit interval n times the golden ratio falls, its whole part aside:
a sequence of low discrepancy (Kronecker's), so that every stretch of draws has the tasks by their weights, but for a
prompt or two.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping

from forge_core.config import CurriculumConfig, EnvironmentConfig
from forge_core.config.episodes import MIXTURE
from forge_core.environments import base

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class MixtureEnvironment:
    """Tasks by name. Their prompts carry the task's name in the mixture, by which they are scored and reported."""

    def __init__(
        self, config: EnvironmentConfig, seed: int, tasks: Mapping[str, base.Environment]
    ) -> None:
        """`tasks` are the config's, made."""
        # A stored config has its keys sorted.
        self._tasks = dict(sorted(tasks.items()))
        self._names = list(self._tasks)
        total = math.fsum(task.weight for task in config.tasks.values())
        self._shares = [config.tasks[name].weight / total for name in self._names]
        digest = hashlib.sha256(f"forgeflow/mixture/{seed}".encode()).digest()
        self._offset = int.from_bytes(digest[:6], "big") / 2**48
        self._drawn: list[tuple[str, int]] = []
        self._num_drawn: Counter[str] = Counter()
        self._config = config

    @property
    def name(self) -> str:
        return MIXTURE

    @property
    def curricula(self) -> dict[str, CurriculumConfig]:
        return {
            name: task.curriculum
            for name, task in self._config.tasks.items()
            if task.curriculum.levels
        }

    def task_of(self, ordinal: int) -> str:
        return self._place(ordinal)[0]

    def train_prompt(self, ordinal: int, level: int = 0) -> base.Prompt:
        name, of_task = self._place(ordinal)
        task = self._tasks[name]
        if isinstance(task, base.Leveled):
            return _named(task.train_prompt(of_task, level), name)
        return _named(task.train_prompt(of_task), name)

    def test_prompts(self, num_prompts: int) -> list[base.Prompt]:
        due = Counter(
            self._names[place] for place in itertools.islice(self._places(0.5), num_prompts)
        )
        found = {
            name: iter([_named(p, name) for p in task.test_prompts(due[name])])
            for name, task in self._tasks.items()
            if due[name]
        }
        prompts: dict[str, base.Prompt] = {}
        for place in itertools.islice(self._places(0.5), num_prompts):
            prompt = next(found[self._names[place]], None)
            if prompt is not None:
                prompts.setdefault(prompt.text, prompt)
        return list(prompts.values())

    def score(self, prompt: base.Prompt, response: str) -> float:
        return self._tasks[prompt.environment].score(prompt, response)

    def _place(self, ordinal: int) -> tuple[str, int]:
        """The task of a draw, and which of the task's own draws it is."""
        missing = max(0, ordinal + 1 - len(self._drawn))
        for place in itertools.islice(self._places(self._offset, len(self._drawn)), missing):
            name = self._names[place]
            self._drawn.append((name, self._num_drawn[name]))
            self._num_drawn[name] += 1
        return self._drawn[ordinal]

    def _places(self, offset: float, first: int = 0) -> Iterable[int]:
        bounds = list(itertools.accumulate(self._shares))[:-1]
        for number in itertools.count(first):
            yield bisect.bisect(bounds, (offset + number * _GOLDEN_RATIO) % 1.0)


def _named(prompt: base.Prompt, name: str) -> base.Prompt:
    return dataclasses.replace(
        prompt, environment=name, prompt_id=base.prompt_id(name, prompt.text, prompt.answer)
    )
