"""The command `server`: a Prefect server to watch runs in."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import (
    DEFAULT_STORE,
    Json,
    Store,
    Verbose,
    print_json,
    refuse,
)


def server(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Loopback port; 0: one that is free.")
    ] = 0,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Start a Prefect server to watch runs in; Ctrl-C ends it."""
    if port == 0:
        port = _free_port()
    elif not _is_free(port):
        refuse(f"--port {port} is in use on 127.0.0.1: choose another, or leave it out")
    url = f"http://127.0.0.1:{port}"
    home = Path(os.environ.get("PREFECT_HOME", ".prefect")).absolute()
    environment = server_environment(home, f"{url}/api")
    if json_output:
        print_json({"url": url, "api_url": f"{url}/api", "pid": os.getpid()})
    else:
        typer.echo(f"Prefect's pages: {url} (Ctrl-C ends the server)")
        typer.echo("For runs to show there, type in the shell that starts them:")
        typer.echo(f"  export PREFECT_API_URL={url}/api")
    sys.stdout.flush()
    # This process becomes the server: no child is left behind, however it ends. What the server
    # prints goes to the error stream.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    command = [sys.executable, "-m", "prefect", "--no-prompt", "server", "start"]
    level = ["--log-level", "INFO" if verbose else "WARNING"]
    os.execve(
        sys.executable, [*command, "--host", "127.0.0.1", "--port", str(port), *level], environment
    )


def server_environment(home: Path, api_url: str) -> dict[str, str]:
    """The environment of Prefect's server: what it must keep over a restart, and what it prunes.

    Args:
        home: folder of its database.
        api_url: its address.
    """
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        # They do not follow PREFECT_HOME.
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "results"),
        # The pages ask port 4200 unless they are told better.
        "PREFECT_UI_API_URL": api_url,
        # In the process's memory, as by default, leases go with it, and the runs that hold them are cancelled.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    # A server that took itself for a client of another would not start.
    environment.pop("PREFECT_API_URL", None)
    return environment


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
