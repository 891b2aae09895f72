"""What an environment is, and how prompts get their ids and are split.

A prompt's id hashes the environment's name, the rendered prompt and the reference answer. The split
hashes the rendered prompt alone, so that training and test share none, whatever the seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from forge_core.config.episodes import CurriculumConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One instance of a task, as the model sees it."""

    prompt_id: str
    """`prompt_id` of environment, text and answer."""
    text: str
    """The prompt as rendered."""
    answer: str
    """A reference answer; empty where the task has none."""
    target: str
    """A right answer in the form that supervised training teaches."""
    index: int
    """Where the environment's generator made it; for people, not an identity."""
    environment: str
    """Name of the environment."""
    metadata: dict[str, Any]
    """What else `score` needs, made of JSON values only: it survives `json.loads(json.dumps(...))`."""


@runtime_checkable
class Environment(Protocol):
    """A source of prompts that can score responses. Every method is deterministic."""

    @property
    def name(self) -> str:
        """The name that its prompts carry."""

    def train_prompt(self, ordinal: int) -> Prompt:
        """The training prompt number `ordinal`, from 0, in the order that the seed gives.

        Prompts may come again; none is ever a test prompt. Raises ValueError if there are none.
        """

    def test_prompts(self, num_prompts: int) -> list[Prompt]:
        """The first held-out prompts, all distinct and the same whatever the run's seed.

        Fewer where the environment has fewer; raises ValueError if it has none.
        """

    def score(self, prompt: Prompt, response: str) -> float:
        """The reward of a response to a prompt, which may have been stored and read since.

        Raises whatever the verifier raises: that is a defect of the verifier, not a reward.
        """


@runtime_checkable
class Leveled(Environment, Protocol):
    """An environment whose training prompts may be asked for at a level, from 0."""

    @property
    def curricula(self) -> Mapping[str, CurriculumConfig]:
        """How levels rise, by the name that the prompts carry; empty if none do."""

    def task_of(self, ordinal: int) -> str:
        """The name that the training prompt with this ordinal carries, whatever its level."""

    def train_prompt(self, ordinal: int, level: int = 0) -> Prompt:
        """As `Environment.train_prompt`; the level is in the prompt's metadata, as `level`, where there are several."""


def level_of(prompt: Prompt) -> int:
    """The level of a prompt; 0 where there are none."""
    return int(prompt.metadata.get("level", 0))


def prompt_id(environment: str, text: str, answer: str) -> str:
    """A prompt's identity: 32 hexadecimal digits."""
    content = json.dumps([environment, text, answer], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def is_held_out(text: str, test_fraction: float) -> bool:
    """Whether a rendered prompt belongs to the test split, of which this is the share."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < test_fraction * 2**64
