"""Programs as a tool: each runs in the sandbox, and its output is the result."""

from __future__ import annotations

from collections.abc import Callable

from forge_core.sandbox import Limits, run_program
from forge_core.tools.base import ToolError

_OUTPUT_BYTES = 2**16


def python_tool(*, seconds: float, cpu_seconds: float, memory_bytes: int) -> Callable[[str], str]:
    """A function that runs a program and gives what it wrote.

    It raises ToolError with the last line of what the program complained of, or with what it used too much of, and
    SandboxRefused, which is the machine's and never the program's fault.
    """
    limits = Limits(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        memory_bytes=memory_bytes,
        output_bytes=_OUTPUT_BYTES,
    )

    def run(program: str) -> str:
        outcome = run_program(program, limits=limits)
        if outcome.verdict == "ok":
            return outcome.stdout.decode(errors="replace").rstrip()
        complaint = outcome.stderr.decode(errors="replace").strip().splitlines()
        is_its_own = outcome.verdict == "exit" and complaint
        raise ToolError(complaint[-1] if is_its_own else f"the program {outcome.reason}")

    return run
