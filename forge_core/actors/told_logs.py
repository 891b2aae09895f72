"""What a process of a mesh logs, kept until the controller asks, which it does with every heartbeat.

So log lines reach the controller from whatever host, in order, and cost no call of their own. What a process logs last
before it dies is only on its error stream, which `output.log` has.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from dataclasses import dataclass

LEVEL_VARIABLE = "FORGEFLOW_LOG_LEVEL"
"""Environment variable of the least severe level that is told."""

_MOST = 1000
"""Lines that are kept; the oldest give way."""
_LONGEST = 4000
"""Characters of a line that are kept."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """One log record."""

    level: int
    """As `logging` numbers it."""
    logger: str
    """Name of the logger."""
    message: str
    """The message, with the traceback if it has one."""


class ToldLogs(logging.Handler):
    """Keeps the newest records of a process."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.setFormatter(logging.Formatter("%(message)s"))
        self._lines: deque[LogLine] = deque(maxlen=_MOST)
        self._num_lost = 0

    @classmethod
    def install(cls) -> ToldLogs:
        """Hear all loggers of this process, at the level that its environment says, beside the error stream."""
        level = logging.getLevelNamesMapping()[os.environ.get(LEVEL_VARIABLE, "warning").upper()]
        told, root = cls(level), logging.getLogger()
        if not root.handlers:
            # As Python does by itself where nobody listens.
            errors = logging.StreamHandler()
            errors.setLevel(logging.WARNING)
            root.addHandler(errors)
        root.addHandler(told)
        if root.level > level:
            root.setLevel(level)
        return told

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        try:
            message = self.format(record)[:_LONGEST]
        except Exception:  # As `logging` does: a record that cannot be formatted ends nothing.
            self.handleError(record)
            return
        self._num_lost += len(self._lines) == _MOST
        self._lines.append(LogLine(record.levelno, record.name, message))

    def drain(self) -> tuple[LogLine, ...]:
        """What was kept since the last time, oldest first; how many were lost between, if any, comes before."""
        lines = []
        if self._num_lost:
            told = f"{self._num_lost} lines were more than are kept"
            lines.append(LogLine(logging.WARNING, __name__, told))
            self._num_lost = 0
        while self._lines:
            lines.append(self._lines.popleft())
        return tuple(lines)
