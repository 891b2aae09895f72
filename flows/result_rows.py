"""What changed in a run from before to after, as rows for any table."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str]


def result_rows(summary: dict[str, Any]) -> list[Row]:
    """What changed from before to after, as (what, before, after)."""
    evaluation, seconds = summary["eval"], summary["seconds"]
    groups, episodes, parity = summary["groups"], summary["episodes"], summary["parity"]
    dropped = ", ".join(f"{n} {reason}" for reason, n in groups["dropped"].items()) or "none"
    return [
        ("score, sampled", _score(evaluation["initial"]), _score(evaluation["final"])),
        ("score, greedy", _score(evaluation["greedy_initial"]), _score(evaluation["greedy_final"])),
        ("held-out prompts", "", str(evaluation["num_prompts"] or "-")),
        ("steps", str(summary.get("config", {}).get("parent_step") or 0), str(summary["steps"])),
        ("groups trained", "", f"{groups['trained']} of {groups['admitted']}"),
        ("groups dropped", "", dropped),
        ("episodes generated", "", f"{episodes['generated']:,}"),
        ("response tokens", "", f"{summary['tokens']['response']:,}"),
        ("largest parity gap", "", "-" if parity["max"] is None else f"{parity['max']:.1e} nats"),
        ("retries", "", str(summary["retries"])),
        ("processes failed", "", str(summary["failures"])),
        ("time", "", f"{seconds['total']:.0f} s"),
    ]


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
