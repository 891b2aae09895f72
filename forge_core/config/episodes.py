"""Prompts, samples and scores."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from forge_core.config.base import Section

ENSEMBLE_PREFIX = "ensemble:"
"""How a reward begins that is a fitted ensemble of verifiers, `ensemble:NAME@VERSION`."""


MIXTURE = "mixture"
"""Name of the environment that is made of several."""


class CurriculumConfig(Section):
    """How a task of reasoning-gym grows harder in the course of a run, by steps or by success."""

    levels: list[dict[str, Any]] = Field(default_factory=list)
    """Parameters that each level lays over `params`, the easiest first; none: the task stays as it is."""
    steps: list[int] = Field(default_factory=list)
    """By steps: that with whose prompts each level but the first begins."""
    success: float | None = None
    """By success: mean reward of the newest groups of a level at which the next one begins."""
    groups: int = Field(64, ge=1)
    """By success: how many groups these are."""

    @model_validator(mode="after")
    def _rises(self) -> CurriculumConfig:
        by = [
            *(["steps"] if self.steps else []),
            *(["success"] if self.success is not None else []),
        ]
        if not self.levels and not by:
            return self
        if len(self.levels) < 2 or len(by) != 1:
            raise ValueError(
                f"curriculum has {len(self.levels)} levels and rises by {' and '.join(by) or 'nothing'}: give two "
                "levels or more, and either steps or success"
            )
        is_rising = self.steps == sorted(set(self.steps)) and all(step > 1 for step in self.steps)
        if self.steps and (len(self.steps) != len(self.levels) - 1 or not is_rising):
            raise ValueError(
                f"curriculum.steps {self.steps} do not say where each of {len(self.levels)} levels but the first "
                f"begins: give {len(self.levels) - 1} rising steps from 2 on"
            )
        return self


class TaskConfig(Section):
    """One task of a mixture."""

    name: str
    """As `environment.name`."""
    weight: float = Field(1.0, gt=0.0)
    """Its share of prompts, beside the other tasks' weights."""
    params: dict[str, Any] = Field(default_factory=dict)
    """As `environment.params`."""
    prompt_template: str | None = None
    """As `environment.prompt_template`."""
    answer_template: str | None = None
    """As `environment.answer_template`."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """As `environment.curriculum`."""


class EnvironmentConfig(Section):
    """Where prompts come from and how answers are scored."""

    name: str = "number_sorting"
    """A reasoning-gym task by its name, `question_answer` for a file of questions and answers, `mixture` for several
    `tasks`, or a class of your own as `path/file.py:name`, `module:name` or the name that an installed package has
    registered it by."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the task, as reasoning-gym names them (all but `seed` and `size`); of `question_answer`: `path` of
    a .jsonl, .csv, .parquet or .arrow file or of a folder of them, its columns `question` and `answer` if they have
    other names, and `split` and `test_split` of a dataset with splits."""
    prompt_template: str | None = None
    """Python format string over `question`, `metadata` and the metadata's fields, where a list with a format spec is
    joined by it (`{numbers:, }`); none: the question as it is."""
    answer_template: str | None = None
    """The same for the answers that warm start teaches; none: the reference answer as it is."""
    test_fraction: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of prompts, by hash of the rendered prompt, that is held out for evaluation."""
    tasks: dict[str, TaskConfig] = Field(default_factory=dict)
    """Of `mixture`, by names of yours: each has a `name`, a `weight`, and what else an environment has."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Levels."""

    @model_validator(mode="after")
    def _mixes_tasks(self) -> EnvironmentConfig:
        if (self.name == MIXTURE) != bool(self.tasks):
            raise ValueError(
                f"environment.name {self.name!r} with {len(self.tasks)} environment.tasks: {MIXTURE} mixes tasks, and "
                "nothing else has some"
            )
        if not self.tasks:
            return self
        of_one = {
            "params",
            "prompt_template",
            "answer_template",
            "curriculum",
        } & self.model_fields_set
        for field in sorted(of_one):
            if getattr(self, field) != EnvironmentConfig.model_fields[field].get_default(
                call_default_factory=True
            ):
                raise ValueError(
                    f"environment.{field} is of one task, and {MIXTURE} has several: give "
                    f"environment.tasks.NAME.{field}"
                )
        for name, task in self.tasks.items():
            if not re.fullmatch(r"[A-Za-z][\w-]*", name) or task.name == MIXTURE:
                raise ValueError(
                    f"environment.tasks.{name} of {task.name!r}: name it with letters, digits, underscores and "
                    f"hyphens, and mix no {MIXTURE}"
                )
        return self

    def as_scorer(self) -> dict[str, Any]:
        """What decides scores, as sets of scores keep it; they knew neither tasks nor curricula once."""
        untouched = {"tasks"} if not self.tasks else set()
        if not self.curriculum.levels:
            untouched.add("curriculum")
        return self.model_dump(mode="json", exclude=untouched)

    def of_task(self, name: str) -> EnvironmentConfig:
        """What a mixture's task is alone."""
        task = self.tasks[name].model_dump(exclude={"weight"})
        return EnvironmentConfig(**task, test_fraction=self.test_fraction)

    def at_level(self, level: int) -> EnvironmentConfig:
        """What the task is at one level of its curriculum."""
        params = {**self.params, **self.curriculum.levels[level]}
        return self.model_copy(update={"params": params, "curriculum": CurriculumConfig()})


class SamplingConfig(Section):
    """How responses are sampled, in training and in evaluation alike."""

    temperature: float = Field(1.0, gt=0.0, le=4.0)
    """Divides the logits; recorded logprobs include it."""
    max_tokens: int = Field(32, ge=1)
    """Longest response, in tokens."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling; only 1.0, until the trainer can replay its mask."""
    top_k: int = Field(0, ge=0)
    """Top-k sampling; only 0 (off), until the trainer can replay its mask."""

    @model_validator(mode="after")
    def _full_distribution(self) -> SamplingConfig:
        if self.top_p != 1.0:
            raise ValueError(
                f"top_p {self.top_p} would sample from a distribution that the trainer cannot score; set it to 1.0"
            )
        if self.top_k != 0:
            raise ValueError(
                f"top_k {self.top_k} would sample from a distribution that the trainer cannot score; set it to 0"
            )
        return self


class EvaluationConfig(Section):
    """Held-out prompts, answered sampled as in training and once greedily."""

    num_prompts: int = Field(500, ge=1)
    """Number of distinct held-out prompts."""
    num_samples: int = Field(1, ge=1)
    """Answers to each that are sampled as in training. With k or more of them pass@k is told, the probability that one
    of k is right, for 1, 2, 4 and so on; right is a reward above 0.5."""
    scorer: Literal["reward", "environment"] = "reward"
    """`reward`: what scores training scores the answers, too; `environment`: the environment's own scorer does, which
    shows what a reward or verifiers of yours are worth by the truth."""
