"""Flows started from a real server's API by its worker: one server for all of these tests."""

from __future__ import annotations

import os
import subprocess
import urllib.error
from collections.abc import Iterator

import psutil
import pytest
from deployed_server import GRACE_SECONDS, TINY, Server, served
from harness import assert_verified, command


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with worker and deployments."""
    with served(tmp_path_factory.mktemp("server")) as server:
        yield server


def test_a_run_is_cancelled_leaves_nothing_and_is_resumed_from_the_command_line(
    server: Server,
) -> None:
    """Traps 1 and 2: a cancel reaches the flow's process alone."""
    flow_run = server.start("post-train/tiny", {"settings": TINY, "run_id": "cancelled"})
    server.wait_for_step("cancelled")
    flows = server.child("worker").children()
    below = [each for flow in flows for each in flow.children(recursive=True)]
    assert len(below) >= 4
    server.set_state(flow_run, "CANCELLING", "Cancelling")
    _, alive = psutil.wait_procs([*flows, *below], timeout=GRACE_SECONDS + 5)
    assert not alive
    server.wait(flow_run, "CANCELLED")
    resumed = subprocess.run(
        command("resume", "cancelled", "--store", str(server.store)),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PREFECT_API_URL": server.api},
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_verified("cancelled", server.store)


def test_what_a_form_refuses_it_refuses_before_a_run_exists(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.start("post-train/tiny", {"settings": {**TINY, "steps": 0}})
    assert refused.value.code == 409
    assert "steps" in refused.value.read().decode()
