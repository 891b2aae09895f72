"""The verifier: scores stored episodes in a process of its own.

What a scorer breaks, it breaks there: some of them evaluate what the model wrote.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa
from monarch.actor import Actor, endpoint

from forge_core.actors.messages import ScoreReply, ScoreRequest
from forge_core.config import RunConfig
from forge_core.environments import load_environment
from forge_core.environments.base import Environment, Prompt
from forge_core.rewards import RewardProcess
from forge_core.timeline import Interval, Timeline
from storage import layout
from storage.episodes import SCHEMA
from storage.objects import open_store
from storage.parts import commit_part, read_part, write_part

_SCORED_COLUMNS = [
    "episode_id",
    "group_id",
    "prompt_id",
    "prompt",
    "answer",
    "environment",
    "metadata",
    "response",
    "response_token_ids",
]


class Verifier(Actor):
    """Scores parts with the environment's own scorer, or with a function of the user's."""

    def __init__(self, config: RunConfig, store_uri: str, spawned_at: float) -> None:
        self._config = config
        self._store = open_store(store_uri)
        self._reward = (
            RewardProcess(config.reward, timeout_seconds=config.timeouts.reward_seconds)
            if config.reward is not None
            else None
        )
        self._timeline = Timeline(started_at=spawned_at, waits={}, default_wait="wait_batch")
        with self._timeline.during("startup"):
            self._environment: Environment = load_environment(config.environment, config.seed)

    @endpoint
    async def prepare(self) -> None:
        """Import the user's reward function, if there is one. Raises RewardError if that fails."""
        with self._timeline.during("startup"):
            if self._reward is not None:
                self._reward.load()

    @endpoint
    async def score(self, request: ScoreRequest) -> ScoreReply:
        """Score a part; commit it, or store it as an evaluation. Safe to repeat: the first commit counts.

        Raises ValueError, naming environment and episode, if a score is no finite number, and RewardError for whatever
        a user's function does instead; an error that the environment lets out is raised as it is. None of this is ever
        a reward of 0.
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
        by_group: dict[str, list[dict[str, Any]]] = {}
        for row in table.select(_SCORED_COLUMNS).to_pylist():
            by_group.setdefault(row["group_id"], []).append(row)
        by_episode: dict[str, float] = {}
        for rows in by_group.values():
            rewards = self._score(rows)
            by_episode.update(zip((row["episode_id"] for row in rows), rewards, strict=True))
        rewards = [by_episode[episode_id] for episode_id in table["episode_id"].to_pylist()]
        scores = [[{"name": self._scorer_name, "value": reward}] for reward in rewards]
        return table.set_column(
            table.schema.get_field_index("reward"), SCHEMA.field("reward"), [rewards]
        ).set_column(
            table.schema.get_field_index("scores"),
            SCHEMA.field("scores"),
            pa.array(scores, SCHEMA.field("scores").type),
        )

    @property
    def _scorer_name(self) -> str:
        """What the scores are called: the environment, or the user's function."""
        if self._config.reward is None:
            return self._environment.name
        return self._config.reward.rpartition(":")[2]

    def _score(self, rows: list[dict[str, Any]]) -> list[float]:
        """Rewards of one prompt's episodes."""
        prompt = _prompt(rows[0])
        if self._reward is not None:
            return self._reward(
                prompt,
                [row["response"] for row in rows],
                [row["response_token_ids"] for row in rows],
            )
        return [self._score_one(prompt, row) for row in rows]

    def _score_one(self, prompt: Prompt, row: dict[str, Any]) -> float:
        reward = float(self._environment.score(prompt, row["response"]))
        if not math.isfinite(reward):
            raise ValueError(
                f"environment {self._environment.name!r} scored episode {row['episode_id']} as {reward}; "
                "a score must be a finite number"
            )
        return reward


def _prompt(row: dict[str, Any]) -> Prompt:
    """The prompt of a stored episode."""
    metadata = json.loads(row["metadata"])
    return Prompt(
        prompt_id=row["prompt_id"],
        text=row["prompt"],
        answer=row["answer"],
        target=row["answer"],
        index=metadata.pop("index"),
        environment=row["environment"],
        metadata=metadata,
    )


def _reward_by_sample(table: pa.Table) -> tuple[float, ...]:
    sums: dict[int, float] = {}
    for sample, reward in zip(
        table["sample"].to_pylist(), table["reward"].to_pylist(), strict=True
    ):
        sums[sample] = sums.get(sample, 0.0) + reward
    return tuple(sums[sample] for sample in sorted(sums))
