"""Whether two mathematical expressions are equal, by math-verify: runs in a process of its own.

Algebra on what a model wrote can take for ever or all memory, also where Python cannot interrupt it. A comparison has
processor time: when that is over Python raises, and a little later the kernel ends the process.
"""

from __future__ import annotations

import logging
import resource
import signal
from types import FrameType
from typing import Any

MEMORY_BYTES = 3 * 2**30
"""Address space of the process."""
_LONGEST_TEXT = 20_000
"""Characters at the end of a response that are looked at: answers stand there."""


class _TakesTooLong(BaseException):
    """Not an Exception, for the algebra catches those."""


def equal(
    prompts: list[str],
    completions: list[str],
    answer: list[str],
    cpu_seconds: list[float],
    **columns: Any,
) -> list[float]:
    """1 for each completion that ends in an expression equal to the reference answer: a reward of TRL's signature."""
    return [
        float(_is_equal(completion, wanted, seconds))
        for completion, wanted, seconds in zip(completions, answer, cpu_seconds, strict=True)
    ]


def _is_equal(completion: str, wanted: str, cpu_seconds: float) -> bool:
    signal.setitimer(signal.ITIMER_PROF, 2 * cpu_seconds)
    # Again and again, should the first be swallowed.
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, 0.1)
    try:
        reference = _parsed(_marked(wanted)) or _parsed(wanted)
        text = completion[-_LONGEST_TEXT:]
        if not _is_marked(text):
            # Outside of LaTeX's marks a percentage has no backslash.
            text = text.replace("\\%", "%")
        given = _parsed(text) or _parsed(_marked(text))
        return bool(reference) and bool(math_verify.verify(reference, given, timeout_seconds=None))
    except (_TakesTooLong, MemoryError, RecursionError):
        return False
    except Exception:  # of a library that parses anything: it is no expression
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _parsed(text: str) -> list[Any]:
    # Without its own time-outs, which count the time that a busy machine takes, too.
    return list(math_verify.parse(text, parsing_timeout=None))


def _marked(text: str) -> str:
    """The text as LaTeX, which is taken for such only between marks."""
    return text if _is_marked(text) else f"${text}$"


def _is_marked(text: str) -> bool:
    return any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))


def _raise(number: int, frame: FrameType | None) -> None:
    raise _TakesTooLong


resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
signal.signal(signal.SIGVTALRM, _raise)
signal.signal(signal.SIGPROF, signal.SIG_DFL)
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

import math_verify  # noqa: E402  (after the bound of memory, which holds for it)

# What it makes when it is first used is no response's time.
math_verify.verify(_parsed(r"$\frac{1}{2}$"), _parsed("0.5"), timeout_seconds=None)
