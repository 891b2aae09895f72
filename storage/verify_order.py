"""The part of `verify` that follows a log in its order: what may not come after what.

    restored at step c ──▶ steps c + 1 to s again, in order ──▶ draws, step s + 1

s is the last step that the log had. Where only the trainer was started again, within an incarnation, generators go on
and draws are admitted as before: what steps are owed is in batches already, so that no slot comes back too early. What
the ledger sees of order it reports itself.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from storage import facts, layout
from storage.groups import Problem

_Once = (
    facts.Generated
    | facts.Committed
    | facts.Published
    | facts.Evaluated
    | facts.Retry
    | facts.Failed
)
"""Facts that name a part or a measured time, so that no two are alike."""


def order_problems(
    run_id: str, entries: Iterable[facts.Entry], *, most_pending: int
) -> Iterator[Problem]:
    """All that comes too late, too early, too often, or at once with too much else."""
    order = _Order(run_id=run_id)
    for entry in entries:
        key = layout.entry_key(run_id, entry.incarnation, entry.seq)
        order.enter(entry.incarnation)
        for fact in entry.facts:
            yield from order.take(fact, key)
    if len(order.warm_digests) > 1 and order.diverged.isdisjoint((None, 0)):
        sentence = "the warm start was made again and gave other weights, and the log records no divergence"
        yield Problem("warm_start", run_id, sentence)
    if order.most_pending > most_pending:
        sentence = (
            f"{order.most_pending} groups were pending at once; the age bound allows {most_pending}"
        )
        yield Problem("admission", run_id, sentence)


@dataclass(slots=True, kw_only=True)
class _Order:
    """What the log has said so far."""

    run_id: str
    incarnation: int = 0
    has_weights: bool = True
    """Whether the incarnation has told where its trainer's weights come from; the first one makes them."""
    is_forked: bool = False
    base_step: int = 0
    current_step: int = 0
    trained: set[int] = field(default_factory=set)
    owed: set[int] = field(default_factory=set)
    """Steps to be trained again before anything new."""
    may_admit: bool = True
    """Whether draws may be admitted while steps are owed: only the trainer was started again."""
    has_begun: bool = False
    """Whether the incarnation's trainer has had weights."""
    warm_digests: set[str] = field(default_factory=set)
    diverged: set[int | None] = field(default_factory=set)
    checkpoints: set[int] = field(default_factory=set)
    """Steps of checkpoints that are not pruned."""
    pruned: set[int] = field(default_factory=set)
    """Steps of those that are."""
    committed: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    """Groups of the run's own draws that are neither trained nor dropped."""
    most_pending: int = 0
    seen: dict[facts.Fact, str] = field(default_factory=dict)
    """Keys of the entries that first told facts which are told once."""

    def enter(self, incarnation: int) -> None:
        """The entries that follow are this incarnation's."""
        if incarnation != self.incarnation:
            self.incarnation, self.has_weights, self.has_begun = incarnation, False, False

    def take(self, fact: facts.Fact, key: str) -> Iterator[Problem]:
        """The next fact, of the entry with this key."""
        if isinstance(fact, _Once):
            first = self.seen.setdefault(fact, key)
            if first != key:
                sentence = f"{key} says of {fact.kind} what {first} has said already, word for word"
                yield Problem("doubled", key, sentence)
        match fact:
            case facts.Admitted() | facts.Replayed():
                yield from self._admit(fact)
            case facts.Generated():
                for group_id in self.committed.intersection(fact.group_ids):
                    sentence = f"group {group_id} was generated again after it was committed"
                    yield Problem("generated_again", group_id, sentence)
            case facts.Committed():
                self.committed.update(fact.group_ids)
            case facts.Dropped() | facts.HandedOver():
                self.pending.difference_update(fact.group_ids)
            case facts.Batched():
                # What a buffer was given waits for no step of its own; the buffer bounds its age.
                self.pending.difference_update(kept.group_id for kept in fact.kept or ())
            case facts.Step():
                yield from self._step(fact)
            case facts.Forked() | facts.WarmStarted() | facts.Restored():
                yield from self._weights(fact)
            case facts.Diverged():
                self.diverged.add(fact.step)
            case facts.Checkpoint():
                self.checkpoints.add(fact.step)
                self.pruned.discard(fact.step)
            case facts.Pruned():
                yield from self._prune(fact)

    def _admit(self, fact: facts.Admitted | facts.Replayed) -> Iterator[Problem]:
        if isinstance(fact, facts.Admitted):
            self.pending.update(draw.group_id for draw in fact.draws)
            self.most_pending = max(self.most_pending, len(self.pending))
        if self.may_admit:
            return
        for draw in fact.draws:
            yield from self._owing(f"group {draw.group_id} was admitted", draw.group_id)

    def _owing(self, what: str, offender: str) -> Iterator[Problem]:
        """Something new happened: nothing may be owed by then. Told once."""
        if self.owed:
            steps = ", ".join(map(str, sorted(self.owed)))
            sentence = f"{what} before steps {steps} were trained again after step {self.current_step} was restored"
            self.owed.clear()
            yield Problem("provisional", offender, sentence)

    def _step(self, fact: facts.Step) -> Iterator[Problem]:
        name = f"step {fact.step}"
        if not self.has_weights:
            sentence = f"{name} was trained by incarnation {self.incarnation}, which had restored no checkpoint before"
            yield Problem("restored", name, sentence)
            self.has_weights = True
        if fact.step <= self.base_step:
            sentence = f"{name} was trained in a run that goes on from step {self.base_step} of another one"
            yield Problem("fork", name, sentence)
        elif fact.step <= self.current_step:
            sentence = f"{name} was trained again, and no checkpoint of an earlier step was restored before"
            yield Problem("retraining", name, sentence)
        if fact.step not in self.trained:
            yield from self._owing(f"{name} was trained", name)
        self.owed.discard(fact.step)
        self.has_begun = True
        self.trained.add(fact.step)
        self.current_step = fact.step
        self.pending.difference_update(fact.group_ids)

    def _weights(
        self, fact: facts.Forked | facts.WarmStarted | facts.Restored
    ) -> Iterator[Problem]:
        step = 0 if isinstance(fact, facts.WarmStarted) else fact.step
        if isinstance(fact, facts.Forked):
            self.is_forked, self.base_step = True, step
        if isinstance(fact, facts.Restored) and step in self.pruned:
            sentence = f"step {step} was restored, whose checkpoint was pruned before"
            yield Problem("restored", f"step {step}", sentence)
        if isinstance(fact, facts.WarmStarted):
            if self.is_forked or self.trained:
                sentence = "the run was warm-started although it had weights already"
                yield Problem("warm_start", self.run_id, sentence)
            self.warm_digests.add(fact.weights_digest)
        self.owed = {trained for trained in self.trained if trained > step}
        self.current_step = step
        self.may_admit, self.has_begun = self.has_begun, True
        self.has_weights = True

    def _prune(self, fact: facts.Pruned) -> Iterator[Problem]:
        for step in fact.steps:
            name = f"step {step}"
            if step not in self.checkpoints:
                yield Problem(
                    "pruned", name, f"a checkpoint of {name} was pruned that was not there"
                )
            elif step in (self.base_step, max(self.checkpoints)):
                which = "first" if step == self.base_step else "last"
                sentence = (
                    f"the checkpoint of {name} was pruned, which is the {which} one and to be kept"
                )
                yield Problem("pruned", name, sentence)
            self.checkpoints.discard(step)
            self.pruned.add(step)
