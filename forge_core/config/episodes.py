"""Prompts, samples and scores."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from forge_core.config.base import Section

ENSEMBLE_PREFIX = "ensemble:"
"""How a reward begins that is a fitted ensemble of verifiers, `ensemble:NAME@VERSION`."""


class EnvironmentConfig(Section):
    """Where prompts come from and how answers are scored."""

    name: str = "number_sorting"
    """A reasoning-gym task by its name, `question_answer` for a file of questions and answers, or a class of your own
    as `path/file.py:name`, `module:name` or the name that an installed package has registered it by."""
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
