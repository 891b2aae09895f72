"""What came of a run, for people: a table on the terminal and one in Prefect."""

from __future__ import annotations

from typing import Any

from prefect.artifacts import acreate_table_artifact
from rich.table import Table

from storage.objects import open_store
from storage.summary import run_summary

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
        ("steps", "0", str(summary["steps"])),
        ("groups trained", "", f"{groups['trained']} of {groups['admitted']}"),
        ("groups dropped", "", dropped),
        ("episodes generated", "", f"{episodes['generated']:,}"),
        ("response tokens", "", f"{summary['tokens']['response']:,}"),
        ("largest parity gap", "", "-" if parity["max"] is None else f"{parity['max']:.1e} nats"),
        ("retries", "", str(summary["retries"])),
        ("time", "", f"{seconds['total']:.0f} s"),
    ]


def result_table(summary: dict[str, Any]) -> Table:
    """The last table of a run."""
    table = Table("", "before", "after", title=f"run {summary['run_id']}", title_justify="left")
    for row in result_rows(summary):
        table.add_row(*row)
    return table


async def table_artifact(store_uri: str, run_id: str) -> None:
    """The same table as a Prefect artifact of the current flow run."""
    rows = result_rows(run_summary(open_store(store_uri), run_id))
    await acreate_table_artifact(
        key="forgeflow-results",
        table=[{"": what, "before": before, "after": after} for what, before, after in rows],
        description=f"Run {run_id} in {store_uri}",
    )


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
