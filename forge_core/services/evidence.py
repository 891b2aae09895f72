"""What the kernel says of a process on this machine: whether it lives, is stopped, sleeps or computes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_STOPPED, _SLEEPING, _ENDED = frozenset("Tt"), frozenset("SI"), frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """A process at one moment."""

    is_stopped: bool
    """Every thread is stopped by a signal or a debugger."""
    is_asleep: bool
    """Every thread waits for something other than a CPU or a disk."""
    cpu_seconds: float
    """Processor time of all threads so far."""


def this_machine() -> str:
    """What tells whose process ids mean the same: this boot of this machine, and the namespace of process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def sample_process(pid: int) -> ProcessSample | None:
    """The process now; None if it has ended."""
    states: set[str] = set()
    try:
        folder = Path(f"/proc/{pid}")
        state, cpu_seconds = _read_stat(folder)
        if state in _ENDED:
            return None
        for thread in (folder / "task").iterdir():
            # A thread may end between the listing and the reading.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                states.add(_read_stat(thread)[0])
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ProcessSample(
        is_stopped=bool(states) and states <= _STOPPED,
        is_asleep=bool(states) and states <= _SLEEPING,
        cpu_seconds=cpu_seconds,
    )


def _read_stat(folder: Path) -> tuple[str, float]:
    """State letter, and user plus system time in seconds, of a process or thread (proc_pid_stat(5), 3, 14 and 15)."""
    # The name, in parentheses before them, may itself hold spaces and parentheses.
    fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


async def process_ended(pid: int) -> None:
    """Return as soon as the process has ended, within milliseconds; needs no poll."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        loop.remove_reader(handle)
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(handle, tell)
    try:
        await ended
    finally:
        loop.remove_reader(handle)
        os.close(handle)
