"""What came of a run, for people: a table on the terminal and one in Prefect."""

from __future__ import annotations

from typing import Any

from prefect.artifacts import acreate_table_artifact
from rich.table import Table

from flows.result_rows import result_rows
from storage.objects import open_store
from storage.summary import run_summary


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
