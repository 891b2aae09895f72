"""The side of the sandbox that asks: starts a launcher, lets it into a user namespace, reads what the program writes.

    this process ──▶ launcher ──▶ init, process 1 of the namespaces ──▶ the program

The launcher (`launcher.py`) makes the namespaces. It has no right to say whom its users stand for outside, so this
process does. Init ends the program at its deadline and when it uses too much; the kernel ends whatever is left in the
namespaces when init ends, and init when the launcher or this process does.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge_core.sandbox.filter import call_filter
from forge_core.sandbox.outcome import Limits, Outcome, SandboxRefused

_LAUNCHER = Path(__file__).with_name("launcher.py")
_SETUP_SECONDS = 30.0
"""Until the namespaces stand, on a busy machine."""
_GRACE_SECONDS = 5.0
"""Until everything is gone after the program's end or deadline."""
_OLDEST_KERNEL = (5, 14)
"""The first that counts the processes of each user namespace apart."""
_NOBODY = 65534
_CHUNK_BYTES = 2**16


def run_program(
    program: str, *, stdin: str = "", limits: Limits | None = None, packages: bool = False
) -> Outcome:
    """Run a Python program where it can do no harm, and tell how it ended.

    It has the standard library, and the installed packages with `packages`; an empty environment; no network; a file
    system of which it sees little and can write one folder, its working directory, that goes with it. Nothing of it is
    left when this returns. To be called from a thread that lives on.

    Raises SandboxRefused if this machine cannot isolate it.

    Example:
        outcome = run_program("print(6 * 7)", limits=Limits(seconds=2.0))
        assert outcome.verdict == "ok" and outcome.stdout == b"42\\n"
    """
    _check_kernel()
    limits = limits or Limits()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        request = {
            "program": program,
            "stdin": stdin,
            "limits": asdict(limits),
            "interpreter": sys.executable if packages else os.path.realpath(sys.executable),
            "prefixes": [sys.base_prefix, *([sys.prefix] if packages else [])],
            "packages": packages,
            "parent": os.getpid(),
            "drops_to_nobody": _is_root(),
            "filter": call_filter().hex(),
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_LAUNCHER), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        with process:
            try:
                return _Running(process, ours, limits).outcome(request)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()


def check_sandbox() -> None:
    """Raise SandboxRefused, with one sentence that says what is missing, if this machine can isolate no program."""
    outcome = run_program("pass")
    if outcome.verdict != "ok":
        raise SandboxRefused(f"the sandbox does not run an empty program: {outcome.reason}")


class _Running:
    """One program on its way."""

    def __init__(
        self, process: subprocess.Popen[bytes], control: socket.socket, limits: Limits
    ) -> None:
        self._process = process
        self._control = control
        self._limits = limits
        self._written = {"stdout": bytearray(), "stderr": bytearray()}
        self._is_too_much = False

    def outcome(self, request: dict[str, Any]) -> Outcome:
        self._control.settimeout(_SETUP_SECONDS)
        try:
            self._control.sendall(json.dumps(request).encode() + b"\n")
            self._expect(b"u")
            _map_users(self._process.pid)
            self._control.sendall(b"m")
            self._expect(b"s")
        except (OSError, EOFError) as error:
            raise SandboxRefused(
                f"this machine runs no program in a sandbox: {self._complaint(error)}"
            ) from None
        answer = self._follow()
        if answer is None:
            raise SandboxRefused("the sandbox ended before it told how its program did")
        verdict, reason = answer["verdict"], answer["reason"]
        if self._is_too_much:
            verdict = "output"
            reason = f"wrote more than {self._limits.output_bytes} bytes"
        elif verdict == "exit" and _ran_out_of_memory(self._written["stderr"]):
            verdict = "memory"
            reason = f"was refused more than {self._limits.memory_bytes} bytes of memory"
        return Outcome(
            verdict=verdict,
            reason=reason,
            exit_code=answer["exit_code"] if verdict in ("ok", "exit", "signal") else None,
            stdout=bytes(self._written["stdout"]),
            stderr=bytes(self._written["stderr"]),
            seconds=answer["seconds"],
            cpu_seconds=answer["cpu_seconds"],
            memory_bytes=answer["memory_bytes"],
        )

    def _expect(self, word: bytes) -> None:
        if self._control.recv(1) != word:
            raise EOFError

    def _follow(self) -> dict[str, Any] | None:
        """Read until the launcher has told how it ended, and its streams are closed."""
        answer = bytearray()
        deadline = time.monotonic() + self._limits.seconds + _GRACE_SECONDS
        self._control.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ, "control")
            for name in self._written:
                stream = getattr(self._process, name)
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, name)
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise SandboxRefused(
                        f"the sandbox did not end its program {_GRACE_SECONDS:g} s after its deadline"
                    )
                for key, _ in selector.select(left):
                    data = os.read(key.fd, _CHUNK_BYTES)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data == "control":
                        answer += data
                    else:
                        self._take(key.data, data)
        return json.loads(answer) if answer else None

    def _take(self, name: str, data: bytes) -> None:
        room = self._limits.output_bytes - sum(map(len, self._written.values()))
        self._written[name] += data[:room]
        if len(data) > room and not self._is_too_much:
            self._is_too_much = True
            # Has the launcher end it, and tell.
            self._control.shutdown(socket.SHUT_WR)

    def _complaint(self, error: Exception) -> str:
        """What the launcher could not do, as it said itself before it ended."""
        self._process.kill()
        _, stderr = self._process.communicate(timeout=_GRACE_SECONDS)
        lines = stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its launcher ended ({error or type(error).__name__})"


def _map_users(pid: int) -> None:
    """Say whom the users of a process' new user namespace stand for outside.

    Root is root there as long as it sets up, and the program nobody: only so does its number of processes count.
    Anybody else is the same user within and without, and loses what rights it has there before the program starts.
    """
    user, group = os.geteuid(), os.getegid()
    if _is_root():
        users = groups = f"0 0 1\n{_NOBODY} {_NOBODY} 1\n"
    else:
        users, groups = f"{user} {user} 1\n", f"{group} {group} 1\n"
    folder = Path("/proc", str(pid))
    for file, text in (("setgroups", "deny"), ("uid_map", users), ("gid_map", groups)):
        (folder / file).write_text(text)


def _is_root() -> bool:
    """Whether this is the machine's root, whose processes no limit counts.

    Raises SandboxRefused for one whom another user namespace shows as somebody else: as whom would its programs run?
    """
    inner, outer, count = map(int, Path("/proc/self/uid_map").read_text().split()[:3])
    if outer == 0 and count > 1:
        return os.geteuid() == 0
    if outer == 0 and os.geteuid() == inner:
        raise SandboxRefused(
            "this is root within a user namespace of its own, whose number of processes no limit counts: ask outside "
            "of it, or as another user"
        )
    return False


def _check_kernel() -> None:
    if sys.platform != "linux":
        raise SandboxRefused(f"the sandbox is made of Linux namespaces, and this is {sys.platform}")
    release = os.uname().release
    if tuple(map(int, release.split("-")[0].split(".")[:2])) < _OLDEST_KERNEL:
        raise SandboxRefused(
            f"Linux {release} does not count the processes of a namespace apart, by which the sandbox bounds them: "
            f"take Linux {'.'.join(map(str, _OLDEST_KERNEL))} or newer"
        )


def _ran_out_of_memory(stderr: bytearray) -> bool:
    lines = stderr.strip().splitlines()
    return bool(lines) and lines[-1].startswith(b"MemoryError")
