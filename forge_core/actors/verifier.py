"""The verifier: scores stored episodes in a process of its own.

What a scorer breaks, it breaks there: some of them evaluate what the model wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from monarch.actor import Actor, endpoint

from forge_core.actors.messages import ScoreReply, ScoreRequest
from forge_core.config import RunConfig
from forge_core.ensembles.reference import find_ensemble, is_ensemble
from forge_core.ensembles.reward import EnsembleReward, stored_scores
from forge_core.environments import load_environment
from forge_core.environments.base import Environment, Prompt
from forge_core.rewards import RewardError, RewardProcess
from forge_core.timeline import Interval, Timeline
from storage import layout
from storage.annotations import find_scores, write_scores
from storage.episodes import SCHEMA, reward_mean
from storage.objects import ObjectStore, open_store
from storage.parts import commit_part, read_commit, read_part, write_part
from storage.records import Commit, read_record

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
_SHOWN_CHARACTERS = 200
_Given = Mapping[str, Mapping[str, float]]
"""Scores by verifier and episode."""


class Verifier(Actor):
    """Scores parts with the environment's own scorer, with a function of the user's, or with an ensemble."""

    def __init__(self, config: RunConfig, store_uri: str, spawned_at: float) -> None:
        self._config = config
        self._store = open_store(store_uri)
        self._reward = _open_reward(config, self._store)
        self._timeline = Timeline(started_at=spawned_at, waits={}, default_wait="wait_batch")
        with self._timeline.during("startup"):
            self._environment: Environment | None = (
                load_environment(config.environment, config.seed) if config.reward is None else None
            )

    @endpoint
    async def prepare(self) -> None:
        """Import the user's reward functions, if there are any. Raises RewardError if that fails."""
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
    async def rescore(self, commit_key: str, name: str) -> int:
        """Score a commit's episodes for the set of scores `name`; how many had no score in it before.

        Safe to repeat: the first scores stand. Raises RewardError, naming what scores and the prompt, for whatever it
        does instead of giving finite numbers.
        """
        commit = read_record(self._store, commit_key, Commit)
        if find_scores(self._store, commit, name):
            return 0
        table = read_commit(self._store, commit, [*_SCORED_COLUMNS, "reward"])
        by_episode: dict[str, float] = {}
        given = self._given(commit)
        for rows in _by_group(table):
            by_episode.update(zip(_ids(rows), self._score_named(rows, given), strict=True))
        episode_ids = table["episode_id"].to_pylist()
        scores = [by_episode[episode_id] for episode_id in episode_ids]
        details = [{self._scorer_name: score} for score in scores]
        mean = reward_mean(table)
        write_scores(self._store, commit, name, episode_ids, scores, details, reward_mean=mean)
        return commit.rows

    @endpoint
    async def intervals(self) -> tuple[Interval, ...]:
        """The verifier's time since it last told."""
        return tuple(self._timeline.drain())

    def _scored(self, table: pa.Table) -> pa.Table:
        by_episode: dict[str, float] = {}
        for rows in _by_group(table):
            by_episode.update(zip(_ids(rows), self._score(rows, {}), strict=True))
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
        """What the scores are called: the environment, the user's function, or an ensemble's name and version."""
        if self._config.reward is not None:
            return self._config.reward.rpartition(":")[2]
        assert self._environment is not None
        return self._environment.name

    def _given(self, commit: Commit) -> _Given:
        """Scores of a commit's episodes that need not be given again: those of an ensemble's verifiers."""
        if not isinstance(self._reward, EnsembleReward):
            return {}
        return stored_scores(self._store, commit, self._reward.ensemble)

    def _score(self, rows: list[dict[str, Any]], given: _Given) -> list[float]:
        """Rewards of one prompt's episodes."""
        prompt = _prompt(rows[0])
        if self._reward is None:
            return [self._score_one(prompt, row) for row in rows]
        completions = [row["response"] for row in rows]
        completion_ids = [row["response_token_ids"] for row in rows]
        if isinstance(self._reward, EnsembleReward):
            there = {name: [scores[e] for e in _ids(rows)] for name, scores in given.items()}
            return self._reward(prompt, completions, completion_ids, there)
        return self._reward(prompt, completions, completion_ids)

    def _score_named(self, rows: list[dict[str, Any]], given: _Given) -> list[float]:
        """The same, with every error of what scores as one that names it and the prompt."""
        try:
            return self._score(rows, given)
        except (RewardError, OSError):  # the latter may be the machine's, and mend itself
            raise
        except Exception as error:
            raise RewardError(
                f"verifier {self._scorer_name!r} raised {type(error).__name__}: {error}, on the prompt "
                f"{rows[0]['prompt'][:_SHOWN_CHARACTERS]!r}"
            ) from error

    def _score_one(self, prompt: Prompt, row: dict[str, Any]) -> float:
        assert self._environment is not None
        reward = float(self._environment.score(prompt, row["response"]))
        if not math.isfinite(reward):
            raise ValueError(
                f"environment {self._environment.name!r} scored episode {row['episode_id']} as {reward}; "
                "a score must be a finite number"
            )
        return reward


def _open_reward(config: RunConfig, store: ObjectStore) -> RewardProcess | EnsembleReward | None:
    """What scores in the environment's stead, if anything does."""
    timeout_seconds = config.timeouts.reward_seconds
    if config.reward is None:
        return None
    if not is_ensemble(config.reward):
        return RewardProcess(config.reward, timeout_seconds=timeout_seconds)
    ensemble = find_ensemble("reward", config.reward, store)
    return EnsembleReward(ensemble, seed=config.seed, timeout_seconds=timeout_seconds)


def _by_group(table: pa.Table) -> list[list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table.select(_SCORED_COLUMNS).to_pylist():
        groups.setdefault(row["group_id"], []).append(row)
    return list(groups.values())


def _ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["episode_id"] for row in rows]


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
