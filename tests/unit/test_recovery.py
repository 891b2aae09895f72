"""What is done about a mesh that fails, with meshes that are not there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

import tasks.revival
from forge_core.actors.messages import (
    GenerateReply,
    GenerateRequest,
    LoadReply,
    PublishReply,
    StoredPart,
)
from forge_core.config import RunConfig
from forge_core.mesh import Mesh, MeshCall
from forge_core.meshes import Meshes
from forge_core.weights.manifest import Manifest
from storage import facts
from storage.ledger import Ledger
from storage.log import RunLog, read_entries, read_incarnations
from storage.objects import LocalStore
from storage.records import Controller, PartRef
from tasks.calls import Overtaken, commit_scored, on_replicas
from tasks.collect import generated
from tasks.learn import level
from tasks.recovery import CrashLoop, FailedFast, guarded
from tasks.run import ActiveRun

SECONDS = 20.0
PROBE = ((-0.5,) * 300,)


class FakeMesh:
    """A mesh whose processes fail when a test says so."""

    def __init__(self, name: str, unit: str, answers: bool = True) -> None:
        self.name, self.unit, self.answers = name, unit, answers
        self.failure: str | None = None
        self.failed_at, self.started_at = 0.0, 0.0
        self.openings = 1
        self.asked: list[Any] = []
        self.dies_in_call = 0
        self.load = 0.0
        self._failed, self._opened = asyncio.Event(), asyncio.Event()
        self.loaded = asyncio.Event()

    def has_failed(self) -> bool:
        return self.failure is not None

    def die(self, reason: str = "killed") -> None:
        self.failure, self.failed_at = reason, 1.0
        self._failed.set()

    async def watch(self, options: Any) -> int:
        opening = self.openings
        await self._failed.wait()
        return opening

    async def until_opened(self, after: int) -> None:
        while self.openings <= after:
            await self._opened.wait()

    async def reopen(self) -> None:
        self.openings += 1
        self._failed, opened, self._opened = asyncio.Event(), self._opened, asyncio.Event()
        opened.set()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        yield

    def serve(self) -> None:
        self.failure = None

    async def call(
        self, endpoint: str, *arguments: Any, timeout_seconds: float, load: float = 0.0
    ) -> list[Any]:
        if self.has_failed():
            raise MeshCall(f"{self.name} has failed")
        self.asked.append(arguments[0])
        await asyncio.sleep(0)
        if endpoint == "load_version":
            return [_loaded(arguments[0].policy_version)]
        if self.dies_in_call:
            self.dies_in_call -= 1
            self.die()
            raise MeshCall(f"{self.name} died")
        return [GenerateReply(stored=None, too_long=(self.name,), intervals=())]


def run_of(
    folder: Path, *generators: FakeMesh, verifier: FakeMesh | None = None, **chosen: Any
) -> ActiveRun:
    store = LocalStore(folder)
    log = RunLog.claim(store, "r", Controller.this_process(versions={}, git_commit=None))
    given = {"restart_delay_seconds": 0.0, **chosen}
    return ActiveRun(
        run_id="r",
        config=RunConfig.model_validate({"faults": given}),
        store_uri=store.uri,
        store=store,
        folder=store.root,
        log=log,
        ledger=Ledger.fold([], read_incarnations(store, "r")),
        meshes=Meshes(
            generators=cast(tuple[Mesh, ...], generators),
            opened_trainer=None,
            opened_verifier=cast(Mesh, verifier),
        ),
        environment=cast(Any, None),
    )


def _loaded(version: int) -> LoadReply:
    return LoadReply(policy_version=version, digest="d", probe_logprobs=PROBE, seconds=0.1)


def _put(version: int) -> PublishReply:
    manifest = Manifest(policy_version=version, slots=(), bucket_bytes=(64,), digest="d")
    return PublishReply(
        manifest=manifest, probe_logprobs=PROBE, probe_entropy=0.6, seconds=0.1, intervals=()
    )


def failures(run: ActiveRun) -> list[facts.Failed]:
    entries = read_entries(run.store, "r")
    return [f for entry in entries for f in entry.facts if isinstance(f, facts.Failed)]


Prepare = Callable[[ActiveRun, Any], Any]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the meshes that were prepared."""
    names: list[str] = []

    async def prepare(run: ActiveRun, mesh: Mesh) -> None:
        names.append(mesh.name)

    monkeypatch.setattr(tasks.revival, "prepare", prepare)
    return names


def test_a_mesh_that_dies_is_started_again_and_that_is_logged(
    tmp_path: Path, prepared: list[str]
) -> None:
    async def body() -> ActiveRun:
        mesh = FakeMesh("generator-0", "generators")
        run = run_of(tmp_path, mesh)
        async with asyncio.timeout(SECONDS), guarded(run):
            mesh.die("killed")
            assert run.recovery is not None
            await run.recovery.revive(cast(Mesh, mesh))
        assert mesh.openings == 2
        return run

    run = asyncio.run(body())
    assert prepared == ["generator-0"]
    [told] = failures(run)
    assert (told.mesh, told.cause, told.failures) == ("generator-0", "killed", 1)
    assert told.started_at is not None and told.seconds > 0


def test_callers_at_once_wait_for_one_restart(tmp_path: Path, prepared: list[str]) -> None:
    async def body() -> None:
        mesh = FakeMesh("generator-0", "generators")
        run = run_of(tmp_path, mesh)
        async with asyncio.timeout(SECONDS), guarded(run):
            mesh.die()
            assert run.recovery is not None
            await asyncio.gather(*(run.recovery.revive(cast(Mesh, mesh)) for _ in range(5)))
        assert mesh.openings == 2

    asyncio.run(body())
    assert prepared == ["generator-0"]


def test_fail_fast_ends_what_runs(tmp_path: Path, prepared: list[str]) -> None:
    async def body() -> None:
        mesh = FakeMesh("generator-0", "generators")
        run = run_of(tmp_path, mesh, generators="fail_fast")
        async with asyncio.timeout(SECONDS), guarded(run):
            mesh.die("killed by a test")
            await asyncio.sleep(SECONDS)

    with pytest.raises(FailedFast, match=r"killed by a test; faults\.generators is fail_fast"):
        asyncio.run(body())
    assert prepared == []


def test_a_crash_loop_ends_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0

    async def prepare(run: ActiveRun, mesh: Mesh) -> None:
        nonlocal attempts
        attempts += 1
        raise MeshCall(f"out of memory, for the {attempts}. time")

    monkeypatch.setattr(tasks.revival, "prepare", prepare)

    async def body() -> None:
        mesh = FakeMesh("generator-0", "generators")
        run = run_of(tmp_path, mesh, most_restarts=3)
        async with asyncio.timeout(SECONDS), guarded(run):
            mesh.die()
            await asyncio.sleep(SECONDS)

    with pytest.raises(CrashLoop, match=r"after 3 restarts in a row .* for the 3\. time"):
        asyncio.run(body())
    assert attempts == 3


def test_a_mesh_that_is_not_back_at_the_end_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def prepare(run: ActiveRun, mesh: Mesh) -> None:
        await asyncio.sleep(SECONDS)

    monkeypatch.setattr(tasks.revival, "prepare", prepare)

    async def body() -> ActiveRun:
        mesh = FakeMesh("generator-0", "generators")
        run = run_of(tmp_path, mesh)
        async with asyncio.timeout(SECONDS), guarded(run):
            mesh.die()
            await asyncio.sleep(0.05)
        return run

    [told] = failures(asyncio.run(body()))
    assert told.started_at is None


def _request(replica: int) -> GenerateRequest:
    return GenerateRequest(
        run_id="r", key_prefix=f"p{replica}", prompts=(), num_samples=1, policy_version=0
    )


def _asks_two(folder: Path, policy: str) -> tuple[list[str], FakeMesh, FakeMesh]:
    """Who did the requests of two replicas, of which the second dies in its own."""

    async def body() -> tuple[list[str], FakeMesh, FakeMesh]:
        first, second = (FakeMesh(f"generator-{i}", "generators") for i in range(2))
        second.dies_in_call = 1
        run = run_of(folder, first, second, generators=policy)
        async with asyncio.timeout(SECONDS), guarded(run):
            replies = await on_replicas(
                run, "generate", {0: _request(0), 1: _request(1)}, timeout_seconds=SECONDS
            )
        return [reply.too_long[0] for reply in replies], first, second

    return asyncio.run(body())


def test_another_replica_does_the_request_of_one_that_died(
    tmp_path: Path, prepared: list[str]
) -> None:
    who, first, _ = _asks_two(tmp_path, "route_around")
    assert who == ["generator-0", "generator-0"]
    assert [(request.key_prefix, request.attempt) for request in first.asked] == [
        ("p0", 1),
        ("p1", 2),
    ]


def test_a_replica_that_may_not_be_replaced_is_waited_for(
    tmp_path: Path, prepared: list[str]
) -> None:
    who, _, second = _asks_two(tmp_path, "restart")
    assert who == ["generator-0", "generator-1"]
    assert [(request.key_prefix, request.attempt) for request in second.asked] == [
        ("p1", 1),
        ("p1", 2),
    ]
    assert prepared == ["generator-1"]


def test_a_request_goes_to_no_replica_that_serves_newer_weights(
    tmp_path: Path, prepared: list[str]
) -> None:
    async def body() -> None:
        first, second = (FakeMesh(f"generator-{i}", "generators") for i in range(2))
        run = run_of(tmp_path, first, second)
        run.append(
            facts.Published(policy_version=0, weights_digest="d", parity=None, bytes=1, seconds=0.1)
        )
        run.loads = {0: _loaded(0), 1: _loaded(2)}
        run.put = _put(2)
        requests = {0: _request(0), 1: _request(1)}
        async with asyncio.timeout(SECONDS), guarded(run):
            first.dies_in_call = 1
            with pytest.raises(Overtaken, match=r"generator-1 .* version 2 instead of 0"):
                await on_replicas(run, "generate", requests, timeout_seconds=SECONDS)
            # Its own successor did it, for here that serves the weights that it is for.
            assert [each.attempt for each in first.asked] == [1, 2]
            assert second.asked == []
            await level(run)
        assert run.ledger.served_version == 2
        assert {each.policy_version for each in run.loads.values()} == {2}

    asyncio.run(body())


def test_what_kills_the_verifier_again_and_again_is_dropped_as_failed(
    tmp_path: Path, prepared: list[str]
) -> None:
    part = PartRef(key="part", sha256="s", bytes=1, rows=2)
    stored = StoredPart(
        part=part, group_ids=("g0", "g1"), policy_version_min=0, policy_version_max=0,
        prompt_tokens=4, response_tokens=6, seconds=0.5,
    )  # fmt: skip

    async def body() -> ActiveRun:
        verifier = FakeMesh("verifier", "verifier")
        run = run_of(tmp_path, verifier=verifier)
        draws = tuple(
            facts.Draw(draw=i, group_id=f"g{i}", prompt_id=f"p{i}", environment="e", index=i)
            for i in range(2)
        )
        run.append(facts.Admitted(round=1, draws=draws), generated(1, 0, stored))
        verifier.dies_in_call = 3
        async with asyncio.timeout(SECONDS), guarded(run):
            assert run.recovery is not None
            for _ in range(2):
                with pytest.raises(MeshCall):
                    await commit_scored(run, 1, 0, part)
                await run.recovery.revive(cast(Mesh, verifier))
            await commit_scored(run, 1, 0, part)
            await run.recovery.revive(cast(Mesh, verifier))
            await commit_scored(run, 1, 0, part)
        assert len(verifier.asked) == 3, "what is dropped is not scored once more"
        return run

    run = asyncio.run(body())
    assert {group.reason for group in run.ledger.groups.values()} == {"failed"}
    assert not run.ledger.problems
