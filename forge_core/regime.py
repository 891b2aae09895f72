"""What each regime makes of the config: defaults where nothing is said, and the bounds that hold them together.

A is `max_policy_age`, P `groups_per_step`, W `window`, n `steps_per_round`; `forge_core.admission` has the proof.
"""

from __future__ import annotations

from typing import Any, Literal

from forge_core.admission import spare_steps

Regime = Literal["sync", "async", "hybrid"]

OF_ONE_REGIME = ("max_policy_age", "window", "steps_per_round")
"""Keys whose values mean something else, or nothing, in another regime."""

_ASYNC_AGE = 2
_HYBRID_STEPS = 2


def with_defaults(given: dict[str, Any], *, groups_per_step: Any) -> dict[str, Any]:
    """`given` with its regime's defaults for A, W and n; each default satisfies the bound."""
    filled = {key: value for key, value in given.items() if value is not None}
    if filled.get("regime") == "async":
        age = filled.setdefault("max_policy_age", _ASYNC_AGE)
        # At age 1 overlap is worth more than a window, and both together cost more than one version.
        has_window = isinstance(age, int) and age >= 2
        filled.setdefault("window", groups_per_step if has_window else 1)
    elif filled.get("regime") == "hybrid":
        steps = filled.setdefault("steps_per_round", _HYBRID_STEPS)
        if isinstance(steps, int):
            filled.setdefault("max_policy_age", 2 * steps - 1)
    return filled


def check_bounds(
    regime: Regime, *, max_policy_age: int, window: int, steps_per_round: int, groups_per_step: int
) -> None:
    """Raise ValueError, with the formula, if a group could grow older than A."""
    if regime == "sync" and max_policy_age != 0:
        raise ValueError(
            f"max_policy_age {max_policy_age} is meaningless in regime sync, which is on-policy; set it to 0"
        )
    if regime != "async" and window != 1:
        raise ValueError(
            f"window {window} is for regime async; {regime} trains in the order of draws: set it to 1"
        )
    if regime != "hybrid" and steps_per_round != 1:
        raise ValueError(
            f"steps_per_round {steps_per_round} is for regime hybrid; in {regime} set it to 1"
        )
    oldest = 2 * steps_per_round - 1
    if regime == "hybrid" and max_policy_age < oldest:
        raise ValueError(
            f"max_policy_age {max_policy_age} is below 2 x steps_per_round - 1 = {oldest}, the age of the last groups "
            f"that a round trains on: raise it to {oldest} or lower steps_per_round {steps_per_round}"
        )
    spare = spare_steps(
        max_policy_age=max_policy_age, window=window, groups_per_step=groups_per_step
    )
    if spare < 0:
        needed = max_policy_age - spare
        raise ValueError(
            f"max_policy_age {max_policy_age} is below ceil((window - 1) / groups_per_step) = "
            f"ceil(({window} - 1) / {groups_per_step}) = {needed}, the steps by which others overtake a group: raise "
            f"it to {needed} or lower window to {max_policy_age * groups_per_step + 1}"
        )
