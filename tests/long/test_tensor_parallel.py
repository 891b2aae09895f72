"""An engine on two processes: it serves in a real run and says what one process says, and is lost as a whole."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from harness import Finished, Start, assert_verified

from forge_core.actors.messages import AdvanceRequest, DrawnPrompt, LoadReply, PublishReply
from forge_core.environments.base import Prompt
from forge_core.mesh import Mesh, MeshCall
from forge_core.meshes import open_meshes
from forge_core.placement.roles import roles_of
from forge_core.processes import MESH_VARIABLE
from forge_core.services.health import HealthOptions
from forge_core.settings import load_config
from storage.objects import LocalStore
from storage.parts import read_part

CALL_SECONDS = 120.0


@pytest.fixture(scope="session")
def started(start_run: Start) -> Callable[[], Finished]:
    """One step of the tiny preset, whose round is sampled from the same weights as the first of `tiny_run`."""
    return start_run(
        "tensor-parallel", "--preset", "tiny", "--set", "steps=1",
        "--set", "generators.tensor_parallel=2", "--set", "generators.threads=1",
        "--set", "evaluation.num_prompts=20",
    )  # fmt: skip


@pytest.fixture(scope="session")
def run(started: Callable[[], Finished]) -> Finished:
    finished = started()
    assert finished.code == 0, finished.errors
    return finished


def _round(run: Finished) -> dict[tuple[int, int], dict[str, Any]]:
    """Episodes of the first 64 draws, by draw and sample."""
    rows = {}
    for path in sorted((run.store / "episodes" / "commits" / run.run_id).iterdir()):
        part = json.loads(path.read_bytes())["part"]["key"]
        columns = ["draw", "sample", "seed", "response_token_ids", "logprobs"]
        for row in pq.read_table(run.store / part, columns=columns).to_pylist():
            if row["draw"] < 64:
                rows[row["draw"], row["sample"]] = row
    return rows


def test_two_processes_sample_what_one_samples(run: Finished, tiny_run: Finished) -> None:
    """Up to float noise: the sums of the two are added in another order than within one."""
    ours, theirs = _round(run), _round(tiny_run)
    assert ours.keys() == theirs.keys() and len(ours) == 512
    same = [
        key for key in ours if ours[key]["response_token_ids"] == theirs[key]["response_token_ids"]
    ]
    assert len(same) >= 0.99 * len(ours)
    for key in same:
        assert ours[key]["seed"] == theirs[key]["seed"]
        assert np.allclose(ours[key]["logprobs"], theirs[key]["logprobs"], atol=1e-4)


def test_what_two_processes_say_is_what_the_trainer_says(run: Finished) -> None:
    assert_verified(run.run_id, run.store)
    for fact in run.facts("published"):
        assert fact["parity"]["mean"] <= 1e-3 and fact["parity"]["max"] <= 1e-2
    (step,) = run.facts("step")
    assert step["metrics"]["sampling/sampling_logp_difference/max"] <= 1e-2
    assert run.summary["retries"] == 0


@dataclass
class Seen:
    """What an engine on two processes did, and what became of it when one of them was killed."""

    put: PublishReply
    loaded: LoadReply
    rows: list[dict[str, Any]]
    """Of the episodes that it sampled after it was asked for a version that is not there."""
    addresses: set[str]
    """That its processes listen on."""
    shared: list[str]
    """Names in shared memory that are the engine's, while it lives."""
    seconds_until_failed: float
    """From the kill of a process to the failure of the call under way."""
    left: list[int]
    """Its processes that are left once the meshes are closed."""


async def _watch(folder: Path) -> Seen:
    overrides = [
        "generators.tensor_parallel=2", "generators.threads=1", "trainer.ranks=1",
        "warm_start.steps=3", "sampling.max_tokens=512",
    ]  # fmt: skip
    config = load_config(preset="tiny", file=None, overrides=overrides)
    store = LocalStore(folder / "store")
    async with open_meshes(config, store.uri, folder, time.time(), roles_of(config)) as meshes:
        trainer, generator, model = meshes.trainer, meshes.generators[0], str(folder / "model")

        async def call(mesh: Mesh, name: str, *arguments: Any) -> Any:
            return (await mesh.call(name, *arguments, timeout_seconds=CALL_SECONDS))[0]

        await call(trainer, "build_model", model)
        await asyncio.gather(call(trainer, "load", model), call(generator, "load", model))
        await call(trainer, "warm_start")
        probe = await call(trainer, "encode_probe", 256)
        put = await call(trainer, "publish", probe, meshes.store_name)
        loaded = await call(generator, "load_version", put.manifest, probe)
        with pytest.raises(KeyError):
            missing = dataclasses.replace(put.manifest, policy_version=1)
            await call(generator, "load_version", missing, probe)
        reply = await call(generator, "advance", _advance(0, 4))
        pids = [p.pid for p in psutil.Process().children() if _mesh(p) == "generator-0"]
        addresses = {c.laddr.ip for pid in pids for c in psutil.Process(pid).net_connections()
                     if c.status == psutil.CONN_LISTEN}  # fmt: skip
        shared = [name for name in os.listdir("/dev/shm") if "generator-0" in name]
        under_way = asyncio.ensure_future(call(generator, "advance", _advance(1, 64)))
        await asyncio.sleep(0.3)
        assert not under_way.done()
        # As a run does.
        watching = asyncio.ensure_future(generator.watch(HealthOptions()))
        os.kill(pids[1], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(MeshCall):
            await under_way
        seconds = time.monotonic() - killed
        await watching
    return Seen(
        put=put,
        loaded=loaded,
        rows=read_part(store, reply.stored.part).to_pylist(),
        addresses=addresses,
        shared=shared,
        seconds_until_failed=seconds,
        left=[pid for pid in pids if _lives(pid)],
    )


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _mesh(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MESH_VARIABLE)
    except psutil.NoSuchProcess:  # or a zombie: what other tests started has ended
        return None


def _advance(seq: int, num_prompts: int) -> AdvanceRequest:
    prompts = tuple(
        DrawnPrompt(
            draw=draw,
            group_id=f"tp-{seq}-{draw:08d}",
            prompt=Prompt(
                prompt_id=str(draw), text=f"{draw}2a=", answer="", target="", index=draw,
                environment="test", metadata={},
            ),
        )
        for draw in range(num_prompts)
    )  # fmt: skip
    return AdvanceRequest(
        run_id="tp", seq=seq, key_prefix=f"generated/{seq}", prompts=prompts, num_samples=8,
        manifest=None, probe=(), part_groups=num_prompts, budget_seconds=60.0, hold_seconds=60.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return asyncio.run(_watch(tmp_path_factory.mktemp("tensor-parallel")))


def test_both_take_the_weights_or_neither(seen: Seen) -> None:
    ours = np.concatenate([np.asarray(row) for row in seen.put.probe_logprobs])
    theirs = np.concatenate([np.asarray(row) for row in seen.loaded.probe_logprobs])
    assert np.abs(ours - theirs).max() <= 1e-2
    assert len(seen.rows) == 4 * 8
    assert {v for row in seen.rows for v in row["token_policy_versions"]} == {0}


def test_nobody_else_can_reach_them(seen: Seen) -> None:
    assert seen.addresses <= {"127.0.0.1", "::1"}
    assert seen.shared == []


def test_a_replica_that_loses_a_process_is_lost_at_once(seen: Seen) -> None:
    assert seen.seconds_until_failed < 5
    assert seen.left == []
