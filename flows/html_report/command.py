"""`forgeflow report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import (
    DEFAULT_STORE,
    Json,
    Store,
    Verbose,
    print_json,
    refusing_input,
    set_up_logging,
)
from storage.objects import open_store
from storage.workspace import locate


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids of one run or several.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the page goes; one run's lies with the run."),
    ] = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write what became of a run, or of several side by side, as one HTML page that needs no network."""
    set_up_logging(verbose)
    # Deferred: it brings Plotly and pyarrow, which the other commands do without.
    from flows.html_report.data import read_run
    from flows.html_report.page import render, write_report

    with refusing_input():
        opened = open_store(store)
        if len(runs) == 1 and output is None:
            page = locate(opened, write_report(opened, runs[0]))
        else:
            path = output or Path(f"report-{'-'.join(runs)}.html")
            if not path.absolute().parent.is_dir():
                raise ValueError(
                    f"--output {str(path)!r} lies in a folder that does not exist: make it, or take another"
                )
            path.write_text(render([read_run(opened, run_id) for run_id in runs]))
            page = str(path.absolute())
    if json_output:
        print_json({"runs": runs, "report": page})
    else:
        typer.echo(f"Open {page} in a browser.")
