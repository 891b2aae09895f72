"""A small process that outlives its owner by a second, to clean up after it.

    python -S -E guardian.py WORKDIR [COMMAND ...]

It runs COMMAND as a child and reads its own standard input, of which the owner holds the other end. When that
ends, because the owner closed it or was killed, the child is stopped and WORKDIR removed. It imports nothing but
the standard library, and starts in milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1
_STOP_SECONDS = 1.0
_POLL_SECONDS = 0.5

CHILD_ENDED = "child-ended"
"""File in the work folder that tells that the command has ended by itself."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends; does nothing where the kernel is not Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _owner_ended() -> bool:
    ready, _, _ = select.select([0], [], [], _POLL_SECONDS)
    return bool(ready) and not os.read(0, 1024)


def main(arguments: list[str]) -> None:
    workdir, command = arguments[0], arguments[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A terminal's Ctrl-C reaches every process of its group; only the owner's end counts here.
        # A handler that does nothing, rather than SIG_IGN, which the child would inherit.
        signal.signal(number, lambda *_: None)
    child = None
    if command:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    try:
        while not _owner_ended():
            if child is not None and child.poll() is not None:
                # The work folder is the owner's as long as it lives, and it may go on without the child.
                open(os.path.join(workdir, CHILD_ENDED), "w").close()
                child = None
    finally:
        if child is not None:
            _stop(child)
        shutil.rmtree(workdir, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
