"""A proxy in front of a real S3 server that does on demand what servers and networks do on bad days.

Example:
    with FaultyProxy(s3_server.endpoint) as proxy:
        proxy.plan(refuse(503, "SlowDown"), lose, method="PUT")
        ...  # the first PUT is refused; the second is done, and its answer lost
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from s3_server import REGION, WRITER, S3Server


@dataclass
class Exchange:
    """One request, and the means to answer it."""

    handler: BaseHTTPRequestHandler
    """Has the request, and the connection to the client."""
    upstream: str
    """URL of the real server."""
    body: bytes
    """What the client sent."""
    answer: bytes = b""
    """Body of the real server's answer, once there is one."""

    def forward(self, headers: dict[str, str] | None = None) -> HTTPResponse:
        """Let the real server do it, perhaps with other headers."""
        request = self.handler
        connection = HTTPConnection(urlsplit(self.upstream).netloc, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(
                request.command, request.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in (headers or dict(request.headers)).items():
                if name.lower() != "expect":  # This has been answered.
                    connection.putheader(name, value)
            connection.endheaders(self.body)
            response = connection.getresponse()
            self.answer = response.read()
        return response

    def relay(self, response: HTTPResponse, *, num_bytes: int | None = None) -> None:
        """Answer with what the real server said, or with so much of its body."""
        handler = self.handler
        handler.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(self.answer)))
        handler.end_headers()
        handler.wfile.write(self.answer[:num_bytes])


Behaviour = Callable[[Exchange], None]


def refuse(status: int, code: str) -> Behaviour:
    """Answer with an error as S3 does; the real server never hears of the request."""

    def behave(exchange: Exchange) -> None:
        text = f"<Error><Code>{code}</Code><Message>planned</Message></Error>".encode()
        handler = exchange.handler
        handler.send_response_only(status)
        handler.send_header("Content-Type", "application/xml")
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    return behave


def stall(exchange: Exchange) -> None:
    """Say nothing until the client gives up; the real server never hears of the request."""
    while exchange.handler.connection.recv(4096):
        pass
    exchange.handler.close_connection = True


def reset(exchange: Exchange) -> None:
    """Break the connection; the real server never hears of the request."""
    linger = struct.pack("ii", 1, 0)  # Closes with a reset.
    exchange.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    exchange.handler.connection.close()
    exchange.handler.close_connection = True


def lose(exchange: Exchange) -> None:
    """Let the real server do it, and break the connection before the answer."""
    exchange.forward()
    exchange.handler.connection.shutdown(socket.SHUT_RDWR)
    exchange.handler.close_connection = True


def cut(exchange: Exchange) -> None:
    """Break the connection in the midst of the answer's body."""
    response = exchange.forward()
    exchange.relay(response, num_bytes=len(exchange.answer) // 2)
    exchange.handler.close_connection = True


def ignore_condition(exchange: Exchange) -> None:
    """Do what a server does that does not know If-None-Match. The request is signed anew without it."""
    headers = {
        name: value
        for name, value in exchange.handler.headers.items()
        if name.lower() not in ("if-none-match", "authorization", "expect", "x-amz-date")
    }
    request = AWSRequest(
        exchange.handler.command,
        f"http://{headers['Host']}{exchange.handler.path}",
        headers,
        exchange.body,
    )
    S3SigV4Auth(Credentials(*WRITER), "s3", REGION).add_auth(request)
    exchange.relay(exchange.forward(dict(request.headers.items())))


@dataclass
class FaultyProxy:
    """Forwards all requests, except for those that faults are planned for."""

    upstream: str
    """URL of the real server."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of all requests so far."""
    always: Behaviour | None = None
    """What is done with every request that carries a condition; None for what it asks."""
    _plans: dict[str, deque[Behaviour]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, *faults: Behaviour, method: str) -> None:
        """Let these happen, in order, to the next requests with this method, whatever comes between."""
        self._plans.setdefault(method, deque()).extend(faults)

    def recover(self) -> None:
        """Plan nothing any more, and forget what was."""
        with self._lock:
            self._plans.clear()
            self.requests.clear()
            self.always = None

    @property
    def num_planned(self) -> int:
        """Faults that have not happened yet."""
        return sum(map(len, self._plans.values()))

    @property
    def endpoint(self) -> str:
        """URL for clients."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def __getattr__(self, name: str) -> object:
                if name.startswith("do_"):
                    return lambda: proxy._handle(self)
                raise AttributeError(name)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        exchange = Exchange(handler, self.upstream, body)
        with self._lock:
            self.requests.append((handler.command, handler.path))
            plans = self._plans.get(handler.command)
            behaviour = plans.popleft() if plans else None
        if behaviour is None and "If-None-Match" in handler.headers:
            behaviour = self.always
        if behaviour is None:
            exchange.relay(exchange.forward())
        else:
            behaviour(exchange)


@pytest.fixture(scope="session")
def running_s3_proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """One for all tests: for each new address a process makes a new client, which takes a while."""
    with FaultyProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def s3_proxy(
    running_s3_proxy: FaultyProxy, s3_store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> FaultyProxy:
    """A proxy in front of the server, which does no harm yet; the environment leads to it."""
    running_s3_proxy.recover()
    monkeypatch.setenv("AWS_ENDPOINT_URL", running_s3_proxy.endpoint)
    return running_s3_proxy
