"""The part of `verify` about groups, from their episodes: whole, of their draw, of the right age, with a signal."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from storage import layout
from storage.episodes import policy_version_bounds
from storage.facts import Step
from storage.groups import Group, Problem
from storage.ledger import Ledger
from storage.verify_buffer import FRESH, kept_problems, oldest_allowed, source_of

TOLERANCE = 1e-9
"""Relative and absolute; means are summed in another order where they were logged."""

_IDENTITY = ["episode_id", "run_id", "group_id", "draw", "sample", "prompt_id", "environment"]
"""Columns that tell which episode it is."""


def is_close(left: float | None, right: float) -> bool:
    """Whether a mean is as it was logged."""
    return left is not None and math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


@dataclass(slots=True, kw_only=True)
class Groups:
    """What the episodes say of the run's groups, those of other runs among them."""

    run_id: str
    """The run."""
    config: dict[str, Any]
    """Its config."""
    ledger: Ledger
    """Its log, folded."""
    oldest: dict[str, int] = field(default_factory=dict)
    """Oldest policy version of any token, by group, of the groups that could be read."""
    newest: dict[str, int] = field(default_factory=dict)
    """The newest one."""
    rewards: dict[str, list[float]] = field(default_factory=dict)
    """The scores that count, by group."""
    _seeds: list[np.ndarray] = field(default_factory=list)
    _episodes: list[pa.ChunkedArray] = field(default_factory=list)

    def add(
        self, table: pa.Table, scores: Mapping[str, float] | None, *, size: int | None = None
    ) -> Iterator[Problem]:
        """Look at whole groups of episodes; `scores` count by episode instead of their rewards."""
        size = self.config["group_size"] if size is None else size
        bounds = np.stack(policy_version_bounds(table), axis=1)
        samples: dict[str, list[int]] = {}
        rows = table.select([*_IDENTITY, "reward"]).to_pylist()
        for row, (oldest, newest) in zip(rows, bounds.tolist(), strict=True):
            group_id, reward = row["group_id"], row.pop("reward")
            samples.setdefault(group_id, []).append(row["sample"])
            self.oldest[group_id] = min(oldest, self.oldest.get(group_id, oldest))
            self.newest[group_id] = max(newest, self.newest.get(group_id, newest))
            if not self._is_of_its_draw(row):
                sentence = f"episode {row['episode_id']} is not of the draw that was admitted"
                yield Problem("episode", row["episode_id"], sentence)
            if scores is not None and (reward := scores.get(row["episode_id"])) is None:
                sentence = f"episode {row['episode_id']} has no score in the set that counts"
                yield Problem("score", row["episode_id"], sentence)
                continue
            self.rewards.setdefault(group_id, []).append(reward)
        for group_id, found in samples.items():
            if sorted(found) != list(range(size)):
                sentence = f"group {group_id} has samples {found} where 0 to {size - 1} are due"
                yield Problem("short_group", group_id, sentence)
        if table["run_id"].unique().to_pylist() == [self.run_id]:
            self._seeds.append(table["seed"].to_numpy())
            self._episodes.append(table["episode_id"])

    def _is_of_its_draw(self, row: dict[str, Any]) -> bool:
        group = self.ledger.groups.get(row["group_id"])
        if group is None or (draw := group.draw) is None:
            return True  # Never admitted: the ledger has a problem for that.
        return row == {
            "episode_id": layout.episode_id(draw.group_id, row["sample"]),
            "run_id": group.run_id or self.run_id,
            "group_id": draw.group_id,
            "draw": draw.draw,
            "sample": row["sample"],
            "prompt_id": draw.prompt_id,
            "environment": draw.environment,
        }

    def problems(self) -> Iterator[Problem]:
        """What is wrong once all groups were looked at."""
        for step in self.ledger.trained:
            yield from self._ages(step)
            yield from self._reward(step)
            for group_id in step.group_ids:
                if self._has_signal(group_id, step.step) is False:
                    sentence = f"step {step.step} trained on group {group_id}, which has no signal"
                    yield Problem("signal", group_id, sentence)
        for group_id, group in self.ledger.groups.items():
            if group.reason == "no_signal":
                yield from self._dropped(group_id, group)
        yield from kept_problems(self.ledger, self.oldest, self.rewards)
        # An episode function of the user's may do with seeds what it likes.
        if not self.config.get("generate_episode"):
            yield from self._repeated_seeds()

    def _ages(self, fact: Step) -> Iterator[Problem]:
        """The ages of the step's groups, by their tokens, are within the bound and as logged."""
        name = f"step {fact.step}"
        bound: int | None = self.config["max_policy_age"]
        is_foreign = any(self.ledger.groups[group_id].run_id for group_id in fact.group_ids)
        if is_foreign and not self.config.get("train_rounds"):
            if (fact.age_max, fact.age_mean) != (None, None):
                sentence = f"{name} was logged with ages, which groups of other runs do not have"
                yield Problem("age", name, sentence)
            return
        ages = {g: fact.step - 1 - self.oldest[g] for g in fact.group_ids if g in self.oldest}
        for group_id, age in ages.items():
            most = bound
            if (source := source_of(self.ledger, fact.step, group_id)) not in (None, FRESH):
                most = oldest_allowed(self.config, str(source))
            if most is not None and age > most:
                sentence = (
                    f"{name} trained on group {group_id} at age {age}; at most {most} is allowed"
                )
                yield Problem("age", group_id, sentence)
            if (newest := self.newest[group_id]) >= fact.step:
                sentence = (
                    f"{name} trained on group {group_id}, which has tokens of version {newest}"
                )
                yield Problem("age", group_id, sentence)
        if not ages or len(ages) < len(fact.group_ids):
            return
        age_max, age_mean = max(ages.values()), sum(ages.values()) / len(ages)
        if fact.age_max != age_max or not is_close(fact.age_mean, age_mean):
            sentence = (
                f"{name} was logged with ages up to {fact.age_max}, {fact.age_mean} on average; "
                f"its episodes have {age_max} and {age_mean}"
            )
            yield Problem("age", name, sentence)

    def _reward(self, fact: Step) -> Iterator[Problem]:
        """The mean reward that the trainer says it trained on is that of the episodes."""
        said = fact.metrics.get("trained_reward")
        if said is None or not fact.group_ids or not self.rewards.keys() >= set(fact.group_ids):
            return
        rewards = [each for group_id in fact.group_ids for each in self.rewards[group_id]]
        is_so = math.fsum(rewards) / len(rewards)
        # The trainer holds rewards in 32 bits.
        if not abs(said - is_so) <= 1e-6 * max(1.0, *map(abs, rewards)):
            sentence = f"step {fact.step} was logged with a mean reward of {said}; its episodes have {is_so}"
            yield Problem("reward", f"step {fact.step}", sentence)

    def _has_signal(self, group_id: str, step: int | None) -> bool | None:
        """Whether anything can be learned of a group at a step; None if its episodes could not be read."""
        if group_id not in self.rewards:
            return None
        advantages = self.ledger.advantages.get(step) if step is not None else None
        if advantages is None and self._has_critic:
            return True
        if advantages is None:
            # Exact: a spread of rounding errors is none, and a small true one is.
            return len(set(self.rewards[group_id])) > 1
        episodes = self.ledger.groups[group_id].num_episodes
        ids = (layout.episode_id(group_id, sample) for sample in range(episodes))
        return any(advantages.get(episode_id, 0.0) for episode_id in ids)

    @property
    def _has_critic(self) -> bool:
        """Whether a critic finds something to learn in every group."""
        return dict(self.config.get("algorithm") or {}).get("loss") == "ppo"

    def _dropped(self, group_id: str, group: Group) -> Iterator[Problem]:
        if group.commit is None:
            sentence = f"group {group_id} was dropped as no_signal and never scored"
            yield Problem("signal", group_id, sentence)
        elif self._has_signal(group_id, group.dropped_at):
            sentence = f"group {group_id} was dropped as no_signal, and its episodes have one"
            yield Problem("signal", group_id, sentence)

    def _repeated_seeds(self) -> Iterator[Problem]:
        if not self._seeds:
            return
        seeds = np.concatenate(self._seeds)
        values, counts = np.unique(seeds, return_counts=True)
        for seed in values[counts > 1].tolist():
            chunks = (each.chunks for each in self._episodes)
            episodes = pa.chunked_array([chunk for each in chunks for chunk in each])
            shared = episodes.take(pa.array(np.flatnonzero(seeds == seed))).to_pylist()
            sentence = f"episodes {', '.join(shared)} were sampled with one seed, {seed}"
            yield Problem("seed", shared[0], sentence)
