"""Runs that are written into a store as a controller would, without any engine: for tests of what reads them."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage import facts, layout
from storage.episodes import SCHEMA, Figures
from storage.log import RunLog
from storage.objects import LocalStore, ObjectStore
from storage.parts import commit_part, write_part
from storage.records import Commit, Controller, FileRef
from storage.runs import store_config

GROUP_SIZE = 2
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
        {
            "episode_id": layout.episode_id(layout.group_id(run_id, draw), sample),
            "run_id": run_id,
            "group_id": layout.group_id(run_id, draw),
            "draw": draw,
            "sample": sample,
            "environment": environment,
            "prompt_id": f"p{draw}",
            "prompt": f"{draw}+1=",
            "answer": str(draw + 1) if draw % 3 else None,
            "metadata": "{}",
            "response": "2" * (draw % 4),
            "prompt_token_ids": [5] * (draw % 3),
            "response_token_ids": [draw, sample, 9],
            "logprobs": [-0.5, -1.0 - sample, -0.0],
            "mask": [True, True, False],
            "token_policy_versions": [version + 1, version, -1],
            "turns": [{"role": "assistant", "start": 0, "end": 3}],
            "finish_reason": "stop",
            "reward": reward(draw, sample),
            "scores": [{"name": "exact", "value": float(sample)}] * (draw % 2),
            "seed": 17,
            "attempts": 1,
            "generate_seconds": 0.5,
            "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        }
        for draw in draws
        for sample in range(GROUP_SIZE)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


class MadeRun:
    """A run that is claimed by a process that is gone."""

    def __init__(self, store: ObjectStore, run_id: str = "run", **config: Any) -> None:
        self.store = store
        self.run_id = run_id
        store_config(store, run_id, {"regime": "sync", "steps": 2, **config})
        me = Controller.this_process(versions={}, git_commit=None)
        self.log = RunLog.claim(store, run_id, me.model_copy(update={"pid": GONE_PID}))
        self.log.append(facts.Started(run_id=run_id, meshes=("trainer",)))
        self.num_commits = 0

    def copied_to(self, root: Path) -> MadeRun:
        """The same run in a copy of its store, which goes on on its own."""
        assert isinstance(self.store, LocalStore)
        shutil.copytree(self.store.root, root)
        copied, log = copy.copy(self), copy.copy(self.log)
        copied.store = log._store = LocalStore(root)
        copied.log = log
        return copied

    def commit(self, draws: Sequence[int], **what: Any) -> Commit:
        """Commit two episodes for each draw, and log it."""
        commit, generated = self.unlogged_commit(draws, **what)
        self.log.append(
            facts.Admitted(
                round=generated.round,
                draws=tuple(
                    facts.Draw(
                        draw=draw,
                        group_id=layout.group_id(self.run_id, draw),
                        prompt_id=f"p{draw}",
                        environment="sums",
                        index=draw,
                    )
                    for draw in draws
                ),
            ),
            generated,
            facts.Committed(
                round=generated.round,
                commit=layout.commit_key(self.run_id, commit.key),
                group_ids=commit.group_ids,
                episodes=commit.rows,
                score_set="run",
            ),
        )
        return commit

    def unlogged_commit(self, draws: Sequence[int], **what: Any) -> tuple[Commit, facts.Generated]:
        """Commit them, as a controller that dies before it logs it."""
        number, table = self.num_commits, table_of(self.run_id, draws, **what)
        self.num_commits += 1
        name, figures = layout.part_name(number, 0), Figures.of(table)
        generated = facts.Generated(
            round=number,
            replica=0,
            part=write_part(self.store, layout.generated_prefix(self.run_id, name), table),
            group_ids=figures.group_ids,
            policy_version_min=figures.policy_version_min,
            policy_version_max=figures.policy_version_max,
            prompt_tokens=figures.prompt_tokens,
            response_tokens=figures.response_tokens,
        )
        return commit_part(self.store, self.run_id, name, table), generated

    def step(self, step: int, draws: Sequence[int], **metrics: float) -> None:
        """Log a step that trained on these draws."""
        self.log.append(
            facts.Step(
                step=step,
                group_ids=tuple(layout.group_id(self.run_id, draw) for draw in draws),
                score_set="run",
                weights_digest=f"w{step}",
                policy_version=step,
                optimizer_updates=1,
                age_max=1,
                age_mean=0.5,
                metrics=metrics,
                checkpoint=None,
            )
        )

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
