"""The verifier: scores stored episodes in a process of its own.

What a scorer breaks, it breaks there: some of them evaluate what the model wrote.
"""

from __future__ import annotations

import json
import math

import pyarrow as pa
from monarch.actor import Actor, endpoint

from forge_core.actors.messages import ScoreReply, ScoreRequest
from forge_core.config import RunConfig
from forge_core.environments import load_environment
from forge_core.environments.base import Environment, Prompt
from forge_core.timeline import Interval, Timeline
from storage import layout
from storage.episodes import SCHEMA
from storage.objects import open_store
from storage.parts import commit_part, read_part, write_part


class Verifier(Actor):
    """Scores parts with the environment's own scorer."""

    def __init__(self, config: RunConfig, store_uri: str, spawned_at: float) -> None:
        self._store = open_store(store_uri)
        self._timeline = Timeline(started_at=spawned_at, waits={}, default_wait="wait_batch")
        with self._timeline.during("startup"):
            self._environment: Environment = load_environment(config.environment, config.seed)

    @endpoint
    async def score(self, request: ScoreRequest) -> ScoreReply:
        """Score a part; commit it, or store it as an evaluation. Safe to repeat: the first commit counts.

        Raises ValueError, naming environment and episode, if a score is no finite number; an error that the environment
        lets out is raised as it is. Neither is ever a reward of 0.
        """
        with self._timeline.during("evaluate" if request.commit is None else "score"):
            table = self._scored(read_part(self._store, request.part))
            if request.commit is None:
                commit_key, part = None, write_part(self._store, request.key_prefix, table)
            else:
                commit = commit_part(self._store, request.run_id, request.commit, table)
                commit_key = layout.commit_key(request.run_id, commit.key)
                part = commit.part
        return ScoreReply(
            commit=commit_key,
            part=part,
            group_ids=tuple(table["group_id"].unique().to_pylist()),
            num_episodes=table.num_rows,
            reward_by_sample=_reward_by_sample(table),
            intervals=tuple(self._timeline.drain()),
        )

    @endpoint
    async def intervals(self) -> tuple[Interval, ...]:
        """The verifier's time since it last told."""
        return tuple(self._timeline.drain())

    def _scored(self, table: pa.Table) -> pa.Table:
        rewards = [self._score(row) for row in table.to_pylist()]
        scores = [[{"name": self._environment.name, "value": reward}] for reward in rewards]
        return table.set_column(
            table.schema.get_field_index("reward"), SCHEMA.field("reward"), [rewards]
        ).set_column(
            table.schema.get_field_index("scores"),
            SCHEMA.field("scores"),
            pa.array(scores, SCHEMA.field("scores").type),
        )

    def _score(self, row: dict[str, object]) -> float:
        metadata = json.loads(str(row["metadata"]))
        prompt = Prompt(
            prompt_id=str(row["prompt_id"]),
            text=str(row["prompt"]),
            answer=str(row["answer"]),
            target=str(row["answer"]),
            index=metadata.pop("index"),
            environment=str(row["environment"]),
            metadata=metadata,
        )
        reward = float(self._environment.score(prompt, str(row["response"])))
        if not math.isfinite(reward):
            raise ValueError(
                f"environment {self._environment.name!r} scored episode {row['episode_id']} as {reward}; "
                "a score must be a finite number"
            )
        return reward


def _reward_by_sample(table: pa.Table) -> tuple[float, ...]:
    sums: dict[int, float] = {}
    for sample, reward in zip(
        table["sample"].to_pylist(), table["reward"].to_pylist(), strict=True
    ):
        sums[sample] = sums.get(sample, 0.0) + reward
    return tuple(sums[sample] for sample in sorted(sums))
