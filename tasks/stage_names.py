"""What a call of a stage is about, for the name of its task run: a round, a step, a version of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_core.replay import PlannedStep
from tasks.references import Generation, Round, Scored, Segment, StepBatch

_NUMBERS = {"step": "step", "policy_version": "version"}
"""What whole numbers are called, by the argument that they are given as."""


def task_run_name(stage: str, arguments: Mapping[str, Any]) -> str:
    """The stage, and what its arguments say of where it is: `train step 5`, `generate round 2, steps 3 to 4`."""
    told = [said for name, value in arguments.items() if (said := _place(name, value))]
    return f"{stage} {', '.join(told)}" if told else stage


def _place(name: str, value: Any) -> str | None:
    match value:
        case Generation() | Scored():
            return _place(name, value.round)
        case Round(number=number, first_step=first, last_step=last):
            steps = _steps(first, last)
            # In sync a round is a step; further rounds that fill a step up are told apart.
            return steps if steps == f"step {number}" else f"round {number}, {steps}"
        case Segment(first_step=first, last_step=last):
            return _steps(first, last)
        case StepBatch() | PlannedStep():
            return f"step {value.step}"
        case (StepBatch(), *_):
            return _steps(value[0].step, value[-1].step)
        case int() if name in _NUMBERS:
            return f"{_NUMBERS[name]} {value}"
        case str() if name == "name":
            return value
    return None


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"
