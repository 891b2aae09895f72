"""What a program may use, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "exit", "signal", "timeout", "cpu", "memory", "output"]
"""`ok`: exit code 0; `exit`: another one; `signal`: it ended by a signal of its own; the rest: what it used too much
of."""


class SandboxRefused(OSError):
    """This machine does not isolate a program, or lost it. Nothing may be concluded from that about the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use, the processes that it starts included."""

    seconds: float = 60.0
    """Time from its start; more than it may compute, for a busy machine may keep it waiting."""
    cpu_seconds: float = 10.0
    """Processor time of all its processes together."""
    memory_bytes: int = 512 * 2**20
    """Address space of each process, and resident memory of all of them together."""
    processes: int = 16
    """Processes and threads at the same time."""
    folder_bytes: int = 64 * 2**20
    """All files in its folder together; they lie in memory."""
    folder_files: int = 256
    """Files and folders in its folder."""
    open_files: int = 64
    """Open files of each process."""
    output_bytes: int = 2**20
    """What it writes to its standard streams, both together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended."""

    verdict: Verdict
    """The outcome in a word."""
    reason: str
    """The same as a sentence; empty for `ok`."""
    exit_code: int | None
    """Its exit code, negative for a signal; None where it was stopped."""
    stdout: bytes
    """What it wrote, as far as the limit."""
    stderr: bytes
    """The same for the error stream."""
    seconds: float
    """How long it ran."""
    cpu_seconds: float
    """Processor time of all its processes, as it was last looked at."""
    memory_bytes: int
    """Most resident memory of all its processes together, as far as it was looked at."""
