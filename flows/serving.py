"""Prefect's server and a worker as children of this process: started, watched, started again, and stopped in order.

Whatever becomes of this process, they go with it: the kernel kills server and worker, and flows die with their worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from flows.ephemeral import keep_empty_database, take_empty_database
from forge_core import guardian

READY_SECONDS = 120.0
"""Time in which a server must answer and a worker must have told that it is there."""
_STOP_SECONDS = 10.0
_FLOW_SECONDS = 40.0
"""Time that flows get to end in order: `shutdown.grace_seconds` and their checkpoint."""
_MOST_RESTARTS = 5
_SOUND_SECONDS = 60.0
"""A child that has lived so long has started well; its restarts are counted anew."""
_DATABASE = "prefect.db"


@dataclass(kw_only=True)
class Child:
    """A process that is started again when it ends."""

    name: str
    """For people, and of its log file."""
    command: list[str]
    """What is run."""
    environment: dict[str, str]
    """All of its environment."""
    log: Path
    """Where its output goes."""
    process: subprocess.Popen[bytes] | None = None
    """The newest one."""
    started_at: float = 0.0
    """When that was started, on the monotonic clock."""
    restarts: int = 0
    """How many of them in a row."""

    def start(self) -> None:
        """Start it, in a session of its own: a terminal's Ctrl-C is for this process."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
                preexec_fn=guardian.die_with_parent,
            )
        self.started_at = time.monotonic()

    def has_ended(self) -> bool:
        """Whether it was started and lives no more."""
        return self.process is not None and self.process.poll() is not None

    def stop(self) -> None:
        """Stop it, by force if it does not heed."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(kw_only=True)
class Serving:
    """A server on this machine, and what hangs on it."""

    state: Path
    """Folder of database, leases, results and logs."""
    url: str
    """Of Prefect's pages."""
    children: list[Child] = field(default_factory=list)
    """In the order in which they were started."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set once everything is to end."""

    @property
    def api_url(self) -> str:
        """Of the API."""
        return f"{self.url}/api"

    def client_environment(self) -> dict[str, str]:
        """The environment of what talks to the server."""
        return {
            **os.environ,
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": str(self.state),
            "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(self.state / "results"),
            # Never another server, however short this one is away.
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
            "DO_NOT_TRACK": "1",
        }

    def start_worker(self, pool: str, limit: int) -> None:
        """Start a worker that takes runs of the pool, and return once the server has heard of it."""
        name = f"{socket.gethostname()}-{os.getpid()}"
        worker = [sys.executable, "-m", "prefect", "--no-prompt", "worker", "start"]
        options = ["--pool", pool, "--type", "process", "--name", name, "--limit", str(limit)]
        self._start(
            Child(
                name="worker",
                command=[*worker, *options],
                environment={
                    **self.client_environment(),
                    "PREFECT_WORKER_QUERY_SECONDS": "2",
                    "PREFECT_RUNNER_POLL_FREQUENCY": "2",
                },
                log=self.state / "worker.log",
            )
        )
        address = f"{self.api_url}/work_pools/{pool}/workers/filter"
        self._await(lambda: any(w["name"] == name for w in _post(address)), "the worker")

    def watch(self) -> None:
        """Return when everything is to end; until then start again what ends by itself.

        Raises RuntimeError that names what ended again and again.
        """
        while not self.stopping.wait(0.5):
            for child in self.children:
                if not child.has_ended():
                    continue
                if time.monotonic() - child.started_at > _SOUND_SECONDS:
                    child.restarts = 0
                if child.restarts == _MOST_RESTARTS:
                    raise RuntimeError(
                        f"{child.name} ended {_MOST_RESTARTS} times: see {child.log}"
                    )
                child.restarts += 1
                child.start()

    def stop(self) -> None:
        """Stop the flows, so that their runs tell how they ended, then what they need."""
        for child in reversed(self.children):
            if child.process is not None and not child.has_ended():
                _stop_flows(child.process.pid)
            child.stop()

    def _start(self, child: Child) -> None:
        child.start()
        self.children.append(child)

    def _await(self, is_ready: Any, what: str) -> None:
        """Wait for a condition of the newest child. Raises RuntimeError naming its log if it ends or takes too long."""
        deadline, child = time.monotonic() + READY_SECONDS, self.children[-1]
        while time.monotonic() < deadline and not child.has_ended() and not self.stopping.is_set():
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                if is_ready():
                    return
            time.sleep(0.1)
        if self.stopping.is_set():
            raise RuntimeError(f"{what} was stopped before it was ready")
        raise RuntimeError(f"{what} did not become ready: see {child.log}")

    def start_server(self, port: int, keep_days: int, *, verbose: bool) -> None:
        """Start Prefect's server, and return once it answers."""
        database = self.state / _DATABASE
        if not database.exists():
            take_empty_database(database)
        application = "prefect.server.api.server:create_app"
        listen = ["--host", "127.0.0.1", "--port", str(port)]
        level = ["--log-level", "info" if verbose else "warning"]
        self._start(
            Child(
                name="server",
                # Not `prefect server start`, which has settings of its own for this one process.
                command=[
                    sys.executable,
                    "-m",
                    "uvicorn",
                    "--factory",
                    application,
                    *listen,
                    *level,
                ],
                environment=server_environment(self.state, self.api_url, keep_days),
                log=self.state / "server.log",
            )
        )
        self._await(lambda: _get(f"{self.api_url}/health"), "Prefect's server")
        keep_empty_database(database)


@contextmanager
def serving(state: Path, port: int) -> Iterator[Serving]:
    """Hold a folder of state, and stop at the end what was started meanwhile.

    SIGINT and SIGTERM set `stopping`. Raises ValueError if another server holds the folder.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = Serving(state=state, url=f"http://127.0.0.1:{port}")
    before = {
        number: signal.signal(number, lambda *_: held.stopping.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with _lock(state), _work_folder():
            for log in ("server.log", "worker.log"):
                (state / log).write_bytes(b"")
            try:
                yield held
            finally:
                held.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def server_environment(state: Path, api_url: str, keep_days: int) -> dict[str, str]:
    """The environment of Prefect's server, whose settings survive a restart of it.

    Args:
        state: folder of its database.
        api_url: its address.
        keep_days: days after which ended flow runs are pruned; events go after a week at the latest.
    """
    environment = {
        **os.environ,
        "PREFECT_HOME": str(state),
        "PREFECT__SERVER_FINAL": "1",
        # The pages ask port 4200 unless they are told better.
        "PREFECT_UI_API_URL": api_url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": os.environ.get("PREFECT_SERVER_LOGGING_LEVEL", "WARNING"),
        # In the process's memory, as by default, leases would be lost with it, and runs cancelled for it.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(keep_days * 86_400),
        # Unlike the one above, this one takes no number of seconds.
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"P{min(keep_days, 7)}D",
        "DO_NOT_TRACK": "1",
    }
    # A server that took itself for a client of another would not start.
    environment.pop("PREFECT_API_URL", None)
    return environment


@contextmanager
def _lock(state: Path) -> Iterator[None]:
    """Keep a second server away from the database; the kernel gives the lock back however this process ends."""
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--state {str(state)!r} is held by another server: stop it, or name another folder"
            ) from None
        yield


@contextmanager
def _work_folder() -> Iterator[None]:
    """A TMPDIR for all that runs here, with a short path as sockets need it; a guardian removes it in any case."""
    folder = tempfile.mkdtemp(prefix="forgeflow-")
    keeper = subprocess.Popen(
        [sys.executable, "-S", "-E", guardian.__file__, folder],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = before
        assert keeper.stdin is not None
        keeper.stdin.close()
        try:
            keeper.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            keeper.kill()
            shutil.rmtree(folder, ignore_errors=True)


def _stop_flows(worker: int) -> None:
    """End the flows of a worker in order, then by force: told to end, it would leave them without a word."""
    try:
        flows = psutil.Process(worker).children()
        below = [each for flow in flows for each in flow.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for flow in flows:
        with contextlib.suppress(psutil.NoSuchProcess):
            flow.terminate()
    _, alive = psutil.wait_procs([*flows, *below], timeout=_FLOW_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _get(address: str) -> bool:
    # Loopback is not asked for through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=5) as answer:
        return bool(answer.status == 200)


def _post(address: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(
        address, data=b"{}", headers={"Content-Type": "application/json"}
    )
    with opener.open(request, timeout=5) as answer:
        return json.load(answer)
