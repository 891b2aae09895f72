"""How often, and after how long, what failed is started again or asked again."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartOptions:
    """Bounds of a row of restarts: of failures between which nothing served for `sound_seconds`."""

    most: int = 5
    """Restarts in a row; one more failure is one too many."""
    delay_seconds: float = 0.1
    """Before the second restart; doubles each time. The first is at once: one failure is no row."""
    longest_delay_seconds: float = 30.0
    """Longest wait before a restart."""
    sound_seconds: float = 30.0
    """Serving for so long ends a row."""


class Restarts:
    """The row of one replica."""

    def __init__(self, options: RestartOptions) -> None:
        self._options = options
        self._in_a_row = 0

    def after(self, served_seconds: float) -> float | None:
        """How long to wait after a failure, given how long it had served before; None: not again."""
        options = self._options
        if served_seconds >= options.sound_seconds:
            self._in_a_row = 0
        self._in_a_row += 1
        if self._in_a_row > options.most:
            return None
        if self._in_a_row == 1:
            return 0.0
        return back_off(self._in_a_row - 1, options.delay_seconds, options.longest_delay_seconds)


def back_off(nth: int, first_seconds: float, longest_seconds: float) -> float:
    """The nth wait, from 1: doubles each time, with a jitter of half, in seconds."""
    # Past 2**60 the longest wait has long won, and a float would overflow in the end.
    doubled = first_seconds * 2.0 ** min(nth - 1, 60)
    return min(longest_seconds, doubled) * random.uniform(0.5, 1.5)


class RetryBudget:
    """Keeps retries a share of requests, so that a service in trouble is not drowned by them.

    Every request earns a share of a retry; what is saved up is bounded. (The retry budget of Twitter's Finagle.)
    """

    def __init__(self, *, share: float, reserve: float) -> None:
        self._share = share
        self._reserve = reserve
        self._saved = reserve

    def earn(self) -> None:
        """A request came in."""
        self._saved = min(self._reserve, self._saved + self._share)

    def spend(self) -> bool:
        """Whether one retry more is within the budget, which it then uses up."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
