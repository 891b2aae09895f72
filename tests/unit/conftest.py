"""What several unit tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from made_episodes import committed, episode
from stored_run import StoredRun

from forge_core.config import RunConfig
from storage import facts, layout
from storage.episodes import SCHEMA
from storage.objects import LocalStore
from storage.parts import commit_part

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


class PastRun(StoredRun):
    """A run of a whole config, two samples to a group.

    The reward of sample 1 is 1 and that of sample 0 is 0, but in flat groups, where both are 0.
    """

    def __init__(self, store: LocalStore, run_id: str, **config: Any) -> None:
        self.config = RunConfig.model_validate({"group_size": 2, "groups_per_step": 4, **config})
        super().__init__(store, run_id, **self.config.model_dump(mode="json"))
        self.checkpoint(0)

    def step(self, number: int, draws: Sequence[int], **how: Any) -> None:
        """A round, its batch and its step; the round's flat groups are dropped."""
        flat = how.get("flat", ())
        self.round(number, draws, **how)
        self.batch(number, [d for d in draws if d not in flat], how.get("advantages"))
        if flat:
            self.drop(flat, "no_signal", number)
        self.train(number, [d for d in draws if d not in flat])

    def round(
        self,
        number: int,
        draws: Sequence[int],
        *,
        flat: Sequence[int] = (),
        version: int | dict[int, int] | None = None,
        environment: str = "sums",
        advantages: Any = None,
        fills: int | None = None,
    ) -> None:
        """Draws are admitted, to fill up a step where they are spare, and their episodes committed, as one part."""
        versions = version if isinstance(version, dict) else {}
        of_all = version if isinstance(version, int) else number - 1
        rows = [
            episode(
                draw,
                sample,
                self.run_id,
                environment=environment,
                prompt=f"{draw}+1=",
                answer=f"{draw + 1}",
                metadata=f'{{"index": {draw}}}',
                response="1" * (sample + 1),
                response_token_ids=[7, 8],
                logprobs=[-0.5, -1.0],
                mask=[True, True],
                token_policy_versions=[versions.get(draw, of_all)] * 2,
                reward=0.0 if draw in flat else float(sample),
            )
            for draw in draws
            for sample in (0, 1)
        ]
        part = pa.Table.from_pylist(rows, SCHEMA)
        self.admit(number, draws, environment, fills)
        commit = commit_part(self.store, self.run_id, layout.part_name(number, 0), part)
        self.log.append(committed(number, commit))

    def batch(self, step: int, draws: Sequence[int], advantages: Any = None) -> None:
        self.log.append(
            facts.Batched(step=step, group_ids=self.groups(draws), advantages=advantages)
        )

    def drop(self, draws: Sequence[int], reason: str, step: int | None) -> None:
        self.log.append(facts.Dropped(group_ids=self.groups(draws), reason=reason, step=step))


@pytest.fixture
def past_run(tmp_path: Path) -> MakeRun:
    """Makes runs with stored episodes in one store: `past_run("r1", groups_per_step=2)`."""
    return lambda run_id, **config: PastRun(LocalStore(tmp_path), run_id, **config)
