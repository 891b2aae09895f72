"""Verification of a run from its parts and its log alone.

    verify_log           claims and entries      verify_files         parts, commits, the user's code
    verify_order         what follows what       verify_groups        whole, of the right age, with a signal
    verify_lineage       what other runs say     verify_evaluations   means and held-out prompts
    verify_checkpoints   files and weights       verify_weights       the digest of weights
    verify_rounds        collected apart         verify_buffer        trained on again
    verify_estimates     what reference and critic said

Every number that anyone might quote is recomputed: from the episodes where they tell it, from the
log otherwise. Commit records, facts about parts and run.json are held against that and never
believed. What is wrong is a `Problem`, one sentence each; a sound run has none.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from storage import layout, log
from storage.facts import Entry, Started
from storage.groups import Problem
from storage.ledger import Ledger
from storage.objects import ObjectNotFound, ObjectStore
from storage.runs import read_config
from storage.summary import ADDED_LATER, summarize
from storage.verify_buffer import buffer_problems, most_uses
from storage.verify_checkpoints import checkpoint_problems
from storage.verify_estimates import estimate_problems
from storage.verify_evaluations import evaluate_only_problems
from storage.verify_files import file_problems
from storage.verify_lineage import is_replay_whole, lineage_problems, replay_of
from storage.verify_log import log_problems
from storage.verify_order import order_problems
from storage.verify_rounds import is_whole, round_problems

_LIMITS = ("group_size", "groups_per_step", "max_policy_age")
"""Whole numbers in the config that a run is held against."""

_CLOCK_SECONDS = 1e-6
"""Intervals may overlap by less than a clock can tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `verify` looked at and what it found."""

    counted: Counter[str] = field(default_factory=Counter)
    """How many things of each sort were checked."""
    problems: list[Problem] = field(default_factory=list)
    """All that is wrong, in the order of the checks."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(store: ObjectStore, run_id: str) -> Report:
    """Check all that the store says about a run, writing nothing.

    Raises ValueError if the store has no such run; whatever else is wrong is in the report.
    """
    report = Report()
    try:
        config = read_config(store, run_id)
    except ValueError as error:
        if not store.keys(layout.incarnations_folder(run_id)):
            raise
        key = layout.config_key(run_id)
        report.problems.append(Problem("config", key, f"{key} cannot be relied on: {error}"))
        return report
    missing = [key for key in _LIMITS if not isinstance(config.get(key), int)]
    if missing or not is_replay_whole(config) or not is_whole(config):
        what = ", ".join(missing or ["whole replay or rounds"])
        sentence = f"the config of run {run_id} sets no {what}: nothing can be checked"
        report.problems.append(Problem("config", layout.config_key(run_id), sentence))
        return report
    try:
        incarnations = log.read_incarnations(store, run_id)
    except ValueError as error:
        report.problems.append(Problem("incarnation", run_id, str(error)))
        return report
    entries: list[Entry] = []
    report.problems.extend(log_problems(store, run_id, incarnations, entries))
    ledger = Ledger.fold(entries, incarnations)
    _count(report.counted, ledger, entries)
    report.problems.extend(ledger.problems)
    most = (config["max_policy_age"] + 1) * config["groups_per_step"]
    report.problems.extend(order_problems(run_id, entries, most_pending=most))
    report.problems.extend(_config_problems(store, run_id, entries))
    report.problems.extend(lineage_problems(store, run_id, config, ledger))
    report.problems.extend(round_problems(store, run_id, config, ledger))
    report.problems.extend(_group_problems(run_id, config, ledger))
    report.problems.extend(buffer_problems(config, ledger))
    report.problems.extend(file_problems(store, run_id, config, ledger, report.counted))
    report.problems.extend(estimate_problems(store, config, ledger, report.counted))
    trains = config.get("collect") is None and not config.get("evaluate_only")
    report.problems.extend(
        checkpoint_problems(store, run_id, ledger, report.counted, trains=trains)
    )
    if config.get("evaluate_only"):
        report.problems.extend(evaluate_only_problems(ledger))
    report.problems.extend(_interval_problems(ledger))
    report.problems.extend(_run_json_problems(store, run_id, config, ledger))
    return report


def _count(counted: Counter[str], ledger: Ledger, entries: list[Entry]) -> None:
    counted["incarnations"] = len(ledger.incarnations)
    counted["entries"] = len(entries)
    counted["facts"] = sum(len(entry.facts) for entry in entries)
    counted["groups"] = len(ledger.groups)
    counted["steps"] = len(ledger.steps)
    if ledger.buffered:
        counted["uses"] = sum(len(fact.group_ids) for fact in ledger.buffered.values())
    counted["retries"] = len(ledger.retries)
    counted["failures"] = len(ledger.failures)


def _config_problems(
    store: ObjectStore, run_id: str, entries: Iterable[Entry]
) -> Iterator[Problem]:
    """The config is the one that the run was started with."""
    key = layout.config_key(run_id)
    sha256 = hashlib.sha256(store.read(key)).hexdigest()
    for entry in entries:
        for fact in entry.facts:
            if isinstance(fact, Started) and fact.config_sha256 not in (None, sha256):
                sentence = (
                    f"{key} is not the config that incarnation {entry.incarnation} started with"
                )
                yield Problem("config", key, sentence)


def _group_problems(run_id: str, config: dict[str, Any], ledger: Ledger) -> Iterator[Problem]:
    """Groups that were used too often, forgotten or misnamed, and steps that are other than they say."""
    max_uses = replay_of(config).get("epochs", most_uses(config))
    for group_id, group in ledger.groups.items():
        if len(group.steps) > max_uses:
            steps = ", ".join(map(str, group.steps))
            sentence = (
                f"group {group_id} was trained on at steps {steps} and may be used {max_uses}x"
            )
            yield Problem("trained_twice", group_id, sentence)
        owner = group.run_id or run_id
        if group.draw is not None and group_id != layout.group_id(owner, group.draw.draw):
            sentence = f"group {group_id} is not named after draw {group.draw.draw} of run {owner}"
            yield Problem("group_id", group_id, sentence)
    score_set = replay_of(config).get("scores", layout.RUN_SCORES)
    for fact in ledger.trained:
        for group_id, times in Counter(fact.group_ids).items():
            if times > 1:
                sentence = f"group {group_id} is in the batch of step {fact.step} {times} times"
                yield Problem("trained_twice", group_id, sentence)
        if fact.score_set != score_set:
            sentence = f"step {fact.step} used scores {fact.score_set!r}, not {score_set!r}"
            yield Problem("score", f"step {fact.step}", sentence)
    if ledger.status in ("finished", "paused"):
        for group_id in ledger.pending:
            sentence = (
                f"group {group_id} is neither trained on nor dropped, and the run {ledger.status}"
            )
            yield Problem("pending", group_id, sentence)
    for step in sorted(ledger.forked_steps - {fact.step for fact in ledger.diverged}):
        sentence = f"step {step} was trained again with other weights, and the log records no fork"
        yield Problem("fork", f"step {step}", sentence)


def _interval_problems(ledger: Ledger) -> Iterator[Problem]:
    """Intervals that end before they start, overlap, or cover more time than there was."""
    up_seconds = ledger.total_seconds - ledger.down_seconds
    for mesh, intervals in ledger.meshes.items():
        for each in intervals:
            if each.end < each.start:
                sentence = (
                    f"mesh {mesh} logged an interval of {each.kind} that ends before it starts"
                )
                yield Problem("interval", mesh, sentence)
        for left, right in pairwise(sorted(intervals, key=lambda each: (each.start, each.end))):
            if right.start < left.end - _CLOCK_SECONDS:
                sentence = (
                    f"intervals of mesh {mesh} overlap: {left.kind} to {left.end:.6f} "
                    f"and {right.kind} from {right.start:.6f}"
                )
                yield Problem("overlap", mesh, sentence)
        covered = math.fsum(each.end - each.start for each in intervals)
        if covered > up_seconds + _CLOCK_SECONDS:
            sentence = (
                f"mesh {mesh} logged {covered:.3f} s of {up_seconds:.3f} s that the run was up"
            )
            yield Problem("interval", mesh, sentence)


def _run_json_problems(
    store: ObjectStore, run_id: str, config: dict[str, Any], ledger: Ledger
) -> Iterator[Problem]:
    """Differences of run.json from the log. While the run goes on, run.json may lag behind it."""
    key = layout.run_json_key(run_id)
    try:
        stored = json.loads(store.read(key))
    except ObjectNotFound:
        return
    except ValueError as error:
        yield Problem("run_json", key, f"{key} is not JSON: {error}")
        return
    try:
        folded = json.loads(json.dumps(summarize(run_id, config, ledger)))
    except (ValueError, ArithmeticError, OSError) as error:
        yield Problem("run_json", key, f"the log adds up to nothing that {key} could say: {error}")
        return
    if not isinstance(stored, dict):
        yield Problem("run_json", key, f"{key} is no JSON object")
        return
    if stored.get("status") == folded["status"] == "running":
        return
    for name in sorted(stored.keys() | folded.keys()):
        if name in ADDED_LATER and name not in stored:
            continue
        if stored.get(name) != folded.get(name):
            said, is_so = (json.dumps(each.get(name)) for each in (stored, folded))
            sentence = f"run.json says {name} = {said}; the log says {is_so}"
            yield Problem("run_json", name, sentence)
