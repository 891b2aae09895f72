"""The plan of a replay: which stored groups of past runs each step trains on.

```
run's log ──▶ its own steps, then what none of them considered ──▶ filters ──▶ run after run ──▶ epochs
```

The plan follows from the config and the logs up to the entries that it names, so whoever makes it again makes the
same. By the runs' own scores a step has what the run's own step was batched with, so that the same loss gives the same
weights; by other scores it has all that the step considered, for what had no signal then may have one now.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa

from forge_core.config import ReplayConfig, RunConfig
from forge_core.settings import stored_config
from storage import facts, layout
from storage.annotations import check_covers, read_scores
from storage.episodes import policy_version_bounds
from storage.groups import Group
from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from storage.objects import ObjectStore
from storage.parts import CommitReader
from storage.records import Commit, read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A past run, as far as it counts for a replay."""

    run_id: str
    """The run."""
    config: RunConfig
    """Its config."""
    ledger: Ledger
    """Its log up to an entry, folded."""
    log_end: str
    """That entry, as `<incarnation>-<number>`."""

    def groups(self, group_ids: Iterable[str]) -> Iterator[tuple[str, Group]]:
        """Those of some groups that the run itself has committed."""
        for group_id in group_ids:
            group = self.ledger.groups[group_id]
            if group.commit is not None and group.run_id is None:
                yield group_id, group


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """What a step of a replay considers."""

    step: int
    """The step, from 1."""
    group_ids: tuple[str, ...]
    """The groups, in order; those that have no signal will be dropped."""
    replayed: tuple[facts.Replayed, ...]
    """The facts that let them in."""
    advantages: dict[str, float] | None
    """By episode id, where a loop of the user's gave them in the past run."""


def read_source(store: ObjectStore, run_id: str, log_end: str | None = None) -> Source:
    """A past run up to an entry of its log, or up to the last one.

    Raises ValueError if there is no such run or entry, or the run has committed no groups of its own.
    """
    config = stored_config(store, run_id)
    entries = read_entries(store, run_id)
    names = [f"{entry.incarnation:06d}-{entry.seq:08d}" for entry in entries]
    if log_end is not None:
        if log_end not in names:
            raise ValueError(f"the log of run {run_id!r} has no entry {log_end} any more")
        del entries[names.index(log_end) + 1 :]
    ledger = Ledger.fold(entries, read_incarnations(store, run_id))
    source = Source(
        run_id=run_id, config=config, ledger=ledger, log_end=log_end or (names or [""])[-1]
    )
    if ledger.replayed:
        runs = ", ".join(dict.fromkeys(fact.run_id for fact in ledger.replayed))
        raise ValueError(
            f"run {run_id!r} generated nothing itself: replay what it replayed, {runs}"
        )
    if not any(source.groups(ledger.groups)):
        raise ValueError(f"run {run_id!r} has no committed groups to train on")
    return source


def read_sources(store: ObjectStore, replay: ReplayConfig) -> list[Source]:
    """The past runs of a replay. Raises ValueError as `read_source` does."""
    ends = zip(replay.runs, replay.log_ends, strict=True)
    return [read_source(store, run_id, log_end) for run_id, log_end in ends]


def plan_replay(
    store: ObjectStore, replay: ReplayConfig, sources: Sequence[Source]
) -> tuple[PlannedStep, ...]:
    """All steps of a replay, in order.

    Raises ValueError if the scores do not cover the runs, are damaged, or filters leave nothing.
    """
    if replay.scores != layout.RUN_SCORES:
        for source in sources:
            check_covers(store, source.run_id, replay.scores, _commits(store, source))
    wanted: Container[str] | None = None
    if replay.filters:
        wanted = {g for source in sources for g in _wanted(store, replay, source)}
    once = [step for source in sources for step in _steps(source, replay, wanted)]
    if not any(step.group_ids for step in once):
        runs = ", ".join(source.run_id for source in sources)
        raise ValueError(
            f"of runs {runs} nothing is left to train on: loosen the filters of section replay, or take other --scores"
        )
    return tuple(
        PlannedStep(
            step=number,
            group_ids=step.group_ids,
            replayed=step.replayed,
            advantages=step.advantages,
        )
        for number, step in enumerate(once * replay.epochs, start=1)
    )


def _steps(
    source: Source, replay: ReplayConfig, wanted: Container[str] | None
) -> Iterator[PlannedStep]:
    """The steps of one run, not numbered yet. With filters, those that they leave nothing of are left out."""
    own = replay.scores == layout.RUN_SCORES
    for step, group_ids in _considered(source, own):
        chosen = [g for g, _ in source.groups(group_ids) if wanted is None or g in wanted]
        if wanted is None or chosen:
            advantages = source.ledger.advantages.get(step) if own else None
            yield PlannedStep(
                step=0,
                group_ids=tuple(chosen),
                replayed=tuple(_replayed(source, replay.scores, chosen)),
                advantages=None if advantages is None else _of(source, chosen, advantages),
            )


def _considered(source: Source, own: bool) -> Iterator[tuple[int, Sequence[str]]]:
    """Groups by step of the run, then those that no step considered, as many at a time as its steps have."""
    ledger = source.ledger
    seen: set[str] = set()
    for step in sorted(ledger.batches.keys() | ledger.steps.keys()):
        batch = ledger.batches[step] if step in ledger.batches else ledger.steps[step].group_ids
        # Of what the run used again, its first use counts: how often a replay uses it is for its own config to say.
        new = tuple(group_id for group_id in batch if group_id not in seen)
        seen.update(batch, ledger.dropped_in.get(step, ()))
        yield step, new if own else ledger.considered(step) or new
    left = sorted(
        group_id
        for group_id, group in source.groups(ledger.groups)
        # By its own scores a run has no more to learn of what it dropped.
        if group_id not in seen and not (own and group.reason is not None)
    )
    size = source.config.groups_per_step
    for first in range(0, len(left), size):
        yield -1, left[first : first + size]


def _replayed(source: Source, scores: str, group_ids: Sequence[str]) -> Iterator[facts.Replayed]:
    """The facts that let these groups in, one for each commit that holds some."""
    groups = [group for _, group in source.groups(group_ids)]
    for commit, of_commit in groupby(groups, key=lambda group: group.commit):
        assert commit is not None
        yield facts.Replayed(
            run_id=source.run_id,
            commit=commit,
            draws=tuple(group.draw for group in of_commit if group.draw is not None),
            group_size=source.config.group_size,
            score_set=scores,
        )


def _of(source: Source, group_ids: Sequence[str], advantages: dict[str, float]) -> dict[str, float]:
    """The advantages of the episodes of these groups."""
    size = source.config.group_size
    episodes = {layout.episode_id(g, sample) for g in group_ids for sample in range(size)}
    return {episode: value for episode, value in advantages.items() if episode in episodes}


def _commits(store: ObjectStore, source: Source) -> list[Commit]:
    return [read_record(store, key, Commit) for key in source.ledger.commits]


def _wanted(store: ObjectStore, replay: ReplayConfig, source: Source) -> Iterator[str]:
    """Ids of the groups of a run that pass the filters."""
    versions = replay.min_policy_version, replay.max_policy_version
    rewards = replay.min_reward, replay.max_reward
    reader = CommitReader(store)
    for commit in reader.ahead(_commits(store, source)):
        wanted = set(commit.group_ids)
        if replay.environment is not None:
            wanted = {g for g in wanted if _environment(source, g) == replay.environment}
        if wanted and not _inside(commit.policy_version_min, commit.policy_version_max, *versions):
            columns = ["group_id", "response_token_ids", "mask", "token_policy_versions"]
            wanted &= _of_versions(reader.read(commit, columns), *versions)
        if wanted and rewards != (None, None):
            table = reader.read(commit, ["group_id", "episode_id", "reward"])
            scores = (
                None
                if replay.scores == layout.RUN_SCORES
                else read_scores(store, commit, replay.scores)
            )
            wanted &= _of_rewards(table, scores, *rewards)
        yield from wanted


def _environment(source: Source, group_id: str) -> str | None:
    draw = source.ledger.groups[group_id].draw
    return None if draw is None else draw.environment


def _of_versions(table: pa.Table, least: int | None, most: int | None) -> set[str]:
    """Groups all of whose tokens are of versions within the bounds."""
    group_ids = np.asarray(table["group_id"].to_pylist())
    oldest, newest = policy_version_bounds(table)
    outside = np.array(
        [not _inside(*bounds, least, most) for bounds in zip(oldest, newest, strict=True)]
    )
    return set(group_ids.tolist()) - set(group_ids[outside].tolist())


def _of_rewards(
    table: pa.Table, scores: dict[str, float] | None, least: float | None, most: float | None
) -> set[str]:
    """Groups whose mean reward, or mean score if there are scores, is within the bounds."""
    rewards: dict[str, list[float]] = {}
    for row in table.to_pylist():
        reward = row["reward"] if scores is None else scores[row["episode_id"]]
        rewards.setdefault(row["group_id"], []).append(reward)
    means = {group_id: float(np.mean(each)) for group_id, each in rewards.items()}
    return {group_id for group_id, mean in means.items() if _inside(mean, mean, least, most)}


def _inside(low: float, high: float, least: float | None, most: float | None) -> bool:
    return (least is None or least <= low) and (most is None or high <= most)
