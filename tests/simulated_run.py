"""The controller of an async run whose processes are simulated: pipeline, admission, ledger, log and commits are real.

ask each replica ──▶ parts ──▶ commit ──▶ choose a batch ──▶ log its step ──▶ new weights
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hashlib
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import psutil
from made_episodes import table

from forge_core.actors.messages import (
    AdvanceReply,
    AdvanceRequest,
    LoadReply,
    PublishReply,
    StoredPart,
)
from forge_core.config import RunConfig
from forge_core.environments.base import Prompt
from forge_core.timeline import Interval
from forge_core.weights.manifest import Manifest
from storage import facts, layout
from storage.ledger import Ledger
from storage.log import RunLog, read_incarnations
from storage.objects import LocalStore
from storage.parts import commit_part
from storage.records import Controller, PartRef
from tasks.pipeline import Part, Pipeline
from tasks.run import ActiveRun

_PROBE = ((-0.5,) * 300,)
_METRICS = {f"loss/figure_{number}": 0.1 * number for number in range(40)}


class ForgetfulStore(LocalStore):
    """Keeps no entry of a log: ten thousand steps have a hundred thousand."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return "/log/" in key or super().put_if_absent(key, data)


class _Environment:
    def train_prompt(self, ordinal: int) -> Prompt:
        return Prompt(
            prompt_id=f"p{ordinal}", text="1+1=", answer="2", target="2", index=ordinal,
            environment="sums", metadata={},
        )  # fmt: skip


@dataclasses.dataclass
class _Mesh:
    name: str
    openings: int = 1
    is_dead: bool = False

    def has_failed(self) -> bool:
        return self.is_dead

    def produce(self, number: int) -> None:
        """What metrics of a replica count."""


class SimulatedRun:
    """One run, step by step."""

    def __init__(self, folder: Path, *, steps: int, replicas: int = 2, groups: int = 4) -> None:
        config = RunConfig.model_validate({
            "regime": "async", "steps": steps, "groups_per_step": groups, "group_size": 2,
            "generators": {"replicas": replicas}, "trainer": {"ranks": 1},
        })  # fmt: skip
        store = ForgetfulStore(folder)
        log = RunLog.claim(store, "run", Controller.this_process(versions={}, git_commit=None))
        meshes = tuple(_Mesh(f"generator-{index}") for index in range(replicas))
        self.meshes = meshes
        self.run = ActiveRun(
            run_id="run",
            config=config,
            store_uri=store.uri,
            store=store,
            folder=store.root,
            log=log,
            ledger=Ledger.fold([], read_incarnations(store, "run")),
            meshes=cast(Any, type("Meshes", (), {"generators": meshes})),
            environment=cast(Any, _Environment()),
        )
        self.run.append(
            facts.Published(
                policy_version=0, weights_digest="d0", parity=None, bytes=1, seconds=0.1
            )
        )
        self.line = Pipeline.of(self.run)
        self._root = folder
        self._under_way: dict[int, list[int]] = {index: [] for index in range(replicas)}
        self._kept: deque[Iterable[str]] = deque()
        self._seconds = 0.0

    async def step(self, step: int) -> None:
        """Everything that the stages do for a step."""
        line, run = self.line, self.run
        while step not in line.batches:
            for replica in range(len(self.meshes)):
                if line.has_work(replica):
                    await line.answered(replica, self._advance(replica, line.request(replica)))
            while line.parts:
                await self._score(line.parts[0])
            if line.can_choose(step):
                line.choose(step)
        groups = line.batches[step].group_ids
        run.append(
            run.intervals("trainer", self._interval("train")),
            facts.Step(
                step=step, group_ids=groups, score_set="run", weights_digest=f"d{step}",
                policy_version=step, optimizer_updates=1, age_max=1, age_mean=0.5,
                metrics=_METRICS, checkpoint=None,
            ),
        )  # fmt: skip
        manifest = Manifest(policy_version=step, slots=(), bucket_bytes=(64,), digest=f"d{step}")
        run.put = PublishReply(
            manifest=manifest, probe_logprobs=_PROBE, probe_entropy=0.6, seconds=0.5, intervals=()
        )
        self._forget_files()

    async def lose(self, replica: int) -> None:
        """A replica dies and is started again."""
        mesh = self.meshes[replica]
        mesh.is_dead = True
        await self.line.lose(replica)
        mesh.is_dead, mesh.openings = False, mesh.openings + 1
        self._under_way[replica] = []
        if self.run.put is not None:
            self.run.loads[replica] = self._load(self.run.put.manifest)
        await self.line.take_back(replica)

    def _advance(self, replica: int, request: AdvanceRequest) -> AdvanceReply:
        """The replica finishes what it had, and begins what it is asked."""
        done = self._under_way[replica]
        self._under_way[replica] = [drawn.draw for drawn in request.prompts]
        loaded = None if request.manifest is None else self._load(request.manifest)
        return AdvanceReply(
            seq=request.seq, stored=self._store(done) if done else None, too_long=(),
            loaded=loaded, num_under_way=len(request.prompts), seconds=0.5,
            intervals=self._interval("generate"),
        )  # fmt: skip

    def _store(self, draws: list[int]) -> StoredPart:
        name = f"part-{draws[0]}"
        groups = tuple(layout.group_id("run", draw) for draw in draws)
        return StoredPart(
            part=PartRef(key=name, sha256="s" * 64, bytes=1000, rows=2 * len(draws)),
            group_ids=groups, policy_version_min=0, policy_version_max=0,
            prompt_tokens=4 * len(draws), response_tokens=6 * len(draws), seconds=0.5,
        )  # fmt: skip

    async def _score(self, part: Part) -> None:
        run, name = self.run, layout.part_name(part.round, part.replica)
        draws = [self.line._ordinal(group) for group in part.stored.group_ids]
        commit = commit_part(run.store, "run", name, table(draws, (0,)))
        key = layout.commit_key("run", name)
        run.append(
            run.intervals("verifier", self._interval("score")),
            facts.Committed(
                round=part.round, commit=key, group_ids=commit.group_ids, episodes=commit.rows,
                score_set="run", sha256=hashlib.sha256(run.store.read(key)).hexdigest(),
            ),
        )  # fmt: skip
        self._kept.append((key, commit.part.key))
        await self.line.scored(part)

    def _load(self, manifest: Manifest) -> LoadReply:
        return LoadReply(
            policy_version=manifest.policy_version, digest=manifest.digest,
            probe_logprobs=_PROBE, seconds=0.25,
        )  # fmt: skip

    def _interval(self, kind: Any) -> tuple[Interval, ...]:
        self._seconds += 1.0
        return (Interval(kind=kind, start=self._seconds, end=self._seconds + 0.5),)

    def _forget_files(self) -> None:
        while len(self._kept) > 64:
            for key in self._kept.popleft():
                (self._root / key).unlink()


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What some steps cost the controller."""

    last_step: int
    """The last of them."""
    cpu_seconds: float
    """Processor time of each, on average."""
    blocks: int
    """Blocks of memory that Python held after them."""
    rss_bytes: int
    """Memory of the process after them."""


def cost_of_steps(run: SimulatedRun, *, steps: int, chunk: int) -> list[Cost]:
    """All steps of a run, so many at a time; at every hundredth a replica dies."""

    async def simulate(numbers: range) -> None:
        for step in numbers:
            await run.step(step)
            if step % 100 == 50:
                await run.lose(step // 100 % len(run.meshes))

    costs = []
    for first in range(1, steps + 1, chunk):
        started = time.process_time()
        asyncio.run(simulate(range(first, first + chunk)))
        seconds = time.process_time() - started
        gc.collect()
        costs.append(
            Cost(
                last_step=first + chunk - 1,
                cpu_seconds=seconds / chunk,
                blocks=sys.getallocatedblocks(),
                rss_bytes=psutil.Process().memory_info().rss,
            )
        )
    return costs
