"""What came of a run, for people: a table on the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from flows.result_rows import result_rows


def result_table(summary: dict[str, Any]) -> Table:
    """The last table of a run."""
    table = Table("", "before", "after", title=f"run {summary['run_id']}", title_justify="left")
    for row in result_rows(summary):
        table.add_row(*row)
    return table
