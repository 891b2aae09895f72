"""A real S3 server for tests, SeaweedFS: one for the session, on free ports of the loopback device.

Tests take `s3_store_uri`, which also sets AWS's environment variables, or `s3_server`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from s3fs import S3FileSystem

from forge_core import guardian

pytest_plugins = ["s3_proxy"]

BUCKET = "forgeflow-tests"
REGION = "us-east-1"
ADMIN = ("admin-key", "admin-secret")
"""Key and secret of who makes the bucket."""
WRITER = ("writer-key", "writer-secret")
"""Of who may read, write, list and delete."""
READER = ("reader-key", "reader-secret")
"""Of who may only read and list."""

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


@dataclass(frozen=True)
class S3Server:
    """A server that runs."""

    endpoint: str
    """Its URL."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def environment(
        self, endpoint: str | None = None, credentials: tuple[str, str] = WRITER
    ) -> dict[str, str]:
        """AWS's variables for processes that use it, perhaps through a proxy at another endpoint."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": credentials[0],
            "AWS_SECRET_ACCESS_KEY": credentials[1],
            # No profile of whoever runs the tests, and no search for a machine's role.
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_uri(self) -> str:
        """A store that nobody has used."""
        return f"s3://{BUCKET}/stores/{next(self._numbers)}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The server, with an empty bucket. It ends with the tests, however they end."""
    with serving() as server:
        yield server


@contextlib.contextmanager
def serving() -> Iterator[S3Server]:
    """A server with an empty bucket. It ends with this process, however that ends, and so do its files."""
    folder = Path(tempfile.mkdtemp(prefix="forgeflow-s3-"))
    ports = _free_ports(8)
    (folder / "identities.json").write_text(json.dumps({"identities": _identities()}))
    keeper = subprocess.Popen(
        [sys.executable, "-S", "-E", guardian.__file__, str(folder), *_command(folder, ports)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "output.log").open("wb"),
        start_new_session=True,
    )
    assert keeper.stdin is not None
    try:
        server = S3Server(f"http://127.0.0.1:{ports[0]}")
        _make_bucket(server, folder)
        yield server
    finally:
        keeper.stdin.close()
        keeper.wait(_STOP_SECONDS)
        _remove_dead_sockets()


@pytest.fixture
def s3_store_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a new store; AWS's environment variables lead to it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.new_uri()


def _command(folder: Path, ports: list[int]) -> list[str]:
    services = ("s3", "filer", "master", "volume")
    numbers = [f"-{name}.port={port}" for name, port in zip(services, ports[:4], strict=True)]
    numbers += [f"-{name}.port.grpc={port}" for name, port in zip(services, ports[4:], strict=True)]
    sockets = [f"-{name}.localSocket={folder / name}.sock" for name in services[:2]]
    return [
        str(Path(sys.executable).parent / "weed"), "-logtostderr", "server", f"-dir={folder}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-master.telemetry=false",
        "-s3.iam=false", f"-s3.config={folder / 'identities.json'}", "-volume.max=20",
        "-s3.port.iceberg=0", "-s3.port.lance=0", *numbers, *sockets,
    ]  # fmt: skip


def _identities() -> list[dict[str, object]]:
    rights = [
        ("admin", ADMIN, ["Admin"]),
        ("writer", WRITER, ["Read", "Write", "List"]),
        ("reader", READER, ["Read", "List"]),
    ]
    return [
        {
            "name": name,
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": actions,
        }
        for name, (key, secret), actions in rights
    ]


def _make_bucket(server: S3Server, folder: Path) -> None:
    """Return when the server has made the bucket and an object in it, which is when it is up."""
    files = S3FileSystem(
        endpoint_url=server.endpoint,
        key=ADMIN[0],
        secret=ADMIN[1],
        skip_instance_cache=True,
        config_kwargs={"retries": {"total_max_attempts": 1}},
    )
    files.retries = 1
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                files.call_s3("create_bucket", Bucket=BUCKET)
            files.call_s3("put_object", Bucket=BUCKET, Key="up", Body=b"")
            return
        except (OSError, BotoCoreError, ClientError) as error:
            ended = (folder / guardian.CHILD_ENDED).exists()
            if ended or time.monotonic() > deadline:
                output = (folder / "output.log").read_text()[-4000:]
                raise RuntimeError(f"SeaweedFS did not come up:\n{output}") from error
            time.sleep(0.05)


def _remove_dead_sockets() -> None:
    """Remove what SeaweedFS leaves in the folder where it always puts it, and servers that were killed have left."""
    for path in Path("/tmp").glob("seaweedfs-*-grpc-*.sock"):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on: all are held at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
