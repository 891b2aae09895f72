"""The part of `verify` about rounds that are collected by runs of their own and trained on by another.

What each of the two says is held against the claim, and against the other's log for as long as the store has it.
"""

from collections.abc import Iterator
from typing import Any

from storage import facts, layout
from storage.groups import GroupState, Problem
from storage.ledger import Ledger
from storage.objects import ObjectStore
from storage.resume import read_ledger
from storage.rounds import Claim, read_claims, round_steps
from storage.tombstones import is_deleted


def is_whole(config: dict[str, Any]) -> bool:
    """Whether a config has what collected rounds are held against, if it speaks of them."""
    needed = []
    if config.get("train_rounds"):
        needed += [config.get("steps_per_round"), config.get("steps")]
    if (section := config.get("collect")) is not None:
        section = section if isinstance(section, dict) else {}
        needed += [section.get(name) for name in ("round", "first_step", "last_step")]
        needed.append(config.get("parent_step"))
    return all(isinstance(each, int) for each in needed)


def round_problems(
    store: ObjectStore, run_id: str, config: dict[str, Any], ledger: Ledger
) -> Iterator[Problem]:
    """All that is wrong with rounds that a run collects for another, or trains on and did not collect."""
    if config.get("collect") is not None:
        yield from _collecting(store, run_id, config, ledger)
    if config.get("train_rounds"):
        try:
            claims = read_claims(store, run_id)
        except ValueError as error:
            yield Problem("round", layout.rounds_folder(run_id), str(error))
            return
        yield from _claims(run_id, config, claims)
        yield from _taken_in(store, run_id, ledger, claims)
        yield from _steps(config, ledger)


def _collecting(
    store: ObjectStore, run_id: str, config: dict[str, Any], ledger: Ledger
) -> Iterator[Problem]:
    """A run that collects a round holds it, draws what is its own, and trains on nothing."""
    section, trainer = config["collect"], str(config.get("parent_run_id"))
    size, version = config["groups_per_step"], config["parent_step"]
    age = section["last_step"] - 1 - version
    if age > config["max_policy_age"]:
        sentence = (
            f"version {version} is {age} steps behind the last step of round {section['round']}"
        )
        yield Problem("age", run_id, sentence)
    if store.exists(layout.config_key(trainer)) and not is_deleted(store, trainer):
        yield from _holds(store, run_id, trainer, section["round"])
    for step in sorted(ledger.steps.keys() | ledger.batches.keys()):
        yield Problem("round", f"step {step}", f"step {step} was trained by a run that collects")
    for fact in ledger.generated:
        if (fact.policy_version_min, fact.policy_version_max) != (version, version):
            sentence = f"{fact.part.key} has tokens of other versions than {version}"
            yield Problem("round", fact.part.key, sentence)
    due = range((section["first_step"] - 1) * size, section["last_step"] * size)
    drawn = {group.draw.draw for group in ledger.groups.values() if group.draw is not None}
    if drawn - set(due) or (ledger.status == "finished" and drawn != set(due)):
        sentence = f"draws {due.start} to {due.stop - 1} are due in round {section['round']}, and others were drawn"
        yield Problem("round", run_id, sentence)
    for group_id, group in ledger.groups.items():
        if group.to_run not in (None, trainer):
            sentence = f"group {group_id} was handed over to run {group.to_run}, not {trainer}"
            yield Problem("handed_over", group_id, sentence)


def _holds(store: ObjectStore, run_id: str, trainer: str, number: int) -> Iterator[Problem]:
    try:
        claims = {claim.round: claim for claim in read_claims(store, trainer)}
    except ValueError as error:
        yield Problem("round", layout.rounds_folder(trainer), str(error))
        return
    if number not in claims or claims[number].run_id != run_id:
        sentence = f"round {number} of run {trainer} is not claimed by run {run_id}"
        yield Problem("round", layout.round_key(trainer, number), sentence)


def _claims(run_id: str, config: dict[str, Any], claims: list[Claim]) -> Iterator[Problem]:
    """Rounds are claimed one after another, each by another run, and hold the draws of their steps."""
    holders: dict[str, int] = {}
    for number, claim in enumerate(claims, start=1):
        steps, size = _steps_of(config, number), config["groups_per_step"]
        due = (run_id, number, (steps.start - 1) * size, max(1, len(steps)) * size)
        key = layout.round_key(run_id, number)
        if due != (claim.trainer_run_id, claim.round, claim.first_draw, claim.count) or not steps:
            sentence = f"the claim that should be {key} is missing, or of other draws than those of round {number}"
            yield Problem("round", key, sentence)
        if holders.setdefault(claim.run_id, number) != number:
            sentence = f"rounds {holders[claim.run_id]} and {number} are claimed by one run, {claim.run_id}"
            yield Problem("round", key, sentence)


def _steps_of(config: dict[str, Any], number: int) -> range:
    return round_steps(
        number,
        after_step=config.get("parent_step") or 0,
        steps_per_round=config["steps_per_round"],
        steps=config["steps"],
    )


def _taken_in(
    store: ObjectStore, run_id: str, ledger: Ledger, claims: list[Claim]
) -> Iterator[Problem]:
    """What was let in are whole rounds of the runs that hold them, collected with this run's weights."""
    holders = {claim.run_id: claim for claim in claims}
    taken: dict[str, set[str]] = {}
    for fact in ledger.replayed:
        claim = holders.get(fact.run_id)
        if claim is None:
            sentence = f"groups of run {fact.run_id} were let in, which holds no round"
            yield Problem("round", fact.run_id, sentence)
            continue
        draws = range(claim.first_draw, claim.first_draw + claim.count)
        for draw in fact.draws:
            if draw.draw not in draws:
                sentence = (
                    f"group {draw.group_id} is not of round {claim.round}, as which it was let in"
                )
                yield Problem("round", draw.group_id, sentence)
        taken.setdefault(fact.run_id, set()).update(draw.group_id for draw in fact.draws)
    for other, group_ids in taken.items():
        if store.exists(layout.config_key(other)) and not is_deleted(store, other):
            yield from _of_run(store, run_id, ledger, other, group_ids)


def _of_run(
    store: ObjectStore, run_id: str, ledger: Ledger, other: str, taken: set[str]
) -> Iterator[Problem]:
    try:
        collecting = read_ledger(store, other)
    except ValueError as error:
        yield Problem("round", other, f"run {other}, which collected a round: {error}")
        return
    if collecting.status != "finished":
        yield Problem("round", other, f"the round of run {other} was let in before it finished")
    handed = {
        group_id
        for group_id, group in collecting.groups.items()
        if group.state == GroupState.HANDED_OVER and group.to_run == run_id
    }
    for group_id in sorted(taken ^ handed):
        which = "let in and not handed over" if group_id in taken else "handed over and not let in"
        yield Problem("round", group_id, f"group {group_id} of run {other} was {which}")
    if not _is_by_these_weights(run_id, ledger, collecting.forked):
        sentence = f"run {other} did not collect with weights of this run"
        yield Problem("round", other, sentence)


def _is_by_these_weights(run_id: str, ledger: Ledger, forked: facts.Forked | None) -> bool:
    return (
        forked is not None
        and forked.parent_run_id == run_id
        and ledger.weights.get(forked.parent_step) == forked.weights_digest
    )


def _steps(config: dict[str, Any], ledger: Ledger) -> Iterator[Problem]:
    """Each step considered groups of its own draws, all of them collected elsewhere."""
    size = config["groups_per_step"]
    considered = {fact.step: list(fact.group_ids) for fact in ledger.trained}
    for step in ledger.batches:
        considered.setdefault(step, []).extend(ledger.considered(step))
    for step, group_ids in considered.items():
        draws = range((step - 1) * size, step * size)
        for group_id in dict.fromkeys(group_ids):
            group = ledger.groups.get(group_id)
            if group is None or group.draw is None:
                continue
            if group.run_id is None or group.draw.draw not in draws:
                sentence = (
                    f"group {group_id} is not of the draws of step {step}, which considered it"
                )
                yield Problem("round", group_id, sentence)
