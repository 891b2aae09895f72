"""Hosts of a run: what is refused before it starts, and what is asked of Slurm and of Kubernetes, without either."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from monarch.config import configured

from flows.hosts import check_hosts, describe_hosts
from forge_core.config import HostsConfig, RunConfig
from forge_core.placement.hosts import THIS_MACHINE, Host
from forge_core.placement.jobs import make_job
from forge_core.placement.machines import open_machines
from forge_core.placement.plan import make_plan
from forge_core.placement.roles import roles_here
from forge_core.settings import load_config


def _config(*overrides: str) -> RunConfig:
    return load_config(preset="tiny", file=None, overrides=list(overrides))


def _hosts(*overrides: str) -> HostsConfig:
    return _config(*(f"hosts.{override}" for override in overrides)).hosts


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["hosts.source=workers"], ["attaches to none", "workers"]),
        (["hosts.workers=['tcp://a:1']"], ["this_machine", "set source"]),
        (["hosts.source=workers", "hosts.workers=['a:1']"], ["'a:1'", "tcp://address:port"]),
        (["hosts.source=workers", "hosts.workers=['tcp://a:1', 'tcp://a:1']"], ["twice"]),
        (["hosts.source=kubernetes"], ["kubernetes.image"]),
        (["hosts.slurm.partition=gpu --wrap=x"], ["partition", "a single word"]),
        (["hosts.slurm.arguments=['--x=1\\nrm -rf ~']"], ["arguments", "--name=value"]),
        (["hosts.slurm.time_limit=soon"], ["'soon'", "hours:minutes:seconds"]),
        (
            ["placement=colocated", "hosts.source=slurm", "hosts.number=2"],
            ["colocated", "hosts gives 2"],
        ),
    ],
)
def test_refusals_name_value_field_and_mend(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        _config(*overrides)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_worker_that_does_not_answer_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        answers = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        check_hosts(_hosts("source=workers", f"workers=['{answers}']"))
    with pytest.raises(
        ValueError, match=rf"{answers} does not answer .*placement.worker {answers}"
    ):
        check_hosts(_hosts("source=workers", f"workers=['{answers}']"))


def test_slurm_must_be_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs Slurm's sbatch"):
        check_hosts(_hosts("source=slurm"))


def test_what_computes_lies_elsewhere_and_the_rest_here() -> None:
    here = Host(name=THIS_MACHINE, cores=tuple(range(8)), gpus=("0",), memory_bytes=None)
    others = [
        Host(name=name, cores=(0, 1), gpus=(), memory_bytes=None) for name in ("host a", "host b")
    ]
    config = _config(
        "trainer.ranks=2", "generators.replicas=1", "regime=hybrid", "generators.threads=2"
    )
    plan = make_plan(config, [here, *others])
    lies = {name: grant.host for name, grant in plan.grants.items()}
    assert lies == {
        "controller": THIS_MACHINE, "verifier": THIS_MACHINE, "weights": THIS_MACHINE,
        "trainer": "host a", "generator-0": "host b",
    }  # fmt: skip
    with_reference = _config("algorithm.kl.coefficient=0.1", "hosts.source=slurm")
    assert make_plan(with_reference, [here, *others]).grants["reference"].host != THIS_MACHINE
    assert roles_here(with_reference) == {"verifier", "weights"}
    with pytest.raises(ValueError, match="cores"):
        make_plan(
            _config(
                "trainer.ranks=3",
                "groups_per_step=48",
                "core_binding=bound",
                "warm_start.batch_size=48",
            ),
            [here, *others],
        )


@pytest.fixture
def _own_transport() -> Iterator[None]:
    """A job has this process speak TCP, which ends with the test."""
    with configured():
        yield


SBATCH = """#!{python}
import pathlib, sys, time
pathlib.Path({folder!r}, "script").write_text(sys.stdin.read())
time.sleep({seconds})
print("Submitted batch job 4242")
"""
SCANCEL = """#!{python}
import pathlib, sys
pathlib.Path({folder!r}, "cancelled").write_text(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[float], Path]:
    """Puts Slurm's commands on the PATH, which take so many seconds to submit; gives the folder they note things in."""

    def put(seconds: float) -> Path:
        for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
            command = tmp_path / name
            command.write_text(
                text.format(python=sys.executable, folder=str(tmp_path), seconds=seconds)
            )
            command.chmod(command.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return tmp_path

    return put


@pytest.mark.usefixtures("_own_transport")
def test_what_is_submitted_to_slurm(slurm: Callable[[float], Path]) -> None:
    folder = slurm(0)
    hosts = _hosts(
        "source=slurm", "number=3", "port=24000", "slurm.partition=gpu", "slurm.account=us",
        "slurm.qos=high", "slurm.gpus_per_node=8", "slurm.cpus_per_task=64", "slurm.memory=500G",
        "slurm.time_limit=2-00:00:00", "slurm.arguments=['--constraint=h100']",
        f"slurm.log_folder={folder}",
    )  # fmt: skip
    job = make_job(hosts, "forgeflow0")
    job.apply()
    lines = (folder / "script").read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert options >= {
        "--nodes=3", "--ntasks-per-node=1", "--partition=gpu", "--account=us", "--qos=high",
        "--gpus-per-node=8", "--cpus-per-task=64", "--mem=500G", "--time=2-00:00:00", "--exclusive",
        "--constraint=h100",
    }  # fmt: skip
    [step] = [line for line in lines if line.startswith("srun")]
    assert step.startswith(f"srun {sys.executable} -c") and ":24000" in step
    job.kill()
    assert (folder / "cancelled").read_text() == "4242"
    assert describe_hosts(hosts) == ["3 nodes of Slurm, at most 2-00:00:00"]


@pytest.mark.usefixtures("_own_transport")
def test_a_run_that_is_cancelled_while_it_submits_leaves_no_job(
    slurm: Callable[[float], Path],
) -> None:
    folder = slurm(1.0)

    async def go() -> None:
        async with open_machines(_hosts("source=slurm", f"slurm.log_folder={folder}"), ()):
            raise AssertionError("there is no such host")

    async def cancel() -> None:
        opening = asyncio.create_task(go())
        await asyncio.wait({opening}, timeout=0.2)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    asyncio.run(cancel())
    assert (folder / "cancelled").read_text() == "4242"


class FakeKubernetes(BaseHTTPRequestHandler):
    """Knows no mesh, and notes what it is asked."""

    asked: list[tuple[str, str, Any]]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append((self.command, self.path, json.loads(body) if body else None))
        self.send_response(404 if self.command == "GET" else 200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def _fake_kubernetes(folder: Path) -> Iterator[tuple[Path, list[tuple[str, str, Any]]]]:
    asked: list[tuple[str, str, Any]] = []
    handler = type("Handler", (FakeKubernetes,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1", "kind": "Config", "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "clusters": [{"name": "test", "cluster": {"server": url}}],
                    "users": [{"name": "test", "user": {}}],
                }
            )
        )  # fmt: skip
        yield kubeconfig, asked
        server.shutdown()


@pytest.mark.usefixtures("_own_transport")
def test_what_is_submitted_to_kubernetes(tmp_path: Path) -> None:
    with _fake_kubernetes(tmp_path) as (kubeconfig, asked):
        hosts = _hosts(
            "source=kubernetes", "number=2", "port=24000", "kubernetes.namespace=us",
            "kubernetes.image=registry.example/forgeflow:1", "kubernetes.gpus_per_pod=8",
            "kubernetes.cores_per_pod=64", "kubernetes.memory=500Gi", "kubernetes.shared_memory=32Gi",
            f"kubernetes.kubeconfig={kubeconfig}",
        )  # fmt: skip
        job = make_job(hosts, "forgeflow0")
        job.apply()
        job.kill()
    meshes = "/apis/monarch.pytorch.org/v1alpha1/namespaces/us/monarchmeshes"
    [posted] = [body for method, path, body in asked if (method, path) == ("POST", meshes)]
    assert posted["kind"] == "MonarchMesh" and posted["metadata"]["name"] == "forgeflow0"
    assert posted["spec"]["replicas"] == 2 and posted["spec"]["port"] == 24000
    [container] = posted["spec"]["podTemplate"]["spec"]["containers"]
    assert container["image"] == "registry.example/forgeflow:1"
    needs = {"cpu": "64", "memory": "500Gi", "nvidia.com/gpu": "8"}
    assert container["resources"] == {"requests": needs, "limits": needs}
    [shared] = posted["spec"]["podTemplate"]["spec"]["volumes"]
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert ("DELETE", f"{meshes}/forgeflow0", None) in [(m, p, b) for m, p, b in asked]
