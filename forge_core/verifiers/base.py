"""What a verifier is: it gives each response to a prompt a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from forge_core.environments.base import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What a verifier sees of a sample."""

    text: str
    """The response, as text."""
    token_ids: tuple[int, ...]
    """The same as tokens."""


class Verifier(Protocol):
    """One verifier. It may be called by several threads at the same time."""

    @property
    def version(self) -> str:
        """What its scores depend on beside prompt and response: code, libraries, parameters."""

    @property
    def looks_at_each(self) -> bool:
        """Whether the score of a response does not depend on the others of its group."""

    def __call__(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        """A finite number for each response. Raises RewardError for anything else: that is never a score."""

    def load(self) -> None:
        """Make it ready. Raises RewardError if that fails."""

    def close(self) -> None:
        """End what it has started."""


class EachVerifier:
    """A verifier made of a function that scores one response."""

    looks_at_each = True

    def __init__(self, score: Callable[[Prompt, Response], float], *, version: str) -> None:
        self._score = score
        self.version = version

    def __call__(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        return [float(self._score(prompt, response)) for response in responses]

    def load(self) -> None:
        pass

    def close(self) -> None:
        pass
