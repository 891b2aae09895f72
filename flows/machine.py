"""Commands about the machine: a Prefect server to watch runs in, and a check of what is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.data_command import examine_data
from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Store,
    Verbose,
    console,
    print_json,
    refuse,
    set_up_logging,
)
from forge_core.placement.hosts import this_machine
from storage.objects import check_writable

_PACKAGES = {
    "torch": "torch",
    "torchmonarch": "monarch.actor",
    "torchstore": "torchstore",
    "transformers": "transformers",
    "vllm": "vllm",
    "prefect": "prefect",
    "pyarrow": "pyarrow",
    "reasoning-gym": "reasoning_gym",
}
"""Distributions that a run needs, and what is imported of each."""
_IMPORT_SECONDS = 120
"""Time in which one package must have been imported."""


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
    environment = {
        **os.environ,
        "PREFECT_HOME": os.environ.get("PREFECT_HOME", str(Path(".prefect").absolute())),
        # The pages ask port 4200 unless they are told better.
        "PREFECT_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    # A server that took itself for a client of another would not start.
    environment.pop("PREFECT_API_URL", None)
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


def doctor(
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="File or folder of rows to check instead."),
    ] = None,
    question: Annotated[
        str, typer.Option(metavar="COLUMN", help="Column of DATA that has the questions.")
    ] = "question",
    answer: Annotated[
        str, typer.Option(metavar="COLUMN", help="Column of DATA that has the answers.")
    ] = "answer",
    test_fraction: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of DATA that is held out, by hash."),
    ] = 0.1,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Model whose tokens and context DATA is held against."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest response, in tokens, that answers must fit.")
    ] = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check that what a run needs is installed and can be imported; or check DATA before a run trains on it."""
    set_up_logging(verbose)
    if data is not None:
        examine_data(
            data,
            question=question,
            answer=answer,
            test_fraction=test_fraction,
            model=model,
            max_tokens=max_tokens,
            json_output=json_output,
        )
        return
    packages = {name: _examine(name, module) for name, module in _PACKAGES.items()}
    host = this_machine()
    findings = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(host.cores),
        "memory_bytes": host.memory_bytes,
        "gpus": len(host.gpus),
        "store": _examine_store(store),
        "packages": packages,
    }
    problems = [f"{name}: {each['error']}" for name, each in packages.items() if each["error"]]
    if findings["store"] is not None:
        problems.append(str(findings["store"]))
    if json_output:
        print_json({**findings, "problems": problems})
    else:
        _print_findings(findings, problems)
    if problems:
        raise typer.Exit(FAILED)


def _examine(distribution: str, module: str) -> dict[str, Any]:
    """Version of a distribution, and why it cannot be imported, in a process of its own."""
    names = [distribution, f"{distribution}-cpu"]
    versions = [version for name in names if (version := _version(name)) is not None]
    if not versions:
        return {"version": None, "error": "not installed; see the README's first section"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        error: str | None = f"import took more than {_IMPORT_SECONDS} s"
    else:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        error = lines[-1] if done.returncode else None
    return {"version": versions[0], "error": error}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_store(store: str) -> str | None:
    try:
        check_writable(store)
    except ValueError as error:
        return str(error)
    return None


def _print_findings(findings: dict[str, Any], problems: list[str]) -> None:
    out = console()
    out.print(f"Python {findings['python']} on {findings['platform']}", markup=False)
    gib = findings["memory_bytes"] / 2**30
    out.print(f"{findings['cores']} cores, {gib:.1f} GiB of memory, {findings['gpus']} GPUs")
    table = Table("package", "version", "imports")
    for name, each in findings["packages"].items():
        table.add_row(name, each["version"] or "-", "no" if each["error"] else "yes")
    out.print(table)
    for problem in problems:
        out.print(problem, markup=False)
    if not problems:
        out.print("Nothing is missing.")


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
