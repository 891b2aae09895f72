"""The command `deploy`: the deployments, queues and automations of the files, on a Prefect server."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.deploy_file import PrefectFile, ServerFile, read_file
from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Store,
    Verbose,
    console,
    print_json,
    refuse,
    refusing_input,
    set_up_logging,
)

if TYPE_CHECKING:
    from flows.deploy import Deployed

FOLDER = Path(__file__).parent.parent / "deployments"
_SECONDS = 120
"""Time in which everything must be deployed."""

Folder = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder of prefect.yaml and server.yaml."),
]
Notify = Annotated[
    str | None,
    typer.Option(metavar="TYPE/NAME", help="Block of the server that sends notifications."),
]


def deploy(
    folder: Folder = FOLDER,
    notify: Notify = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Deploy all flows to the Prefect server that PREFECT_API_URL names; what stands already is left as it is."""
    set_up_logging(verbose)
    api_url = os.environ.get("PREFECT_API_URL")
    with refusing_input():
        files = read_files(folder)
        if not api_url:
            refuse(
                "PREFECT_API_URL names no server: export the address that forgeflow server prints"
            )
    try:
        with refusing_input():
            done = deploy_files(*files, store=store, notify=notify)
    except (RuntimeError, OSError, TimeoutError) as error:
        typer.echo(f"{api_url}: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(FAILED) from error
    if json_output:
        print_json({"api_url": api_url, **as_document(done)})
        return
    table = Table("what", "name", "")
    for each in done:
        table.add_row(each.kind, each.name, each.change)
    console().print(table)


def read_files(folder: Path) -> tuple[PrefectFile, ServerFile]:
    """Both files of a folder. Raises ValueError that names file, key and mend."""
    return (
        read_file(folder / "prefect.yaml", PrefectFile),
        read_file(folder / "server.yaml", ServerFile),
    )


def deploy_files(
    file: PrefectFile, server: ServerFile, *, store: str, notify: str | None
) -> list[Deployed]:
    """Deploy to the server that the environment names. Raises as `flows.deploy.deploy` does, or OSError."""
    # Deferred: it brings Prefect, which takes seconds to import and reads its settings then.
    import httpx
    from prefect.client.orchestration import get_client

    from flows.deploy import deploy as bring

    async def main() -> list[Deployed]:
        async with asyncio.timeout(_SECONDS), get_client() as client:
            return await bring(
                client, file, server, variables=variables(store), notify_block=notify
            )

    try:
        return asyncio.run(main())
    except httpx.HTTPStatusError as error:
        raise RuntimeError(f"{error} {error.response.text[:500]}") from error
    except httpx.HTTPError as error:
        raise OSError(f"the server does not answer: {error}") from error


def variables(store: str) -> dict[str, str]:
    """What the files' `{{ $NAME }}` stand for: paths that mean the same wherever the worker runs."""
    return {
        "FORGEFLOW_STORE": store if "://" in store else str(Path(store).absolute()),
        "FORGEFLOW_DIRECTORY": os.getcwd(),
    }


def as_document(done: list[Deployed]) -> dict[str, Any]:
    """For `--json`: names by what was done."""
    changes = ("created", "changed", "unchanged")
    return {
        change: [f"{each.kind} {each.name}" for each in done if each.change == change]
        for change in changes
    }
