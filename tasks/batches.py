"""A step's batch: what of its groups carries a signal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from storage import facts
from storage.annotations import read_scores
from storage.layout import RUN_SCORES
from storage.parts import read_committed
from storage.records import Commit, read_record
from tasks.again import drawn_batch, drawn_weights, reuse_metrics
from tasks.references import StepBatch
from tasks.run import ActiveRun


def choose_batch(
    run: ActiveRun,
    step: int,
    group_ids: Sequence[str],
    *,
    tokens_per_second: float,
    advantages: Mapping[str, float] | None = None,
    may_be_short: bool = True,
) -> StepBatch | None:
    """The batch of a step from committed groups, in their order; those without a signal are dropped.

    That is: all rewards (in a replay, all scores that count) are equal, or, with `advantages` by episode id, all of
    those are 0. Those that were dropped before stay out, and count in the metrics alone. None if fewer groups are left
    than a step has, and that may not be. Idempotent by step: a batch that the log has is the batch. Raises ValueError
    for an advantage that is not finite or no such episode's, and for an episode without a score.
    """
    score_set = RUN_SCORES if run.config.replay is None else run.config.replay.scores
    episodes = _rewards(run, _commits(run, group_ids), group_ids, score_set)
    rewards = {group_id: list(of_group.values()) for group_id, of_group in episodes.items()}
    signals = rewards if advantages is None else _zero_and_given(episodes, advantages)
    given = None if advantages is None else dict(advantages)
    if advantages is not None and run.config.algorithm.loss == "ppo":
        raise ValueError(
            "algorithm.loss 'ppo' has its critic's advantages, and this loop gives its own: choose another loss"
        )
    run.settle()
    if step not in run.ledger.batches:
        left = [g for g in group_ids if run.ledger.groups[g].reason is None]
        flat = without_signal({group_id: signals[group_id] for group_id in left})
        if run.config.algorithm.loss == "ppo":
            flat = ()  # A critic finds one in every group.
        kept = tuple(group_id for group_id in left if group_id not in set(flat))
        is_batch = may_be_short or len(kept) >= run.config.groups_per_step
        _log_choice(run, step, kept, flat, given, rewards, is_batch=is_batch)
        if not is_batch:
            return None
    kept = run.ledger.batches[step]
    metrics = {**_reward_metrics(list(rewards.values())), **reuse_metrics(run.ledger, step)}
    if tokens_per_second:
        metrics["generate/tokens_per_second"] = tokens_per_second
    return StepBatch(
        step=step,
        commits=_commits(run, kept),
        group_ids=kept,
        metrics=metrics,
        advantages=given,
        score_set=score_set,
        weights=drawn_weights(run.ledger, step),
    )


def _log_choice(
    run: ActiveRun,
    step: int,
    kept: tuple[str, ...],
    flat: Sequence[str],
    advantages: dict[str, float] | None,
    rewards: Mapping[str, Sequence[float]],
    *,
    is_batch: bool,
) -> None:
    """Log that flat groups are dropped and, if they are enough, that those kept make the step's batch.

    With a buffer they go there, and the batch is what it gives.
    """
    new: list[facts.Fact] = []
    try:
        if is_batch and run.config.buffer.policy != "once":
            new += drawn_batch(run, step, kept, rewards)
        elif is_batch:
            new.append(facts.Batched(step=step, group_ids=kept, advantages=advantages))
        if flat:
            new.append(facts.Dropped(group_ids=tuple(flat), reason="no_signal", step=step))
        if new:
            run.append(*new)
    except BaseException:
        run.buffer = None  # it may be ahead of the log, from which it is made again
        raise


def without_signal(signals: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    """The groups all of whose signals are equal: exactly, for a spread of rounding errors is no signal."""
    return tuple(group_id for group_id, of_group in signals.items() if len(set(of_group)) == 1)


def groups_without_signal(run: ActiveRun, group_ids: Sequence[str]) -> tuple[str, ...]:
    """Those of the run's own committed groups whose rewards are all equal."""
    found = _rewards(run, _commits(run, group_ids), group_ids, RUN_SCORES)
    return without_signal({group: list(episodes.values()) for group, episodes in found.items()})


def mean_rewards(run: ActiveRun, fact: facts.Committed) -> dict[str, float]:
    """The mean reward of each group of a commit."""
    found = _rewards(run, [fact.commit], fact.group_ids, RUN_SCORES)
    return {g: float(np.mean(list(episodes.values()))) for g, episodes in found.items()}


def _zero_and_given(
    episodes: dict[str, dict[str, float]], advantages: Mapping[str, float]
) -> dict[str, list[float]]:
    """By group, 0 and its episodes' advantages: all equal where none of them is another. Raises ValueError."""
    _check_advantages(advantages, {e for of_group in episodes.values() for e in of_group})
    return {
        group_id: [0.0, *(advantages.get(episode, 0.0) for episode in of_group)]
        for group_id, of_group in episodes.items()
    }


def _check_advantages(advantages: Mapping[str, float], episodes: set[str]) -> None:
    for episode, advantage in advantages.items():
        if episode not in episodes:
            raise ValueError(
                f"advantages name episode {episode!r}, which was not collected for this step: take ids of collect()"
            )
        if not math.isfinite(advantage):
            raise ValueError(
                f"the advantage of episode {episode!r} is {advantage}: give a finite number"
            )


def _commits(run: ActiveRun, group_ids: Sequence[str]) -> tuple[str, ...]:
    found = (run.ledger.groups[group_id].commit for group_id in group_ids)
    return tuple(dict.fromkeys(commit for commit in found if commit is not None))


def _rewards(
    run: ActiveRun, keys: Sequence[str], group_ids: Sequence[str], score_set: str
) -> dict[str, dict[str, float]]:
    """What counts as reward, by group and episode. Raises ValueError for an episode without a score."""
    commits = [read_record(run.store, key, Commit) for key in keys]
    table = read_committed(
        run.store,
        run.run_id,
        columns=["group_id", "episode_id", "reward"],
        commits=commits,
        group_ids=group_ids,
    )
    scores: dict[str, float] = {}
    if score_set != RUN_SCORES:
        for commit in commits:
            scores.update(read_scores(run.store, commit, score_set))
    rewards: dict[str, dict[str, float]] = {group_id: {} for group_id in group_ids}
    for row in table.to_pylist():
        reward = row["reward"] if score_set == RUN_SCORES else scores.get(row["episode_id"])
        if reward is None:
            raise ValueError(
                f"scores {score_set!r} lack episode {row['episode_id']} of group {row['group_id']}"
            )
        rewards[row["group_id"]][row["episode_id"]] = reward
    return rewards


def _reward_metrics(groups: list[list[float]]) -> dict[str, float]:
    if not groups:
        return {}
    return {
        "reward": float(np.mean([np.mean(group) for group in groups])),
        "reward_std": float(np.mean([np.std(group, ddof=1) for group in groups])),
        "frac_reward_zero_std": sum(len(set(group)) == 1 for group in groups) / len(groups),
    }
