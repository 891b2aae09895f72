"""A process that is told to end does not wait for a store whose server is gone."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from storage.contract import hurry
from storage.objects import StoreError, open_store


def test_a_store_without_a_server_is_given_up_once_the_process_is_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    timer = threading.Timer(0.5, hurry.set)
    timer.start()
    started = time.monotonic()
    try:
        with pytest.raises(StoreError, match="could not"):
            open_store("s3://bucket/store").read("a/b")
    finally:
        timer.join()
        hurry.clear()
    # It waits 90 seconds otherwise.
    assert 0.4 < time.monotonic() - started < 20
