"""The part of `verify` that opens parts: episodes, commits, evaluations, and the user's code.

Each part is opened once. What a part tells about its groups is kept until the steps are checked.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage import layout
from storage.annotations import read_scores
from storage.compaction import check_compaction
from storage.episodes import Figures, check_scored, check_table
from storage.facts import Committed, Evaluated, Generated, Replayed
from storage.groups import Problem
from storage.ledger import Ledger
from storage.objects import ObjectNotFound, ObjectStore
from storage.parts import CommitReader, describe_commit, read_file, read_part
from storage.places import newest_places, read_compactions
from storage.records import Commit, PartRef, read_record
from storage.verify_evaluations import evaluation_problems
from storage.verify_groups import Groups


def file_problems(
    store: ObjectStore, run_id: str, config: dict[str, Any], ledger: Ledger, counted: Counter[str]
) -> Iterator[Problem]:
    """All that is wrong with the files that the ledger names, but for checkpoints."""
    audit = _Audit(
        store=store,
        run_id=run_id,
        ledger=ledger,
        counted=counted,
        reader=CommitReader(store),
        groups=Groups(run_id=run_id, config=config, ledger=ledger),
    )
    for generated in ledger.generated:
        yield from audit.generated(generated)
    for committed in ledger.committed:
        yield from audit.committed(committed)
    for replayed in ledger.replayed:
        yield from audit.replayed(replayed)
    yield from audit.groups.problems()
    yield from audit.compactions()
    for evaluated in ledger.evaluated.values():
        yield from audit.evaluated(evaluated)
    yield from audit.sources()


@dataclass(slots=True, kw_only=True)
class _Audit:
    store: ObjectStore
    run_id: str
    ledger: Ledger
    counted: Counter[str]
    reader: CommitReader
    groups: Groups
    commits: dict[str, Commit] = field(default_factory=dict)
    """Commits of the run that could be read, by their name."""

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
            commit, table = self._commit(fact.commit)
        except (ValueError, ObjectNotFound) as error:
            yield Problem("part", fact.commit, f"commit {fact.commit} cannot be relied on: {error}")
            return
        yield from self._record(self.run_id, fact.commit, commit, table)
        is_as_logged = hashlib.sha256(commit.to_bytes()).hexdigest() == fact.sha256
        if fact.sha256 is not None and not is_as_logged:
            sentence = (
                f"commit {fact.commit} is another record than the log says: its SHA-256 differs"
            )
            yield Problem("commit", fact.commit, sentence)
        self.commits[commit.key] = commit
        is_so = Figures.of(table)
        if (fact.group_ids, fact.episodes) != (is_so.group_ids, is_so.rows):
            sentence = f"the log has other groups or episodes in {fact.commit} than its part has"
            yield Problem("commit", fact.commit, sentence)
        if fact.bytes not in (None, commit.part.bytes):
            sentence = f"the log says {fact.bytes} bytes of {fact.commit}, whose part has {commit.part.bytes}"
            yield Problem("commit", fact.commit, sentence)
        if fact.score_set != layout.RUN_SCORES:
            sentence = f"{fact.commit} was committed with scores {fact.score_set!r}, not the run's"
            yield Problem("commit", fact.commit, sentence)
        yield from self.groups.add(table, None)

    def replayed(self, fact: Replayed) -> Iterator[Problem]:
        """The other run's commit is as it made it, and holds all of the groups that were taken from it."""
        try:
            layout.check_run_id(fact.run_id)
            commit, table = self._commit(fact.commit)
            scores = None
            if fact.score_set != layout.RUN_SCORES:
                scores = read_scores(self.store, commit, fact.score_set)
        except (ValueError, ObjectNotFound) as error:
            sentence = (
                f"commit {fact.commit}, of which groups were replayed, cannot be relied on: {error}"
            )
            yield Problem("part", fact.commit, sentence)
            return
        yield from self._record(fact.run_id, fact.commit, commit, table)
        group_ids = pa.array([draw.group_id for draw in fact.draws], pa.string())
        chosen = table.filter(pc.is_in(table["group_id"], group_ids))
        there = set(chosen["group_id"].unique().to_pylist())
        for draw in fact.draws:
            if draw.group_id not in there:
                sentence = f"group {draw.group_id} was replayed from {fact.commit}, which has no episode of it"
                yield Problem("replayed", draw.group_id, sentence)
        yield from self.groups.add(chosen, scores, size=fact.group_size)

    def _commit(self, key: str) -> tuple[Commit, pa.Table]:
        """A commit record and its episodes, wherever they lie by now."""
        commit = read_record(self.store, key, Commit)
        table = self.reader.read(commit)
        check_table(table)
        check_scored(table)
        self._count(commit.part)
        return commit, table

    def _record(self, run_id: str, key: str, commit: Commit, table: pa.Table) -> Iterator[Problem]:
        """The record is the one that a run would make of these episodes."""
        true = describe_commit(run_id, commit.key, commit.part, table, created_at=commit.created_at)
        if commit != true or key != layout.commit_key(run_id, commit.key):
            sentence = f"commit {key} says other things than its part {commit.part.key}"
            yield Problem("commit", key, sentence)

    def compactions(self) -> Iterator[Problem]:
        """The rows that readers will find once a commit's own part is gone are the commit's."""
        try:
            compactions = read_compactions(self.store, self.run_id)
            places = newest_places(compactions)
        except (ValueError, LookupError) as error:
            sentence = f"the compactions of the run cannot be relied on: {error}"
            yield Problem("compaction", layout.compactions_folder(self.run_id), sentence)
            return
        for compaction in compactions:
            self.counted["compactions"] += 1
            key = layout.compaction_key(self.run_id, compaction.number)
            # What a newer one holds as well may be gone from this one.
            commits = [
                self.commits[each.commit]
                for each in compaction.commits
                if each.commit in self.commits
                and compaction.parts[each.part] == places[each.commit].part
            ]
            try:
                check_compaction(self.store, compaction, commits)
            except (ValueError, ObjectNotFound) as error:
                yield Problem("compaction", key, f"compaction {key} cannot be relied on: {error}")

    def evaluated(self, fact: Evaluated) -> Iterator[Problem]:
        """The scores are those of the parts, which hold every prompt's answers."""
        name = f"evaluation {fact.name}"
        try:
            tables = [self._read(part) for part in fact.parts]
            table = pa.concat_tables(tables)
            check_table(table)
            check_scored(table)
        except (ValueError, ObjectNotFound) as error:
            yield Problem("part", name, f"{name} cannot be relied on: {error}")
            return
        yield from evaluation_problems(self.run_id, self.ledger, fact, table)

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
        self._count(part)
        return table

    def _count(self, part: PartRef) -> None:
        self.counted["parts"] += 1
        self.counted["bytes"] += part.bytes
        self.counted["episodes"] += part.rows
