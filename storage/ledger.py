"""The ledger: what a run's log adds up to. A pure fold, which keeps no state of its own anywhere.

It raises nothing: where a fact cannot be true after the facts before it, it is taken as it is and a `Problem` is kept.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from storage import facts
from storage.groups import Groups, GroupState, Problem
from storage.packed import Index, ListIndex, PackedIntervals, PackedRecords
from storage.records import Incarnation


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Groups, steps and counters of a run.

    Example:
        ledger = Ledger.fold(read_entries(store, run_id), read_incarnations(store, run_id))
        ledger.add(log.append(...))
    """

    incarnations: tuple[Incarnation, ...]
    """All incarnations of the run."""
    groups: Groups = field(init=False)
    """By id, in order of first mention."""
    trained: PackedRecords[facts.Step] = field(init=False)
    """Every training of a step in order, retrainings among them."""
    steps: Index[int, facts.Step] = field(init=False)
    """By number, as last trained."""
    current_step: int = 0
    """Step that was completed last; smaller than the largest one while steps are trained again."""
    forked_steps: set[int] = field(default_factory=set)
    """Steps whose retraining gave other weights."""
    batches: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Groups that were batched, by step."""
    buffered: Index[int, facts.Batched] = field(init=False)
    """The same of a run with a buffer, with what it was given then, by step."""
    _buffered: PackedRecords[facts.Batched] = field(init=False, repr=False)
    released: dict[int, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """Groups that left the buffer, by step and reason."""
    dropped_in: dict[int, list[str]] = field(default_factory=dict)
    """Groups that were considered for a step and dropped, by step."""
    advantages: dict[int, dict[str, float] | None] = field(default_factory=dict)
    """Advantages that a loop of the user's gave to the episodes of a batch, by step."""
    base_step: int = 0
    """Step after which the run began; above 0 only in a fork."""
    forked: facts.Forked | None = None
    """Where the run came from, if it is a fork."""
    restored: list[facts.Restored] = field(default_factory=list)
    """Checkpoints that incarnations went on from, in order."""
    nonfinite: Counter[int] = field(default_factory=Counter)
    """How often a batch was given up for a loss or gradient that was not finite, by step."""
    estimates: dict[int, dict[str, facts.Estimated]] = field(default_factory=dict)
    """What reference and critic said of the batches of steps, by what it is."""
    nonfinite_in_a_row: int = 0
    """Such batches since a step was completed."""
    spare: dict[int, list[facts.Admitted]] = field(default_factory=dict)
    """Rounds of draws beyond those that were planned, by the step that they fill up, in order."""
    last_round: int = -1
    """Largest number of a round of generation."""
    weights: dict[int, str] = field(default_factory=dict)
    """Digest of the weights by policy version."""
    last_at: dict[int, float] = field(default_factory=dict)
    """Unix seconds of the last entry, by incarnation."""
    generated: PackedRecords[facts.Generated] = field(init=False)
    """Parts that were generated, in order."""
    generated_in: ListIndex[int, facts.Generated] = field(init=False)
    """The same by round."""
    committed: PackedRecords[facts.Committed] = field(init=False)
    """All of them, in order."""
    committed_in: ListIndex[int, facts.Committed] = field(init=False)
    """The same by round."""
    commits: Index[str, facts.Committed] = field(init=False)
    """The same by the key of their commit record."""
    replayed: list[facts.Replayed] = field(default_factory=list)
    """All of them, in order."""
    published: PackedRecords[facts.Published] = field(init=False)
    """All of them, in order."""
    evaluated: dict[str, facts.Evaluated] = field(default_factory=dict)
    """By name, as last evaluated."""
    checkpoints: dict[int, facts.Checkpoint] = field(default_factory=dict)
    """By step, as last written; pruned ones among them."""
    pruned: set[int] = field(default_factory=set)
    """Steps whose checkpoints may be gone."""
    diverged: list[facts.Diverged] = field(default_factory=list)
    """All of them, in order."""
    retries: list[facts.Retry] = field(default_factory=list)
    """All of them, in order."""
    failures: list[facts.Failed] = field(default_factory=list)
    """All of them, in order."""
    replicas: dict[str, facts.Replica] = field(default_factory=dict)
    """By mesh, what it did in the incarnation that told last."""
    sources: list[facts.Source] = field(default_factory=list)
    """Code of the user's, of all incarnations."""
    meshes: dict[str, PackedIntervals] = field(default_factory=dict)
    """Intervals by mesh, in order."""
    ended: set[int] = field(default_factory=set)
    """Incarnations that ended in order."""
    end: facts.End | None = None
    """How the newest incarnation with entries ended; None if not in order, or not yet."""
    problems: list[Problem] = field(default_factory=list)
    """Facts that cannot be true after those before them."""

    def __post_init__(self) -> None:
        self.groups = Groups(self.problems)
        self._buffered = PackedRecords(facts.Batched)
        self.buffered = Index(self._buffered)
        self.trained = PackedRecords(facts.Step)
        self.steps = Index(self.trained)
        self.published = PackedRecords(facts.Published)
        self.generated = PackedRecords(facts.Generated)
        self.generated_in = ListIndex(self.generated)
        self.committed = PackedRecords(facts.Committed)
        self.committed_in = ListIndex(self.committed)
        self.commits = Index(self.committed)

    @classmethod
    def fold(cls, entries: Iterable[facts.Entry], incarnations: Iterable[Incarnation]) -> Self:
        """The ledger after all these entries."""
        ledger = cls(incarnations=tuple(incarnations))
        for entry in entries:
            ledger.add(entry)
        return ledger

    def add(self, entry: facts.Entry) -> None:
        """Take one more entry into account."""
        if all(isinstance(fact, facts.Sealed) for fact in entry.facts):
            return
        if entry.incarnation not in self.last_at:
            self.end = None
        self.last_at[entry.incarnation] = entry.at
        for fact in entry.facts:
            self._add_fact(fact)

    @property
    def status(self) -> str:
        """'finished', 'paused', 'failed' or 'cancelled' if the newest incarnation says so, else 'running'."""
        newest = len(self.incarnations) - 1
        return "running" if self.end is None or newest not in self.last_at else self.end.status

    @property
    def dropped(self) -> Counter[str]:
        """Number of dropped groups by reason."""
        return Counter(group.reason for group in self.groups.values() if group.reason is not None)

    @property
    def pending(self) -> list[str]:
        """Ids of the groups that are admitted and neither trained nor dropped."""
        return [
            group_id
            for group_id, group in self.groups.items()
            if group.draw is not None and not group.state.is_terminal()
        ]

    def considered(self, step: int) -> list[str]:
        """Groups that were considered for a step that has its batch: batched or dropped, in the order of their ids.

        In a run with a buffer: those that it was given or that were dropped, and not those that are used again.
        """
        own = self.batches.get(step, ())
        if (buffered := self.buffered.get(step)) is not None:
            own = tuple(kept.group_id for kept in buffered.kept or ())
        return sorted([*own, *self.dropped_in.get(step, ())])

    @property
    def last_step(self) -> int:
        """The largest step that was ever completed, or the one that the run began after."""
        return max(self.steps, default=self.base_step)

    @property
    def served_version(self) -> int:
        """Version that was published last."""
        return self.published[-1].policy_version if self.published else self.base_step

    @property
    def total_seconds(self) -> float:
        """From the first claim to the last entry (or claim), in seconds."""
        if not self.incarnations:
            return 0.0
        first_claim = self.incarnations[0].controller.claimed_at
        return self.last_seen(len(self.incarnations) - 1) - first_claim

    @property
    def down_seconds(self) -> float:
        """From each incarnation's last entry (or claim) to the next one's claim, in seconds."""
        claims = [incarnation.controller.claimed_at for incarnation in self.incarnations]
        return math.fsum(claim - self.last_seen(number) for number, claim in enumerate(claims[1:]))

    def last_seen(self, number: int) -> float:
        """Unix seconds of the last sign of an incarnation."""
        return self.last_at.get(number, self.incarnations[number].controller.claimed_at)

    def _add_fact(self, fact: facts.Fact) -> None:
        match fact:
            case facts.Started():
                self.sources.extend(fact.sources)
                for mesh in fact.meshes:
                    self.meshes.setdefault(mesh, PackedIntervals())
            case facts.Forked():
                self._fork(fact)
            case facts.Restored():
                self._restore(fact)
            case facts.Admitted():
                self.last_round = max(self.last_round, fact.round)
                if fact.step is not None:
                    self.spare.setdefault(fact.step, []).append(fact)
                for draw in fact.draws:
                    self.groups.admit(draw)
            case facts.Replayed():
                self.replayed.append(fact)
                self.groups.replay(fact)
            case facts.Generated():
                self.last_round = max(self.last_round, fact.round)
                self.generated.append(fact)
                self.generated_in.note_newest(fact.round)
                for group_id in fact.group_ids:
                    group = self.groups.reach(group_id, GroupState.GENERATED)
                    group.policy_version = fact.policy_version_min
            case facts.Committed():
                self._commit(fact)
            case facts.HandedOver():
                for group_id in fact.group_ids:
                    self.groups.hand_over(group_id, fact.to_run)
            case facts.Dropped():
                self._drop(fact)
                if fact.reason == "nonfinite" and fact.step is not None:
                    self._give_up_batch(fact.step)
            case facts.Estimated():
                self._estimate(fact)
            case facts.Batched():
                self._batch(fact)
            case facts.Released():
                self._release(fact)
            case facts.Step():
                self._step(fact)
            case facts.Diverged():
                self.diverged.append(fact)
            case facts.Published():
                self.published.append(fact)
                self._see_weights(fact.policy_version, fact.weights_digest, "published")
            case facts.WarmStarted():
                self.weights[0] = fact.weights_digest
            case facts.Evaluated():
                self.evaluated[fact.name] = fact
            case facts.Checkpoint():
                self.checkpoints[fact.step] = fact
                self.pruned.discard(fact.step)
                self._see_weights(fact.step, fact.weights_digest, "in the checkpoint")
            case facts.Pruned():
                self.pruned.update(fact.steps)
            case facts.Failed():
                self.failures.append(fact)
            case facts.Replica():
                self.replicas[fact.mesh] = fact
            case facts.Retry():
                self.retries.append(fact)
            case facts.Intervals():
                self.meshes.setdefault(fact.mesh, PackedIntervals()).extend(fact.intervals)
            case facts.End():
                self.end = fact
                self.ended.add(max(self.last_at))

    def _fork(self, fact: facts.Forked) -> None:
        if self.forked not in (None, fact) or self.steps:
            self._object("forked", fact.parent_run_id, "the run was forked after it had begun")
            return
        self.forked = fact
        self.base_step = self.current_step = fact.step
        self.weights[fact.step] = fact.weights_digest

    def _restore(self, fact: facts.Restored) -> None:
        self.restored.append(fact)
        written = self.checkpoints.get(fact.step)
        name = f"step {fact.step}"
        if written is None:
            self._object("restored", name, f"{name} was restored, and no checkpoint of it is known")
        elif written.weights_digest != fact.weights_digest:
            sentence = f"the weights restored of {name} are not those of its checkpoint"
            self._object("restored", name, sentence)
        self.current_step = fact.step

    def _commit(self, fact: facts.Committed) -> None:
        self.committed.append(fact)
        self.commits.note_newest(fact.commit)
        self.committed_in.note_newest(fact.round)
        self.groups.commit(fact)

    def _drop(self, fact: facts.Dropped) -> None:
        if fact.step is not None:
            self.dropped_in.setdefault(fact.step, []).extend(fact.group_ids)
        for group_id in fact.group_ids:
            self.groups.drop(group_id, fact)

    def _estimate(self, fact: facts.Estimated) -> None:
        name = f"step {fact.step}"
        if fact.step not in self.batches:
            self._object("estimated", name, f"{fact.what} were told of {name}, which had no batch")
        elif fact.what in self.estimates.get(fact.step, {}):
            self._object("estimated", name, f"{fact.what} were told twice of the batch of {name}")
        if fact.weights_step >= fact.step:
            sentence = f"{fact.what} of {name} are of weights of step {fact.weights_step}"
            self._object("estimated", name, sentence)
        self.estimates.setdefault(fact.step, {})[fact.what] = fact

    def _give_up_batch(self, step: int) -> None:
        if step not in self.batches or step <= self.current_step:
            sentence = f"the batch of step {step} was given up as nonfinite, and there was none to train on"
            self._object("nonfinite", f"step {step}", sentence)
        self.batches.pop(step, None)
        self.advantages.pop(step, None)
        self.estimates.pop(step, None)
        self.nonfinite[step] += 1
        self.nonfinite_in_a_row += 1

    def _batch(self, fact: facts.Batched) -> None:
        self.batches[fact.step] = fact.group_ids
        self.advantages[fact.step] = fact.advantages
        if fact.kept is not None:
            self._buffered.append(fact)
            self.buffered.note_newest(fact.step)
        for group_id in fact.group_ids:
            self.groups.batch(group_id, fact.step)

    def _release(self, fact: facts.Released) -> None:
        self.released.setdefault(fact.step, {})[fact.reason] = fact.group_ids
        for group_id in fact.group_ids:
            self.groups.release(group_id, fact)

    def _step(self, fact: facts.Step) -> None:
        self.nonfinite_in_a_row = 0
        name = f"step {fact.step}"
        if fact.step > self.current_step + 1:
            self._object("step_order", name, f"{name} came after step {self.current_step}")
        if fact.policy_version != fact.step:
            sentence = f"{name} made policy version {fact.policy_version} instead of {fact.step}"
            self._object("policy_version", name, sentence)
        if self.batches.get(fact.step, fact.group_ids) != fact.group_ids:
            self._object("batch", name, f"{name} trained on other groups than were batched for it")
        self._retrain(fact, name)
        for group_id in fact.group_ids:
            self.groups.train(group_id, fact.step)
        self.trained.append(fact)
        self.steps.note_newest(fact.step)
        self.current_step = fact.step
        self.weights[fact.policy_version] = fact.weights_digest

    def _retrain(self, fact: facts.Step, name: str) -> None:
        earlier = self.steps.get(fact.step, fact)
        if earlier.group_ids != fact.group_ids:
            self._object(
                "retraining", name, f"{name} was trained again on other groups than before"
            )
        if earlier.weights_digest != fact.weights_digest:
            self.forked_steps.add(fact.step)

    def _see_weights(self, policy_version: int, digest: str, where: str) -> None:
        known = self.weights.get(policy_version)
        name = f"policy version {policy_version}"
        if known is None and policy_version > 0:
            self._object("weights", name, f"{name} was {where} before any step made it")
        elif known not in (None, digest):
            self._object(
                "weights", name, f"the weights of {name} {where} are not those it was given"
            )
        self.weights.setdefault(policy_version, digest)

    def _object(self, kind: str, offender: str, sentence: str) -> None:
        self.problems.append(Problem(kind, offender, sentence))
