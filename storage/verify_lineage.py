"""The part of `verify` about other runs: the one that a run was forked from, and those whose groups it replays.

What another run's log says is held against this one's for as long as the other run is in the store.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from storage import facts, layout
from storage.groups import Problem
from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from storage.objects import ObjectStore
from storage.tombstones import is_deleted


def lineage_problems(
    store: ObjectStore, run_id: str, config: dict[str, Any], ledger: Ledger
) -> Iterator[Problem]:
    """All that a run says of other runs and is not so."""
    others = _Others(store=store)
    yield from _forked(run_id, config, ledger, others)
    for fact in ledger.replayed:
        yield from _replayed(run_id, config, fact, others)


def replay_of(config: dict[str, Any]) -> dict[str, Any]:
    """The config's section about replays; empty unless the run replays."""
    section = config.get("replay")
    return section if isinstance(section, dict) else {}


def is_replay_whole(config: dict[str, Any]) -> bool:
    """Whether that section, if there is one, has what a run is held against."""
    section = config.get("replay")
    return section is None or (
        isinstance(section, dict)
        and isinstance(section.get("runs"), list)
        and isinstance(section.get("scores", layout.RUN_SCORES), str)
        and isinstance(section.get("epochs", 1), int)
    )


@dataclass(slots=True, kw_only=True)
class _Others:
    """The ledgers of other runs, each read once."""

    store: ObjectStore
    known: dict[str, Ledger | None] = field(default_factory=dict)

    def ledger(self, run_id: str) -> Ledger | None:
        """The ledger of another run; None if the store has it no more. Raises ValueError if it is unreadable."""
        if run_id not in self.known:
            is_there = self.store.exists(layout.config_key(run_id)) and not is_deleted(
                self.store, run_id
            )
            self.known[run_id] = (
                Ledger.fold(read_entries(self.store, run_id), read_incarnations(self.store, run_id))
                if is_there
                else None
            )
        return self.known[run_id]


def _forked(
    run_id: str, config: dict[str, Any], ledger: Ledger, others: _Others
) -> Iterator[Problem]:
    due = (config.get("parent_run_id"), config.get("parent_step"))
    forked = ledger.forked
    if forked is None:
        if due[0] is not None and (ledger.trained or ledger.status == "finished"):
            sentence = f"the config says to go on from step {due[1]} of run {due[0]}, and the log tells no fork"
            yield Problem("fork", run_id, sentence)
        return
    parent = forked.parent_run_id
    if due != (parent, forked.parent_step):
        sentence = (
            f"the log says that the run goes on from step {forked.parent_step} of run {parent}; "
            f"its config says step {due[1]} of run {due[0]}"
        )
        yield Problem("fork", run_id, sentence)
    base = 0 if replay_of(config) else forked.parent_step
    if forked.step != base:
        sentence = f"the run's steps begin after step {forked.step} where step {base} is due"
        yield Problem("fork", run_id, sentence)
    try:
        other = others.ledger(parent)
    except ValueError as error:
        yield Problem("fork", parent, f"run {parent}, from which this one goes on: {error}")
        return
    if other is None:
        return
    kept = other.checkpoints.get(forked.parent_step)
    if kept is None or (kept.key, kept.weights_digest) != (
        forked.checkpoint,
        forked.weights_digest,
    ):
        sentence = (
            f"the run goes on from checkpoint {forked.checkpoint} with weights {forked.weights_digest}, "
            f"and run {parent} has no such checkpoint of step {forked.parent_step}"
        )
        yield Problem("fork", forked.checkpoint, sentence)


def _replayed(
    run_id: str, config: dict[str, Any], fact: facts.Replayed, others: _Others
) -> Iterator[Problem]:
    section = replay_of(config)
    name = f"run {fact.run_id}"
    # Which runs collect for this one its config cannot say; `verify_rounds` looks at the claims.
    is_named = config.get("train_rounds") is True or fact.run_id in section.get("runs", ())
    if fact.run_id == run_id or not is_named:
        sentence = f"groups of {name} were replayed, which the config does not name"
        yield Problem("replayed", fact.run_id, sentence)
        return
    if fact.score_set != section.get("scores", layout.RUN_SCORES):
        sentence = (
            f"groups of {name} were replayed with scores {fact.score_set!r}; "
            f"the config says {section.get('scores', layout.RUN_SCORES)!r}"
        )
        yield Problem("replayed", fact.run_id, sentence)
    try:
        other = others.ledger(fact.run_id)
    except ValueError as error:
        yield Problem("replayed", fact.run_id, f"{name}, whose groups were replayed: {error}")
        return
    if other is None:
        return
    for draw in fact.draws:
        group = other.groups.get(draw.group_id)
        if group is None or group.draw != draw or fact.commit not in other.commits:
            is_so = "never drew it so"
            if group is not None and group.draw == draw:
                is_so = f"never committed {fact.commit}"
            sentence = f"group {draw.group_id} was replayed of {name}, whose log {is_so}"
            yield Problem("replayed", draw.group_id, sentence)
        elif group.commit != fact.commit:
            sentence = f"group {draw.group_id} was replayed from {fact.commit}; {name} committed it as {group.commit}"
            yield Problem("replayed", draw.group_id, sentence)
