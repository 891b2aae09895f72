"""The command `server`: Prefect's server, a worker, and all flows deployed, on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.deploy_command import FOLDER, Folder, Notify, read_files
from flows.serving import READY_SECONDS, Serving, serving
from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Store,
    Verbose,
    print_json,
    refuse,
    refusing_input,
    set_up_logging,
)


def server(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Loopback port; 0: one that is free.")
    ] = 0,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of all state; PREFECT_HOME or .prefect if not given."
        ),
    ] = None,
    worker: Annotated[
        bool, typer.Option(help="Also deploy the flows, and run those that are started there.")
    ] = True,
    limit: Annotated[
        int, typer.Option(min=1, help="Runs that the worker has at once, of all queues.")
    ] = 4,
    keep_days: Annotated[
        int, typer.Option(min=1, help="Days after which ended flow runs are pruned.")
    ] = 90,
    folder: Folder = FOLDER,
    notify: Notify = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Start a Prefect server with a worker and all flows deployed; Ctrl-C ends everything."""
    set_up_logging(verbose)
    if port == 0:
        port = _free_port()
    elif not _is_free(port):
        refuse(f"--port {port} is in use on 127.0.0.1: choose another, or leave it out")
    state = (state or Path(os.environ.get("PREFECT_HOME", ".prefect"))).absolute()
    try:
        with refusing_input():
            pool = read_files(folder)[1].work_pool if worker else None
            with serving(state, port) as held:
                held.start_server(port, keep_days, verbose=verbose)
                deployed = {}
                if pool is not None:
                    deployed = _deploy(held, folder, notify, store)
                    held.start_worker(pool, limit)
                _tell(held, deployed, json_output=json_output)
                held.watch()
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from error


def _deploy(held: Serving, folder: Path, notify: str | None, store: str) -> dict[str, Any]:
    """Deploy by a process of its own, which gives its memory back. Raises RuntimeError with what it said."""
    arguments = ["deploy", "--json", "--folder", str(folder), "--store", store]
    arguments += [] if notify is None else ["--notify", notify]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        env=held.client_environment(),
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"deploy ended with exit code {done.returncode}")
    document: dict[str, Any] = json.loads(done.stdout)
    return {change: document[change] for change in ("created", "changed", "unchanged")}


def _tell(held: Serving, deployed: dict[str, Any], *, json_output: bool) -> None:
    """Say that it is ready, and where."""
    if json_output:
        print_json(
            {
                "url": held.url,
                "api_url": held.api_url,
                "pid": os.getpid(),
                "state": str(held.state),
                **({"deployed": deployed} if deployed else {}),
            }
        )
    else:
        typer.echo(f"Prefect's pages: {held.url} (Ctrl-C ends everything)")
        if deployed:
            typer.echo(f"A worker waits for runs that are started there; logs: {held.state}")
        typer.echo(
            "For runs of the command line to show there, type in the shell that starts them:"
        )
        typer.echo(f"  export PREFECT_API_URL={held.api_url}")
    sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
