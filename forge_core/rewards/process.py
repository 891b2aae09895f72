"""The verifier's side of a reward function.

It runs in a process of its own: what it hangs in, and be it a regular expression that never lets go of the
interpreter, can be killed, and what it crashes is not the verifier.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from forge_core.environments.base import Prompt

_SHOWN_CHARACTERS = 200
_STOP_SECONDS = 2.0
_CRASH_SECONDS = 0.5


class RewardError(Exception):
    """A reward function failed; the message names it and the prompt. It is its author's to mend, and no reward."""


class RewardLost(RewardError):
    """Its process died, or gave no answer in time: asked again, it may do better."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        """Of the process, negative for a signal; None where it was killed for giving no answer."""


class RewardProcess:
    """One reward function, started when it is first asked.

    Example:
        with RewardProcess("rewards.py:is_short", timeout_seconds=60) as reward:
            rewards = reward(prompt, completions, completion_ids)
    """

    def __init__(
        self, reference: str, *, timeout_seconds: float, startup_seconds: float | None = None
    ) -> None:
        """`startup_seconds` is what `load` may take; as long as an answer unless given."""
        self._reference = reference
        self._timeout_seconds = timeout_seconds
        self._startup_seconds = startup_seconds or timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[bytes, bytes] | None = None

    def __enter__(self) -> RewardProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(
        self, prompt: Prompt, completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """The rewards of a prompt's completions. Raises RewardError if it gives anything but one finite number each."""
        count = len(completions)
        columns = {"answer": prompt.answer, "prompt_id": prompt.prompt_id, **prompt.metadata}
        request = {
            "prompts": [prompt.text] * count,
            "completions": list(completions),
            "columns": {
                "completion_ids": [list(ids) for ids in completion_ids],
                **{name: [value] * count for name, value in columns.items()},
            },
        }
        reply = self._ask(request, prompt)
        return [float(reward) for reward in reply["rewards"]]

    def load(self) -> None:
        """Start the process and import the function. Raises RewardError if that fails."""
        self._ask({}, None)

    def _ask(self, request: dict[str, Any], prompt: Prompt | None) -> dict[str, Any]:
        try:
            connection = self._connect()
            connection.send_bytes(json.dumps(request).encode())
            seconds = self._startup_seconds if prompt is None else self._timeout_seconds
            if not connection.poll(seconds):
                self.stop()
                raise RewardLost(
                    self._sentence(f"gave no answer within {seconds:g} s", prompt), None
                )
            reply: dict[str, Any] = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            code = self.stop()
            raise RewardLost(
                self._sentence(f"ended its process with exit code {code}", prompt), code
            ) from None
        if "fault" in reply:
            error = RewardError(self._sentence(reply["fault"], prompt))
            error.add_note(reply.get("traceback", ""))
            raise error
        return reply

    def _sentence(self, what: str, prompt: Prompt | None) -> str:
        if prompt is None:
            return f"reward {self._reference!r} {what}, when it was imported"
        text = prompt.text[:_SHOWN_CHARACTERS] + (
            "…" if len(prompt.text) > _SHOWN_CHARACTERS else ""
        )
        return f"reward {self._reference!r} {what}, on the prompt {text!r}"

    def _connect(self) -> Connection[bytes, bytes]:
        if self._connection is None:
            ours, theirs = multiprocessing.Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [
                        sys.executable, "-m", "forge_core.rewards.worker",
                        str(theirs.fileno()), self._reference,
                    ],
                    stdin=subprocess.DEVNULL,
                    # A group of its own, so that what it starts can be killed with it.
                    start_new_session=True,
                    pass_fds=[theirs.fileno()],
                )  # fmt: skip
            self._connection = ours
        return self._connection

    def stop(self) -> int | None:
        """End the process, whatever it does; its exit code."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is None:
            return None
        process, self._process = self._process, None
        try:
            # One that crashed ends by itself, and tells how; one that hangs does not.
            return process.wait(_CRASH_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_STOP_SECONDS)
