"""The verifier: scores stored episodes in a process of its own, several parts and prompts at the same time.

What a scorer breaks, it breaks there: some of them evaluate what the model wrote.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from monarch.actor import Actor, concurrent_endpoint, endpoint

from forge_core.actors.messages import ScoreReply, ScoreRequest
from forge_core.config import RunConfig
from forge_core.ensembles.reference import find_ensemble
from forge_core.ensembles.reward import EnsembleReward, stored_scores
from forge_core.environments.base import Prompt
from forge_core.rewards import RewardError
from forge_core.timeline import Interval, Timeline
from forge_core.tools.scoring import ToolScoring
from forge_core.verifiers import (
    EnsembleVerifier,
    Panel,
    Response,
    Score,
    Scored,
    make_evaluating_panel,
    make_panel,
)
from storage import layout
from storage.annotations import ScoredBy, find_scores, write_scores
from storage.episodes import SCHEMA, policy_version_bounds, reward_mean
from storage.objects import ObjectStore, open_store
from storage.parts import commit_part, read_commit, read_part, write_part
from storage.process_facts import IntervalKind
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
    "turns",
]
_SHOWN_CHARACTERS = 200
_Given = Mapping[str, Mapping[str, float]]
"""Scores by verifier and episode."""


class Verifier(Actor):
    """Scores parts with the config's verifiers, a function of the user's, an ensemble, or the environment's scorer."""

    def __init__(self, config: RunConfig, store_uri: str, spawned_at: float) -> None:
        self._config = config
        self._store = open_store(store_uri)
        self._timeline = Timeline(started_at=spawned_at, waits={}, default_wait="wait_batch")
        with self._timeline.during("startup"):
            ensembles = _open_ensembles(config, self._store)
            # What scores alone takes what stored episodes have of its verifiers' scores.
            self._ensemble = ensembles.get(config.reward or "")
            self._panel: Panel = make_panel(config, ensembles)
            self._evaluating = make_evaluating_panel(config) or self._panel
            self._tools = ToolScoring.of(config)
        # They live as long as this process: what a verifier starts dies with the thread that started it.
        self._threads = ThreadPoolExecutor(config.scoring.workers)
        self._num_working = 0
        self._work = contextlib.ExitStack()

    @endpoint
    async def prepare(self) -> None:
        """Start what the verifiers need, and import functions of the user's. Raises RewardError if that fails."""
        with self._timeline.during("startup"):
            for panel in (self._panel, self._evaluating):
                await asyncio.wrap_future(self._threads.submit(panel.load))

    @concurrent_endpoint
    async def score(self, request: ScoreRequest) -> ScoreReply:
        """Score a part; commit it, or store it as an evaluation. Safe to repeat: the first commit counts.

        Raises ValueError, naming environment and episode, if a score is no finite number, and RewardError for whatever
        a user's function does instead; an error that the environment lets out is raised as it is. None of this is ever
        a reward of 0.
        """
        with self._working("evaluate" if request.commit is None else "score"):
            reply = await asyncio.to_thread(self._score_part, request)
        return dataclasses.replace(reply, intervals=tuple(self._timeline.drain()))

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
        given: _Given = {}
        if self._ensemble is not None:
            given = stored_scores(self._store, commit, self._ensemble.ensemble)
        by_episode = self._by_episode(table, {}, functools.partial(self._score_named, given=given))
        episode_ids = table["episode_id"].to_pylist()
        scored = [by_episode[episode_id] for episode_id in episode_ids]
        scores = [each.reward for each in scored]
        details = [_values(each) for each in scored]
        write_scores(
            self._store, commit, name, episode_ids, scores, details,
            reward_mean=reward_mean(table), scored_by=_scored_by(scored),
        )  # fmt: skip
        return commit.rows

    @endpoint
    async def intervals(self) -> tuple[Interval, ...]:
        """The verifier's time since it last told."""
        return tuple(self._timeline.drain())

    @contextlib.contextmanager
    def _working(self, kind: IntervalKind) -> Iterator[None]:
        """One interval from where the first of several at a time begins to where the last ends."""
        self._num_working += 1
        if self._num_working == 1:
            self._work.enter_context(self._timeline.during(kind))
        try:
            yield
        finally:
            self._num_working -= 1
            if self._num_working == 0:
                self._work.close()

    def _score_part(self, request: ScoreRequest) -> ScoreReply:
        is_evaluation = request.commit is None
        table = self._scored(read_part(self._store, request.part), is_evaluation)
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
            rewards=_rewards_by_group(table) if is_evaluation else (),
            intervals=(),
        )

    def _scored(self, table: pa.Table, is_evaluation: bool) -> pa.Table:
        # Weights that change over time follow the weights that sampled; an evaluation is compared with others.
        versions = {} if is_evaluation else _oldest_versions(table)
        panel = self._evaluating if is_evaluation else self._panel
        by_episode = self._by_episode(table, versions, functools.partial(_score, panel))
        scored = [by_episode[episode_id] for episode_id in table["episode_id"].to_pylist()]
        columns: dict[str, list[Any]] = {
            "reward": [each.reward for each in scored],
            "scores": [
                [{"name": name, "value": value} for name, value in _values(each).items()]
                for each in scored
            ],
            "scored_by": [
                [{"name": s.name, "version": s.version, "seconds": s.seconds} for s in each.scores]
                for each in scored
            ],
        }
        for name, values in columns.items():
            field = SCHEMA.field(name)
            array = pa.array(values, field.type)
            table = table.set_column(table.schema.get_field_index(name), field, array)
        return table

    def _by_episode(
        self, table: pa.Table, versions: dict[str, float], score: Callable[..., list[Scored]]
    ) -> dict[str, Scored]:
        """What each episode gets, with the policy version of its group, if that has one. Raises what `score` raises."""
        groups = [self._tools.shown(rows) for rows in _by_group(table)]
        futures = [
            self._threads.submit(score, rows, versions.get(rows[0]["group_id"], math.inf))
            for rows in groups
        ]
        try:
            scored = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        return {
            episode_id: each
            for rows, of_group in zip(groups, scored, strict=True)
            for episode_id, each in zip(
                _ids(rows), self._tools.charged(rows, of_group), strict=True
            )
        }

    def _score_given(
        self, ensemble: EnsembleVerifier, rows: list[dict[str, Any]], given: _Given
    ) -> list[Scored]:
        (name,) = self._panel.names
        there = {each: [scores[e] for e in _ids(rows)] for each, scores in given.items()}
        values = ensemble.score(_prompt(rows[0]), _responses(rows), there)
        return [
            Scored(
                reward=float(value),
                scores=(
                    Score(
                        name=name,
                        value=float(value),
                        version=ensemble.version,
                        seconds=0.0,
                        parts=value.parts,
                    ),
                ),
            )
            for value in values
        ]

    def _score_named(
        self, rows: list[dict[str, Any]], policy_version: float, *, given: _Given
    ) -> list[Scored]:
        """The same, with every error of what scores as one that names it and the prompt.

        Scores that are given are not asked for again: those of an ensemble's verifiers.
        """
        try:
            if self._ensemble is None or not given:
                return _score(self._panel, rows, policy_version)
            return self._score_given(self._ensemble, rows, given)
        except (RewardError, OSError):  # the latter may be the machine's, and mend itself
            raise
        except Exception as error:
            raise RewardError(
                f"verifier {', '.join(self._panel.names)!r} raised {type(error).__name__}: {error}, on the prompt "
                f"{rows[0]['prompt'][:_SHOWN_CHARACTERS]!r}"
            ) from error


def _score(panel: Panel, rows: list[dict[str, Any]], policy_version: float) -> list[Scored]:
    """What the episodes of one prompt get."""
    return panel(_prompt(rows[0]), _responses(rows), policy_version=policy_version)


def _open_ensembles(config: RunConfig, store: ObjectStore) -> dict[str, EnsembleVerifier]:
    """The ensembles that score, by reference. Raises ValueError if the store lacks one."""
    seconds = config.timeouts.reward_seconds
    opened = {}
    for field, reference in config.ensembles().items():
        ensemble = find_ensemble(field, reference, store)
        reward = EnsembleReward(ensemble, seed=config.seed, timeout_seconds=seconds)
        opened[reference] = EnsembleVerifier(reward)
    return opened


def _values(scored: Scored) -> dict[str, float]:
    """All scores of an episode by name, those of an ensemble's verifiers among them."""
    return {name: value for score in scored.scores for name, value in score.values.items()}


def _scored_by(scored: list[Scored]) -> dict[str, ScoredBy]:
    """Who gave the scores, and what they took together."""
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}
    for score in (score for each in scored for score in each.scores):
        versions[score.name] = score.version
        seconds[score.name] = seconds.get(score.name, 0.0) + score.seconds
    return {name: ScoredBy(version=v, seconds=seconds[name]) for name, v in versions.items()}


def _responses(rows: list[dict[str, Any]]) -> list[Response]:
    return [
        Response(text=row["response"], token_ids=tuple(row["response_token_ids"])) for row in rows
    ]


def _oldest_versions(table: pa.Table) -> dict[str, float]:
    """By group, the oldest policy version that sampled any of its tokens."""
    oldest, _ = policy_version_bounds(table)
    versions: dict[str, float] = {}
    for group_id, version in zip(table["group_id"].to_pylist(), oldest.tolist(), strict=True):
        versions[group_id] = min(version, versions.get(group_id, math.inf))
    return versions


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


def _rewards_by_group(table: pa.Table) -> tuple[tuple[float, ...], ...]:
    groups: dict[str, dict[int, float]] = {}
    for row in table.select(["group_id", "sample", "reward"]).to_pylist():
        groups.setdefault(row["group_id"], {})[row["sample"]] = row["reward"]
    return tuple(tuple(of[sample] for sample in sorted(of)) for of in groups.values())
