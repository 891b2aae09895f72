"""A sandbox for programs that nobody has read: `run_program` runs one and tells how it ended."""

from __future__ import annotations

from forge_core.sandbox.outcome import Limits, Outcome, SandboxRefused, Verdict
from forge_core.sandbox.runner import check_sandbox, run_program

__all__ = ["Limits", "Outcome", "SandboxRefused", "Verdict", "check_sandbox", "run_program"]
