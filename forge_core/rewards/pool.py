"""Processes of one reward function: a second is started when the first keeps others waiting."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from forge_core.environments.base import Prompt
from forge_core.rewards.process import RewardLost, RewardProcess

_PATIENCE_SECONDS = 0.25
"""How long a call waits for a process before it starts another: quick functions need no more than one."""


class RewardPool:
    """As `RewardProcess`, for several threads at the same time, and asks again what a lost process did not answer.

    The threads have to live as long as the pool: a process dies with the thread that started it.
    """

    def __init__(
        self,
        reference: str,
        *,
        timeout_seconds: float,
        startup_seconds: float,
        most: int = 1,
        attempts: int = 1,
        final_signals: frozenset[int] = frozenset(),
    ) -> None:
        """Of `most` processes; a call whose process is lost is made `attempts` times in all, unless one of the signals
        ended it."""
        self._reference = reference
        self._seconds = (timeout_seconds, startup_seconds)
        self._attempts = attempts
        self._final_signals = final_signals
        self._most = most
        self._idle: list[RewardProcess] = []
        self._all: list[RewardProcess] = []
        self._changed = threading.Condition()

    def __call__(
        self, prompt: Prompt, completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """The rewards of a prompt's completions. Raises RewardError, after the last attempt RewardLost."""
        for attempt in range(1, self._attempts + 1):
            process = self._take()
            try:
                process.load()  # at once, where it is
                return process(prompt, completions, completion_ids)
            except RewardLost as lost:
                if attempt == self._attempts or -(lost.exit_code or 0) in self._final_signals:
                    raise
            finally:
                self._give_back(process)
        raise AssertionError("there is at least one attempt")

    def load(self) -> None:
        """Start a process and import the function. Raises RewardError if that fails."""
        process = self._take()
        try:
            process.load()
        finally:
            self._give_back(process)

    def close(self) -> None:
        """End all processes."""
        with self._changed:
            for process in self._all:
                process.stop()
            self._all.clear()
            self._idle.clear()

    def _take(self) -> RewardProcess:
        with self._changed:
            is_idle = self._changed.wait_for(
                lambda: bool(self._idle), 0.0 if not self._all else _PATIENCE_SECONDS
            )
            if not is_idle and len(self._all) < self._most:
                timeout_seconds, startup_seconds = self._seconds
                process = RewardProcess(
                    self._reference,
                    timeout_seconds=timeout_seconds,
                    startup_seconds=startup_seconds,
                )
                self._all.append(process)
                return process
            self._changed.wait_for(lambda: bool(self._idle))
            return self._idle.pop()

    def _give_back(self, process: RewardProcess) -> None:
        with self._changed:
            self._idle.append(process)
            self._changed.notify()
