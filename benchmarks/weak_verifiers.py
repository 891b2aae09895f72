"""Weak verifiers of the tiny preset's answers: each sees a part of what makes one right, or all, and errs besides.

None is told the reference answer, and none alone is as good as the environment's scorer, which takes an answer for
right if its digits are in order and each is at most one away from the one due. Of `3928a=` they go by the digits and
the direction. How each errs follows from prompt and answer alone: asked again it says the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

Check = Callable[[list[int], list[int], bool], bool]
"""Whether an answer passes, by the digits due in their order, those of the answer, and whether they shall rise."""


def ordered(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Its digits are in order, whichever they are; wrong in 10 of 100 cases."""
    return _votes("ordered", 0.1, _is_ordered, prompts, completions)


def first(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Its first digit is near the one due; wrong in 15 of 100 cases."""
    return _votes(
        "first", 0.15, lambda due, said, _: _near(due[:1], said[:1]), prompts, completions
    )


def last(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Its last digit is near the one due; wrong in 15 of 100 cases."""
    return _votes("last", 0.15, lambda due, said, _: _near(due[3:], said[3:]), prompts, completions)


def middle(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Its two digits in the middle are near those due; wrong in 15 of 100 cases."""
    return _votes(
        "middle", 0.15, lambda due, said, _: _near(due[1:3], said[1:3]), prompts, completions
    )


def total(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The sum of its digits is at most two away from that of the digits given; wrong in 20 of 100 cases."""
    return _votes(
        "total", 0.2, lambda due, said, _: abs(sum(due) - sum(said)) <= 2, prompts, completions
    )


def harsh(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """It judges the whole answer, and is wrong in 30 of 100 cases."""
    return _votes("harsh", 0.3, _is_right, prompts, completions)


def hasty(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """It judges the whole answer, and is wrong in 30 of 100 cases, others than the one before."""
    return _votes("hasty", 0.3, _is_right, prompts, completions)


def tired(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """It judges the whole answer, and is wrong in 35 of 100 cases."""
    return _votes("tired", 0.35, _is_right, prompts, completions)


def moody(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """It tosses a coin."""
    return _votes("moody", 0.5, _is_right, prompts, completions)


NAMES = ("ordered", "first", "last", "middle", "total", "harsh", "hasty", "tired", "moody")
"""All of them."""


def _votes(
    name: str, share: float, check: Check, prompts: list[str], completions: list[str]
) -> list[float]:
    return [
        float(_passes(check, prompt, text) != _errs(name, prompt, text, share))
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def _passes(check: Check, prompt: str, text: str) -> bool:
    rises = "a" in prompt
    due = sorted((int(each) for each in prompt if each.isdigit()), reverse=not rises)
    said = [int(each) for each in text if each.isdigit()]
    return len(said) == len(due) and check(due, said, rises)


def _errs(name: str, prompt: str, text: str, share: float) -> bool:
    digest = hashlib.sha256(f"{name}\n{prompt}\n{text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def _near(due: list[int], said: list[int]) -> bool:
    return all(abs(a - b) <= 1 for a, b in zip(due, said, strict=True))


def _is_ordered(due: list[int], said: list[int], rises: bool) -> bool:
    return said == sorted(said, reverse=not rises)


def _is_right(due: list[int], said: list[int], rises: bool) -> bool:
    return _is_ordered(due, said, rises) and _near(due, said)
