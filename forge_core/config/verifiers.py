"""What scores responses, and how several scores become one reward."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from forge_core.config.base import Section
from forge_core.config.episodes import ENSEMBLE_PREFIX

Kind = Literal[
    "environment", "exact", "normalised", "numeric", "math", "regex", "format", "length", "code", "function",
    "ensemble",
]  # fmt: skip


class ExtractionParams(Section):
    """Parameters of a verifier that compares an answer in the response with the reference answer."""

    extract: str | None = None
    """Regular expression that finds the answer in a response: its last match, or that match's first group."""
    extract_reference: str | None = None
    """The same for the reference answer."""

    @field_validator("extract", "extract_reference")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        return None if pattern is None else _compiled(pattern)


class NoParams(Section):
    """A kind that takes none."""


class NumericParams(ExtractionParams):
    """How far a number may be off."""

    absolute: float = Field(0.0, ge=0.0)
    """Difference that counts as none."""
    relative: float = Field(1e-6, ge=0.0)
    """The same, as a share of the reference."""


class MathParams(ExtractionParams):
    """How long a comparison may take."""

    cpu_seconds: float = Field(5.0, gt=0.0)
    """Processor time for one response; beyond it the answer is wrong."""


class RegexParams(Section):
    """What is looked for."""

    pattern: str
    """The regular expression."""
    whole: bool = False
    """Whether it must match the whole response, blanks around it aside."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return _compiled(pattern)


class FormatParams(Section):
    """The form of a response."""

    tags: list[str] = Field(default_factory=lambda: ["think", "answer"])
    """Elements that it consists of, each once and in this order, with nothing but blanks between them."""

    @field_validator("tags")
    @classmethod
    def _are_names(cls, tags: list[str]) -> list[str]:
        if not tags or not all(re.fullmatch(r"[A-Za-z][\w-]*", tag) for tag in tags):
            raise ValueError(
                f"{tags} are no names of elements: write letters, as in ['think', 'answer']"
            )
        return tags


class LengthParams(Section):
    """Where the soft penalty begins."""

    max_tokens: int | None = Field(None, ge=1)
    """Length from which on the score is -1; none: `sampling.max_tokens`."""
    overlong_tokens: int = Field(ge=1)
    """The last tokens before it, in which the score falls from 0 to -1."""


class CodeParams(Section):
    """How a program is found and tested."""

    tests: str = "answer"
    """Where its tests are: `answer`, or a field of the prompt's metadata."""
    partial: bool = False
    """Whether the score is the share of the cases that it passes, instead of 1 for all and 0 otherwise."""
    cpu_seconds: float = Field(10.0, gt=0.0)
    """Processor time of each case."""
    seconds: float = Field(60.0, gt=0.0)
    """Time of each case."""
    memory_mib: int = Field(512, ge=32)
    """Memory of each case, in MiB."""
    packages: bool = False
    """Whether it may import the installed packages, and not the standard library alone."""


class FunctionParams(Section):
    """Which function."""

    reference: str
    """A function with TRL's signature, as `path/file.py:name`, `module:name` or by its registered name."""


class EnsembleParams(Section):
    """Which ensemble."""

    reference: str
    """One that `forgeflow fit-verifiers` has fitted, as `ensemble:NAME@VERSION`."""

    @field_validator("reference")
    @classmethod
    def _is_one(cls, reference: str) -> str:
        if not reference.startswith(ENSEMBLE_PREFIX):
            raise ValueError(f"{reference!r} is no ensemble: write {ENSEMBLE_PREFIX}NAME@VERSION")
        return reference


PARAMS: dict[str, type[Section]] = {
    "environment": NoParams,
    "exact": ExtractionParams,
    "normalised": ExtractionParams,
    "numeric": NumericParams,
    "math": MathParams,
    "regex": RegexParams,
    "format": FormatParams,
    "length": LengthParams,
    "code": CodeParams,
    "function": FunctionParams,
    "ensemble": EnsembleParams,
}
"""By kind, what its parameters are."""


class VerifierConfig(Section):
    """One verifier."""

    kind: Kind
    """What scores."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Its parameters."""
    weight: float | None = None
    """Its weight in the sum; unless given 1, and 0 for a gate."""
    weights: list[list[float]] = Field(default_factory=list)
    """Its weight over time, instead: pairs of a policy version and the weight from there on, in between on a line."""
    gate: float | None = None
    """The least score that lets a response through; one that is below gets the reward `scoring.closed_reward`, and the
    verifiers after this one do not see it."""

    @model_validator(mode="after")
    def _is_whole(self) -> VerifierConfig:
        try:
            PARAMS[self.kind].model_validate(self.params)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(["params", *map(str, first["loc"])])
            known = ", ".join(PARAMS[self.kind].model_fields) or "none"
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{where}: {message} ({self.kind} takes: {known})") from None
        if self.weight is not None and self.weights:
            raise ValueError(
                f"weight {self.weight:g} and weights exclude each other: leave one out"
            )
        versions = [pair[0] for pair in self.weights if len(pair) == 2]
        if len(versions) != len(self.weights) or versions != sorted(set(versions)):
            raise ValueError(
                f"weights {self.weights} are no pairs of a rising policy version and a weight: write them as "
                "[[0, 1.0], [50, 0.2]]"
            )
        return self

    def typed_params(self) -> Section:
        """Its parameters, checked and with their defaults."""
        return PARAMS[self.kind].model_validate(self.params)

    def weight_at(self, policy_version: float) -> float:
        """Its weight for what a policy version has sampled."""
        if not self.weights:
            default = 1.0 if self.gate is None else 0.0
            return default if self.weight is None else self.weight
        before, after = self.weights[0], self.weights[-1]
        for pair in self.weights:
            if pair[0] <= policy_version:
                before = pair
        for pair in reversed(self.weights):
            if pair[0] >= policy_version:
                after = pair
        if after[0] <= before[0]:
            return before[1]
        share = min(max((policy_version - before[0]) / (after[0] - before[0]), 0.0), 1.0)
        return before[1] + share * (after[1] - before[1])


class ScoringConfig(Section):
    """How the scores of several verifiers become a reward, and what they may cost."""

    compose: Literal["sum", "product"] = "sum"
    """`sum`: of each score times its weight; `product`: of the scores."""
    closed_reward: float = 0.0
    """Reward of a response that a gate does not let through."""
    workers: int = Field(4, ge=1, le=64)
    """Prompts that are scored at the same time, and most processes of a verifier that has its own. A second one is
    started when the first keeps others waiting."""
    attempts: int = Field(2, ge=1, le=10)
    """How often a verifier that dies or gives no answer in time is asked the same."""
    cache_entries: int = Field(20_000, ge=0)
    """Scores that are kept, by what they are about, and not asked for again; 0: none."""


def check_verifiers(verifiers: dict[str, VerifierConfig], scoring: ScoringConfig) -> None:
    """Raise ValueError, whose sentence begins with the field, unless they make up a reward."""
    counted = 0
    for name, each in verifiers.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise ValueError(
                f"verifiers.{name}: name it with letters, digits, underscores and hyphens"
            )
        if scoring.compose == "product":
            if each.weight is not None or each.weights:
                raise ValueError(
                    f"verifiers.{name} has a weight, and in a product none counts: leave it out, or set "
                    "scoring.compose to sum"
                )
            if each.kind == "length":
                raise ValueError(
                    f"verifiers.{name} is of kind length, whose scores are 0 or less: set scoring.compose to sum"
                )
        counted += each.gate is None or each.weight is not None or bool(each.weights)
    if verifiers and not counted:
        raise ValueError(
            f"verifiers {', '.join(verifiers)} are gates and nothing else: add one that scores, or a weight"
        )


def _compiled(pattern: str) -> str:
    # Deferred: it is needed where somebody has a pattern.
    import regex

    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern
