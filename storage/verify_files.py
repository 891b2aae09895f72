"""The half of `verify` that opens files: parts, commits, evaluations and checkpoints.

Each part is opened once. What a part tells about its groups is kept until the steps are checked.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from storage import layout
from storage.episodes import (
    Figures,
    check_scored,
    check_table,
    policy_version_bounds,
    reward_mean,
)
from storage.facts import Committed, Evaluated, Generated, Step
from storage.ledger import Ledger, Problem
from storage.objects import ObjectNotFound, ObjectStore
from storage.parts import describe_commit, read_file, read_part
from storage.records import Commit, PartRef, read_record

_TOLERANCE = 1e-9
"""Relative and absolute; means are summed in another order where they were logged."""

_IDENTITY = ["episode_id", "run_id", "group_id", "draw", "sample", "prompt_id", "environment"]
"""Columns that tell which episode it is."""


def file_problems(
    store: ObjectStore, run_id: str, config: dict[str, Any], ledger: Ledger, counted: Counter[str]
) -> Iterator[Problem]:
    """All that is wrong with the files that the ledger names."""
    audit = _Audit(store=store, run_id=run_id, config=config, ledger=ledger, counted=counted)
    for generated in ledger.generated:
        yield from audit.generated(generated)
    for committed in ledger.committed:
        yield from audit.committed(committed)
    for step in ledger.trained:
        yield from audit.step(step)
    for evaluated in ledger.evaluated.values():
        yield from audit.evaluated(evaluated)
    yield from audit.checkpoints()
    yield from audit.sources()


@dataclass(slots=True, kw_only=True)
class _Audit:
    store: ObjectStore
    run_id: str
    config: dict[str, Any]
    ledger: Ledger
    counted: Counter[str]
    oldest: dict[str, int] = field(default_factory=dict)
    """Oldest policy version of any token, by group, of the groups that could be read."""

    def generated(self, fact: Generated) -> Iterator[Problem]:
        """The part is as written, and the fact's figures are the part's."""
        try:
            table = self._read(fact.part)
        except (ValueError, ObjectNotFound) as error:
            yield Problem("part", fact.part.key, str(error))
            return
        figures = Figures.of(table)
        for name in (
            "group_ids",
            "policy_version_min",
            "policy_version_max",
            "prompt_tokens",
            "response_tokens",
        ):
            said, is_so = getattr(fact, name), getattr(figures, name)
            if said != is_so:
                sentence = f"the log says {name} = {said} of {fact.part.key}, which has {is_so}"
                yield Problem("figures", fact.part.key, sentence)

    def committed(self, fact: Committed) -> Iterator[Problem]:
        """The commit record agrees with the log and its part, and the part's groups are whole."""
        try:
            commit = read_record(self.store, fact.commit, Commit)
            table = self._read(commit.part)
            check_scored(table)
        except (ValueError, ObjectNotFound) as error:
            yield Problem("part", fact.commit, f"commit {fact.commit} cannot be relied on: {error}")
            return
        true = describe_commit(
            self.run_id, commit.key, commit.part, table, created_at=commit.created_at
        )
        if commit != true or fact.commit != layout.commit_key(self.run_id, commit.key):
            sentence = f"commit {fact.commit} says other things than its part {commit.part.key}"
            yield Problem("commit", fact.commit, sentence)
        if (fact.group_ids, fact.episodes) != (true.group_ids, true.rows):
            sentence = f"the log has other groups or episodes in {fact.commit} than its part has"
            yield Problem("commit", fact.commit, sentence)
        yield from self._groups(table)

    def _groups(self, table: pa.Table) -> Iterator[Problem]:
        """Each group in the table is whole, and its episodes are of the draw that was admitted."""
        oldest, _ = policy_version_bounds(table)
        samples: dict[str, list[int]] = {}
        for row, version in zip(table.select(_IDENTITY).to_pylist(), oldest.tolist(), strict=True):
            group_id = row["group_id"]
            samples.setdefault(group_id, []).append(row["sample"])
            self.oldest[group_id] = min(version, self.oldest.get(group_id, version))
            if not self._is_of_its_draw(row):
                sentence = f"episode {row['episode_id']} is not of the draw that was admitted"
                yield Problem("episode", row["episode_id"], sentence)
        size = self.config["group_size"]
        for group_id, found in samples.items():
            if sorted(found) != list(range(size)):
                sentence = f"group {group_id} has samples {found} where 0 to {size - 1} are due"
                yield Problem("short_group", group_id, sentence)

    def _is_of_its_draw(self, row: dict[str, Any]) -> bool:
        group = self.ledger.groups.get(row["group_id"])
        if group is None or group.draw is None:
            return True  # Never admitted: the ledger has a problem for that.
        return row == {
            "episode_id": layout.episode_id(group.draw.group_id, row["sample"]),
            "run_id": self.run_id,
            "group_id": group.draw.group_id,
            "draw": group.draw.draw,
            "sample": row["sample"],
            "prompt_id": group.draw.prompt_id,
            "environment": group.draw.environment,
        }

    def step(self, fact: Step) -> Iterator[Problem]:
        """The ages of the step's groups, by their tokens, are within the bound and as logged."""
        name = f"step {fact.step}"
        bound = self.config["max_policy_age"]
        ages = {
            group_id: fact.step - 1 - self.oldest[group_id]
            for group_id in fact.group_ids
            if group_id in self.oldest
        }
        for group_id, age in ages.items():
            if age > bound:
                sentence = (
                    f"{name} trained on group {group_id} at age {age}; at most {bound} is allowed"
                )
                yield Problem("age", group_id, sentence)
            if age < 0:
                sentence = (
                    f"{name} trained on group {group_id}, which has tokens of a later version"
                )
                yield Problem("age", group_id, sentence)
        if not ages or len(ages) < len(fact.group_ids):
            return
        age_max, age_mean = max(ages.values()), sum(ages.values()) / len(ages)
        if fact.age_max != age_max or not _is_close(fact.age_mean, age_mean):
            sentence = (
                f"{name} was logged with ages up to {fact.age_max}, {fact.age_mean} on average; "
                f"its episodes have {age_max} and {age_mean}"
            )
            yield Problem("age", name, sentence)

    def evaluated(self, fact: Evaluated) -> Iterator[Problem]:
        """The scores are those of the parts, on prompts that were never drawn for training."""
        name = f"evaluation {fact.name}"
        try:
            tables = [self._read(part) for part in fact.parts]
            table = pa.concat_tables(tables).select(["sample", "prompt_id", "reward", "episode_id"])
            check_scored(table)
        except (ValueError, ObjectNotFound) as error:
            yield Problem("part", name, f"{name} cannot be relied on: {error}")
            return
        samples = table["sample"].to_numpy()
        for what, said, sample in (("sampled", fact.sampled, 0), ("greedy", fact.greedy, 1)):
            chosen = table.filter(pa.array(samples == sample))
            if chosen.num_rows != fact.num_prompts:
                sentence = (
                    f"{name} has {chosen.num_rows} {what} episodes for {fact.num_prompts} prompts"
                )
                yield Problem("evaluation", name, sentence)
            elif chosen.num_rows and not _is_close(said, reward_mean(chosen)):
                sentence = (
                    f"{name} was logged as {said} {what}; its episodes give {reward_mean(chosen)}"
                )
                yield Problem("evaluation", name, sentence)
        drawn = {group.draw.prompt_id for group in self.ledger.groups.values() if group.draw}
        for prompt_id in sorted(drawn & set(table["prompt_id"].to_pylist())):
            sentence = f"prompt {prompt_id} of {name} was drawn for training as well"
            yield Problem("held_out", prompt_id, sentence)

    def checkpoints(self) -> Iterator[Problem]:
        """The files of checkpoints are as written.

        One that is gone whole was pruned, unless it is to be kept.
        """
        ledger = self.ledger
        kept = {0, max(ledger.steps, default=0)} if ledger.status == "finished" else set()
        for step in sorted(kept - ledger.checkpoints.keys()):
            sentence = f"the run finished without a checkpoint of step {step}"
            yield Problem("checkpoint", f"step {step}", sentence)
        for step, fact in ledger.checkpoints.items():
            if step not in kept and not any(self.store.exists(file.key) for file in fact.files):
                self.counted["pruned_checkpoints"] += 1
                continue
            self.counted["checkpoints"] += 1
            for file in fact.files:
                try:
                    self.counted["bytes"] += len(read_file(self.store, file))
                except (ValueError, ObjectNotFound) as error:
                    yield Problem("checkpoint", file.key, str(error))

    def sources(self) -> Iterator[Problem]:
        """The user's code is as it was kept."""
        for source in self.ledger.sources:
            self.counted["sources"] += 1
            try:
                read_file(self.store, source.file)
            except (ValueError, ObjectNotFound) as error:
                yield Problem("source", source.file.key, str(error))

    def _read(self, part: PartRef) -> pa.Table:
        """The part's episodes, if it is as written and they make sense.

        Raises ObjectNotFound and ValueError.
        """
        table = read_part(self.store, part)
        check_table(table)
        self.counted["parts"] += 1
        self.counted["bytes"] += part.bytes
        self.counted["episodes"] += table.num_rows
        return table


def _is_close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
