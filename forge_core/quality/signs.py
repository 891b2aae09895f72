"""What in a run's figures speaks of reward hacking or of collapse, a sentence each.

They are rules of thumb on the first and the last tenth of the steps: they say where to look, not what is so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Values = Mapping[int, float]
"""By step."""

_LEAST_STEPS = 10
_RISE = 0.05
_WORSE_HELD_OUT = 0.05
_VERIFIER_FALL = 0.1
_MORE_REPETITION = 0.1
_MORE_TRUNCATED = 0.1
_LONGER = 1.5
_LESS_DISTINCT = 0.5
_LESS_ENTROPY = 0.1
_MORE_DISAGREEMENT = 0.1
_MOST_WITHOUT_SIGNAL = 0.8


def signs(
    series: Mapping[str, Values], metrics: Mapping[str, Values], held_out: Sequence[float]
) -> list[str]:
    """The sentences; none if nothing stands out, or if there are fewer than ten steps.

    Args:
        series: figures by name, as `Quality` has them.
        metrics: step metrics by name.
        held_out: scores of the evaluations, in order.
    """
    rewards = _ends(series.get("reward", {}))
    if rewards is None:
        return []
    found = []
    is_rising = rewards[1] - rewards[0] > _RISE
    if is_rising and len(held_out) > 1 and held_out[-1] < held_out[0] - _WORSE_HELD_OUT:
        found.append(
            f"the reward rose from {rewards[0]:.3g} to {rewards[1]:.3g} while the score on held-out prompts fell from "
            f"{held_out[0]:.3g} to {held_out[-1]:.3g}: the reward is won by something else than what is evaluated"
        )
    for name, values in series.items():
        ends = _ends(values)
        if (
            name.startswith("verifier/")
            and is_rising
            and ends
            and ends[1] < ends[0] - _VERIFIER_FALL
        ):
            found.append(
                f"the reward rose while verifier {name.partition('/')[2]} fell from {ends[0]:.3g} to {ends[1]:.3g}: "
                "one is traded for the other"
            )
    for name, most, what in (
        ("repetition", _MORE_REPETITION, "responses repeat themselves more: the share of repeated 4-grams"),
        ("truncated", _MORE_TRUNCATED, "more responses are cut off: their share"),
        ("disagreement", _MORE_DISAGREEMENT, "verifiers disagree more: the share of samples on which two differ"),
    ):  # fmt: skip
        if (ends := _ends(series.get(name, {}))) and ends[1] - ends[0] > most:
            found.append(f"{what} rose from {ends[0]:.3g} to {ends[1]:.3g}")
    lengths = _ends(series.get("length/mean", {}))
    if lengths and not 1 / _LONGER <= lengths[1] / lengths[0] <= _LONGER:
        found.append(
            f"responses went from {lengths[0]:.3g} to {lengths[1]:.3g} tokens: see whether length is what is rewarded"
        )
    for values, least, what in (
        (series.get("distinct/2", {}), _LESS_DISTINCT, "responses became alike: the share of distinct 2-grams"),
        (metrics.get("entropy", {}), _LESS_ENTROPY, "the policy hardly explores any more: its entropy in nats"),
    ):  # fmt: skip
        if (ends := _ends(values)) and ends[1] < least * ends[0]:
            found.append(f"{what} fell from {ends[0]:.3g} to {ends[1]:.3g}")
    silent = _ends(metrics.get("frac_reward_zero_std", {}))
    if silent and silent[1] > _MOST_WITHOUT_SIGNAL:
        found.append(
            f"of the last steps' groups {silent[1]:.0%} had equal rewards throughout, and taught nothing"
        )
    return found


def _ends(values: Values) -> tuple[float, float] | None:
    """Means of the first and the last tenth of the steps; None for fewer than ten."""
    if len(values) < _LEAST_STEPS:
        return None
    ordered = [values[step] for step in sorted(values)]
    tenth = max(1, len(ordered) // 10)
    return sum(ordered[:tenth]) / tenth, sum(ordered[-tenth:]) / tenth
