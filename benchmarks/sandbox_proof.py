"""Proof that the sandbox leaves nothing: a thousand programs, most of which mean harm, in a row."""

from __future__ import annotations

import collections
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psutil

from forge_core.sandbox import Limits, run_program

NUM_PROGRAMS = 1000
LIMITS = Limits(
    seconds=1.0, cpu_seconds=0.5, memory_bytes=96 * 2**20, processes=8, folder_bytes=2**20, output_bytes=2**16
)  # fmt: skip
_FORKS = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
PROGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "right": ("print(sum(range(100)))", ("ok",)),
    "wrong": ("raise SystemExit(1)", ("exit",)),
    "fork bomb": (_FORKS, ("timeout", "cpu")),
    "memory bomb": ("x = [bytearray(2**20) for _ in range(10**6)]", ("memory",)),
    "endless output": ("while True: print('x' * 1000)", ("output",)),
    "network": (
        "import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=1)",
        ("exit",),
    ),
    "writes outside": ("open('/usr/sandboxed', 'w')", ("exit",)),
    "fills its folder": ("open('sandboxed', 'wb').write(bytes(2**22))", ("exit",)),
    "signals": (
        "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nos.kill(1, 9)",
        ("ok", "exit"),
    ),
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(999)",
        ("ok",),
    ),
}
"""By what they do, programs and the verdicts that are right."""


def prove_sandbox() -> tuple[bool, dict[str, Any]]:
    """Each with its verdict; afterwards no process, no file and no open descriptor more than before."""
    before = _present()
    verdicts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    for number in range(NUM_PROGRAMS):
        name = [*PROGRAMS][number % len(PROGRAMS)]
        started = time.monotonic()
        outcome = run_program(PROGRAMS[name][0], limits=LIMITS)
        seconds[name].append(time.monotonic() - started)
        verdicts[name][outcome.verdict] += 1
    after = _present()
    left = {kind: sorted(after[kind] - before[kind]) for kind in before}
    is_met = not any(left.values()) and all(
        set(counted) <= set(PROGRAMS[name][1]) for name, counted in verdicts.items()
    )
    return is_met, {
        "programs": NUM_PROGRAMS,
        "verdicts": {name: dict(counted) for name, counted in verdicts.items()},
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "left": left,
    }


def _present() -> dict[str, set[str]]:
    """Processes that this one started, its descriptors, files that a program could have written, and mounts."""
    process = psutil.Process()
    with open("/proc/self/mounts") as file:
        mounts = set(file)
    folders = (tempfile.gettempdir(), "/tmp", "/dev/shm")
    return {
        "processes": {str(each) for each in process.children(recursive=True)},
        "descriptors": set(map(str, range(process.num_fds()))),
        "files": {
            f"{folder}/{name}" for folder in folders for name in os.listdir(folder)
            if name.startswith(("sandboxed", "program"))
        } | {path for path in ("/usr/sandboxed", "/program.py") if os.path.exists(path)},
        "mounts": mounts,
    }  # fmt: skip


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {"sandbox": prove_sandbox}
