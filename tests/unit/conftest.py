"""What several unit tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from forge_core.config import RunConfig
from storage import facts, layout
from storage.episodes import SCHEMA
from storage.log import RunLog
from storage.objects import LocalStore
from storage.parts import commit_part
from storage.records import Controller, FileRef
from storage.runs import store_config

MakeRun = Callable[..., "PastRun"]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch, where a test module has brought it, computes on one thread.

    Two spin for each other: on tensors this small, with other processes on the machine, they are ten times as slow.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class PastRun:
    """A run with stored episodes, written as a controller would, two samples to a group.

    The reward of sample 1 is 1 and that of sample 0 is 0, but in flat groups, where both are 0.
    """

    def __init__(self, store: LocalStore, run_id: str, **config: Any) -> None:
        self.store, self.run_id = store, run_id
        self.config = RunConfig.model_validate({"group_size": 2, "groups_per_step": 4, **config})
        store_config(store, run_id, self.config.model_dump(mode="json"))
        self.log = RunLog.claim(
            store, run_id, Controller.this_process(versions={}, git_commit=None)
        )
        self.log.append(facts.Started(run_id=run_id, meshes=()))
        self.checkpoint(0)

    def checkpoint(self, step: int) -> None:
        key = layout.checkpoint_folder(self.run_id, step)
        file = FileRef(key=f"{key}model.safetensors", sha256="0" * 64, bytes=0)
        self.log.append(
            facts.Checkpoint(step=step, key=key, weights_digest=f"w{step}", files=(file,))
        )

    def step(self, number: int, draws: Sequence[int], **how: Any) -> None:
        """A round, its batch and its step; the round's flat groups are dropped."""
        flat = how.get("flat", ())
        self.commit(number, draws, **how)
        self.batch(number, [d for d in draws if d not in flat], how.get("advantages"))
        if flat:
            self.drop(flat, "no_signal", number)
        self.train(number, [d for d in draws if d not in flat])

    def commit(
        self,
        number: int,
        draws: Sequence[int],
        *,
        flat: Sequence[int] = (),
        version: int | dict[int, int] | None = None,
        environment: str = "sums",
        advantages: Any = None,
    ) -> None:
        """Draws are admitted and their episodes committed, as one part."""
        versions = version if isinstance(version, dict) else {}
        of_all = version if isinstance(version, int) else number - 1
        rows = [
            self._row(draw, sample, versions.get(draw, of_all), environment, draw in flat)
            for draw in draws
            for sample in (0, 1)
        ]
        commit = commit_part(
            self.store, self.run_id, f"{number:06d}-000", pa.Table.from_pylist(rows, SCHEMA)
        )
        self.log.append(
            facts.Admitted(round=number, draws=tuple(self._draw(d, environment) for d in draws)),
            facts.Committed(
                round=number,
                commit=layout.commit_key(self.run_id, commit.key),
                group_ids=commit.group_ids,
                episodes=commit.rows,
                score_set="run",
            ),
        )

    def batch(self, step: int, draws: Sequence[int], advantages: Any = None) -> None:
        self.log.append(
            facts.Batched(step=step, group_ids=self.groups(draws), advantages=advantages)
        )

    def drop(self, draws: Sequence[int], reason: str, step: int | None) -> None:
        self.log.append(facts.Dropped(group_ids=self.groups(draws), reason=reason, step=step))

    def train(self, step: int, draws: Sequence[int]) -> None:
        self.log.append(
            facts.Step(
                step=step,
                group_ids=self.groups(draws),
                score_set="run",
                weights_digest=f"w{step}",
                policy_version=step,
                optimizer_updates=1,
                age_max=0,
                age_mean=0.0,
                metrics={},
                checkpoint=None,
            )
        )

    def groups(self, draws: Sequence[int]) -> tuple[str, ...]:
        return tuple(layout.group_id(self.run_id, draw) for draw in draws)

    def _draw(self, draw: int, environment: str) -> facts.Draw:
        return facts.Draw(
            draw=draw,
            group_id=layout.group_id(self.run_id, draw),
            prompt_id=f"p{draw}",
            environment=environment,
            index=draw,
        )

    def _row(
        self, draw: int, sample: int, version: int, environment: str, flat: bool
    ) -> dict[str, Any]:
        group_id = layout.group_id(self.run_id, draw)
        return {
            "episode_id": layout.episode_id(group_id, sample),
            "run_id": self.run_id,
            "group_id": group_id,
            "draw": draw,
            "sample": sample,
            "environment": environment,
            "prompt_id": f"p{draw}",
            "prompt": f"{draw}+1=",
            "answer": f"{draw + 1}",
            "metadata": f'{{"index": {draw}}}',
            "response": "1" * (sample + 1),
            "prompt_token_ids": [5, 6],
            "response_token_ids": [7, 8],
            "logprobs": [-0.5, -1.0],
            "mask": [True, True],
            "token_policy_versions": [version, version],
            "turns": [],
            "finish_reason": "stop",
            "reward": 0.0 if flat else float(sample),
            "scores": [],
            "seed": 17,
            "attempts": 1,
            "generate_seconds": 0.5,
            "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        }


@pytest.fixture
def past_run(tmp_path: Path) -> MakeRun:
    """Makes runs with stored episodes in one store: `past_run("r1", groups_per_step=2)`."""
    return lambda run_id, **config: PastRun(LocalStore(tmp_path), run_id, **config)
