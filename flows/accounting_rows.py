"""What a run held and moved, as rows for any table."""

from __future__ import annotations

from typing import Any

HEADINGS = ("GPU-seconds", "core-seconds", "bytes", "tokens")
"""Of the columns after the first."""

_UNITS = ("device_seconds", "core_seconds", "bytes", "tokens")


def accounting_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """By stage, then in all, then per episode; a dash where there is nothing."""
    accounting = summary["accounting"]
    rows = [(stage, *map(_cell, _values(held))) for stage, held in accounting["stages"].items()]
    rows.append(("in all", *map(_cell, _values(accounting["total"]))))
    if accounting["per_episode"] is not None:
        per_episode = map(_small_cell, _values(accounting["per_episode"]))
        rows.append((f"per episode, of {accounting['episodes']:,}", *per_episode))
    return rows


def _values(held: dict[str, float]) -> list[float]:
    return [held[unit] for unit in _UNITS]


def _cell(value: float) -> str:
    if not value:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"


def _small_cell(value: float) -> str:
    if not value:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
