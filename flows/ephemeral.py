"""What a run starts beside itself and never leaves behind: a work folder and, without a server, one of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from forge_core import guardian

_HOME = "prefect"
_DATABASE = "prefect.db"
_CLOSE_SECONDS = 5.0
_HEALTH_SECONDS = 120.0

# Prefect reads these at import.
_SETTINGS = {
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # As for deployments: a server's automation takes runs for dead that are silent for longer.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "DO_NOT_TRACK": "1",
}

# Services that only schedules and automations need; a server for one run has neither.
_SERVER_SETTINGS = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
}


@contextmanager
def surroundings() -> Iterator[Path]:
    """A work folder that becomes TMPDIR, and a Prefect server if `PREFECT_API_URL` names none.

    Both go when the context is left, and within a second when this process is killed. The server listens on
    127.0.0.1 and keeps its database in the work folder, which is yielded; `wait_for_server` waits until it answers.
    """
    before = dict(os.environ)
    workdir = Path(tempfile.mkdtemp(prefix="forgeflow-"))
    os.environ["TMPDIR"] = str(workdir)
    tempfile.tempdir = None
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    command: list[str] = []
    if not os.environ.get("PREFECT_API_URL"):
        os.environ["PREFECT_HOME"] = str(workdir / _HOME)
        take_empty_database(workdir / _HOME / _DATABASE)
        port = _free_port()
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        command = _server_command(port)
    os.environ.setdefault("PREFECT_RESULTS_LOCAL_STORAGE_PATH", str(workdir / "results"))
    keeper = subprocess.Popen(
        [sys.executable, "-S", "-E", guardian.__file__, str(workdir), *command],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **_SERVER_SETTINGS},
    )
    try:
        yield workdir
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        try:
            keeper.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            keeper.kill()  # the server dies with it
            shutil.rmtree(workdir, ignore_errors=True)
        # Whoever called from Python goes on with what they had.
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _server_command(port: int) -> list[str]:
    application = "prefect.server.api.server:create_app"
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    options = ["--log-level", "error", "--lifespan", "on"]
    return [sys.executable, "-m", "uvicorn", "--factory", application, *listen, *options]


def wait_for_server(workdir: Path) -> None:
    """Return when the Prefect server answers; RuntimeError naming its address if it does not, or has ended."""
    address = os.environ["PREFECT_API_URL"]
    # Loopback is not asked for through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _HEALTH_SECONDS
    while time.monotonic() < deadline and not (workdir / guardian.CHILD_ENDED).exists():
        try:
            with opener.open(f"{address}/health", timeout=5):
                keep_empty_database(workdir / _HOME / _DATABASE)
                return
        except urllib.error.HTTPError:
            return  # it answers, if only to ask who is there
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(
        f"the Prefect server at {address} did not answer: see output.log, or set PREFECT_API_URL to one that does"
    )


def take_empty_database(path: Path) -> None:
    """Begin with the tables that a server of this version made before: its migrations take several seconds of CPU."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_kept_database(), path)
    except OSError:
        # None kept yet, or no room: the server makes its own, and must not find half of one.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def keep_empty_database(path: Path) -> None:
    """Keep a new server's database for later runs; what cannot be kept is made again."""
    kept = _kept_database()
    if kept.exists() or not path.exists():
        return
    temporary = kept.with_name(f"{kept.name}-{uuid.uuid4().hex}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (
            contextlib.closing(sqlite3.connect(path)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as target,
        ):
            source.backup(target)
        temporary.replace(kept)
    except (OSError, sqlite3.Error):
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _kept_database() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "forgeflow" / f"prefect-{version('prefect')}.db"
