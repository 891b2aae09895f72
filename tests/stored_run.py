"""Runs of which only what is stored counts, written without any engine: for tests of what reads and keeps them."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from made_episodes import GROUP_SIZE, committed, draw_of, episode, generated, stepped

from storage import facts, layout
from storage.episodes import SCHEMA
from storage.log import RunLog
from storage.objects import LocalStore, ObjectStore
from storage.parts import commit_part, write_part
from storage.records import Commit, Controller, FileRef
from storage.runs import store_config

GONE_PID = 2**22 - 1
"""A process id that no process has."""


def table_of(
    run_id: str,
    draws: Sequence[int],
    *,
    version: int = 0,
    environment: str = "sums",
    reward: Callable[[int, int], float] = lambda draw, sample: draw + sample / 10,
) -> pa.Table:
    """Two episodes for each draw, with tokens of a version and the one after it."""
    rows = [
        episode(
            draw,
            sample,
            run_id,
            environment=environment,
            prompt=f"{draw}+1=",
            answer=str(draw + 1) if draw % 3 else None,
            response="2" * (draw % 4),
            prompt_token_ids=[5] * (draw % 3),
            response_token_ids=[draw, sample, 9],
            logprobs=[-0.5, -1.0 - sample, -0.0],
            mask=[True, True, False],
            token_policy_versions=[version + 1, version, -1],
            turns=[{"role": "assistant", "start": 0, "end": 3}],
            reward=reward(draw, sample),
            scores=[{"name": "exact", "value": float(sample)}] * (draw % 2),
        )
        for draw in draws
        for sample in range(GROUP_SIZE)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


class StoredRun:
    """A run that is claimed by a process that is gone."""

    def __init__(self, store: ObjectStore, run_id: str = "run", **config: Any) -> None:
        self.store = store
        self.run_id = run_id
        store_config(store, run_id, {"regime": "sync", "steps": 2, **config})
        me = Controller.this_process(versions={}, git_commit=None)
        self.log = RunLog.claim(store, run_id, me.model_copy(update={"pid": GONE_PID}))
        self.log.append(facts.Started(run_id=run_id, meshes=("trainer",)))
        self.num_commits = 0

    def copied_to(self, root: Path) -> StoredRun:
        """The same run in a copy of its store, which goes on on its own."""
        assert isinstance(self.store, LocalStore)
        shutil.copytree(self.store.root, root)
        copied, log = copy.copy(self), copy.copy(self.log)
        copied.store = log._store = LocalStore(root)
        copied.log = log
        return copied

    def commit(self, draws: Sequence[int], **what: Any) -> Commit:
        """Commit two episodes for each draw, and log it."""
        commit, part = self.unlogged_commit(draws, **what)
        self.admit(part.round, draws)
        self.log.append(part, committed(part.round, commit))
        return commit

    def admit(
        self,
        number: int,
        draws: Sequence[int],
        environment: str = "sums",
        fills: int | None = None,
    ) -> None:
        """Let draws in, to fill up a step where they are spare."""
        told = tuple(draw_of(self.run_id, draw, environment) for draw in draws)
        self.log.append(facts.Admitted(round=number, draws=told, step=fills))

    def groups(self, draws: Sequence[int]) -> tuple[str, ...]:
        """Ids of the draws' groups."""
        return tuple(layout.group_id(self.run_id, draw) for draw in draws)

    def unlogged_commit(self, draws: Sequence[int], **what: Any) -> tuple[Commit, facts.Generated]:
        """Commit them, as a controller that dies before it logs it."""
        number, table = self.num_commits, table_of(self.run_id, draws, **what)
        self.num_commits += 1
        name = layout.part_name(number, 0)
        part = write_part(self.store, layout.generated_prefix(self.run_id, name), table)
        return commit_part(self.store, self.run_id, name, table), generated(number, part, table)

    def train(self, step: int, draws: Sequence[int], **metrics: float) -> None:
        """Log a step that trained on these draws."""
        self.log.append(stepped(step, self.groups(draws), f"w{step}", age=1, **metrics))

    def checkpoint(self, step: int) -> FileRef:
        """Write and log a checkpoint of one file."""
        key = layout.checkpoint_folder(self.run_id, step)
        data = f"weights {step}".encode()
        sha256 = hashlib.sha256(data).hexdigest()
        file = FileRef(key=f"{key}model", sha256=sha256, bytes=len(data))
        self.store.put_if_absent(file.key, data)
        self.log.append(
            facts.Checkpoint(step=step, key=key, weights_digest=f"w{step}", files=(file,))
        )
        return file

    def end(self, status: facts.Status = "finished") -> None:
        """Log the end."""
        self.log.append(facts.End(status=status, reason=None))
