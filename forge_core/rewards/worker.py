"""The process of a reward function: `python -m forge_core.rewards.worker FD path/file.py:name`.

It answers each request on the connection with rewards or with what is wrong, and ends with the process that asks.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from forge_core.user_code import load_object

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the connection is closed."""
    _die_with_parent(os.getppid())
    descriptor = int(sys.argv[1])
    # What the function starts must not hold the connection open when this process is gone.
    os.set_inheritable(descriptor, False)
    function: Callable[..., Any] | None = None
    # One loop for all requests: clients that a file makes once belong to the loop that they are first used in.
    with Connection(descriptor) as connection, asyncio.Runner() as runner:
        while True:
            try:
                request = json.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                function = function or load_object("reward", sys.argv[2])
                answer = _answer(function, request, runner) if request else {}
            except (Exception, SystemExit) as error:
                fault = f"raised {type(error).__name__}: {error}"
                answer = {"fault": fault, "traceback": traceback.format_exc()}
            connection.send_bytes(json.dumps(answer).encode())


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process with its parent, also where it hangs with the interpreter locked."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def _answer(
    function: Callable[..., Any], request: dict[str, Any], runner: asyncio.Runner
) -> dict[str, Any]:
    completions = request["completions"]
    given = function(prompts=request["prompts"], completions=completions, **request["columns"])
    if inspect.isawaitable(given):
        given = runner.run(_awaited(given))
    try:
        values = list(given)
    except TypeError:
        return {
            "fault": f"returned {_show(given)} where a list of {len(completions)} numbers is due"
        }
    if isinstance(given, str | bytes | dict) or len(values) != len(completions):
        return {
            "fault": f"returned {len(values)} values for {len(completions)} completions: {_show(given)}"
        }
    rewards = []
    for completion, value in zip(completions, values, strict=True):
        number = (
            value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        )
        if not isinstance(number, int | float) or not math.isfinite(number):
            return {
                "fault": f"returned {_show(value)}, which is no finite number, for the completion {_show(completion)}"
            }
        rewards.append(float(number))
    return {"rewards": rewards}


async def _awaited(given: Any) -> Any:
    return await given


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:199] + "…"


if __name__ == "__main__":
    main()
