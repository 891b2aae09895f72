"""The part of `verify` about groups that are trained on again: often enough, young enough, known, and accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from storage.facts import Batched
from storage.groups import Problem
from storage.ledger import Ledger

FRESH = "fresh"
"""Source of a step's own groups."""


def has_buffer(config: dict[str, Any]) -> bool:
    """Whether a run's config keeps groups for more than one step."""
    section = config.get("buffer")
    return isinstance(section, dict) and section.get("policy", "once") != "once"


def most_uses(config: dict[str, Any]) -> int:
    """How many steps may train on a group."""
    return int(config["buffer"]["max_uses"]) if has_buffer(config) else 1


def oldest_allowed(config: dict[str, Any], source: str) -> int | None:
    """The largest age of a group of a source of the buffer; None where it is declared unbounded."""
    section = config["buffer"]
    held = section.get("sources", {}).get(source, {}) if section["policy"] == "hybrid" else section
    if held.get("max_age") is not None:
        return int(held["max_age"])
    return None if held.get("unbounded") else int(config["max_policy_age"])


def source_of(ledger: Ledger, step: int, group_id: str) -> str | None:
    """Source that a group of a step was drawn from; None without a buffer."""
    fact = ledger.buffered.get(step)
    if fact is None:
        return None
    # Of fewer uses than groups `buffer_problems` tells.
    use = dict(zip(fact.group_ids, fact.uses or (), strict=False)).get(group_id)
    return None if use is None else use.source


def buffer_problems(config: dict[str, Any], ledger: Ledger) -> Iterator[Problem]:
    """All that is wrong with what was given to a buffer, drawn from it and let go."""
    kept: dict[str, int] = {}
    for step in sorted(ledger.batches):
        fact = ledger.buffered.get(step)
        if (fact is not None) != has_buffer(config):
            what = "names no uses" if fact is None else "was drawn from a buffer"
            sentence = (
                f"the batch of step {step} {what}, and the config says otherwise of the buffer"
            )
            yield Problem("buffer", f"step {step}", sentence)
        if fact is not None:
            yield from _given(fact, kept)
            yield from _drawn(config, fact, kept)
    if ledger.status == "finished":
        for group_id in kept:
            if ledger.groups[group_id].released is None:
                sentence = f"group {group_id} was kept for more steps and never let go, and the run finished"
                yield Problem("buffer", group_id, sentence)
    most = most_uses(config)
    for group_id, group in ledger.groups.items():
        if len(steps := set(group.batched)) > most and has_buffer(config):
            shown = ", ".join(map(str, sorted(steps)))
            sentence = f"group {group_id} was batched for steps {shown} and may be used {most}x"
            yield Problem("uses", group_id, sentence)


def _given(fact: Batched, kept: dict[str, int]) -> Iterator[Problem]:
    for each in fact.kept or ():
        if (before := kept.setdefault(each.group_id, fact.step)) != fact.step:
            sentence = (
                f"group {each.group_id} was given to the buffer at steps {before} and {fact.step}"
            )
            yield Problem("buffer", each.group_id, sentence)


def _drawn(config: dict[str, Any], fact: Batched, kept: Mapping[str, int]) -> Iterator[Problem]:
    uses = fact.uses or ()
    if len(uses) != len(fact.group_ids):
        sentence = f"step {fact.step} has {len(fact.group_ids)} groups and {len(uses)} uses"
        yield Problem("buffer", f"step {fact.step}", sentence)
    names = _sources(config)
    for group_id, use in zip(fact.group_ids, uses, strict=False):
        what = f"group {group_id} of step {fact.step}"
        if use.source not in names:
            sentence = f"{what} is of source {use.source!r}, which the config has not got"
            yield Problem("buffer", group_id, sentence)
        if not 0.0 < use.weight <= 1.0:
            sentence = f"{what} has weight {use.weight}, which is not above 0 and at most 1"
            yield Problem("buffer", group_id, sentence)
        if kept.get(group_id) != fact.step if use.source == FRESH else group_id not in kept:
            sentence = f"{what} was drawn from source {use.source!r}, which was not given it"
            yield Problem("buffer", group_id, sentence)


def _sources(config: dict[str, Any]) -> Sequence[str]:
    if not has_buffer(config):
        return ()
    section = config["buffer"]
    if section["policy"] != "hybrid":
        return (section["policy"],)
    return [FRESH if held["policy"] == FRESH else name for name, held in section["sources"].items()]


def kept_problems(
    ledger: Ledger, oldest: Mapping[str, int], rewards: Mapping[str, list[float]]
) -> Iterator[Problem]:
    """What was said of groups that were given to the buffer is what their episodes say."""
    for step, fact in sorted(ledger.buffered.items()):
        for each in fact.kept or ():
            group_id = each.group_id
            if group_id in oldest and each.policy_version > oldest[group_id]:
                sentence = (
                    f"group {group_id} was given to the buffer at step {step} as of version {each.policy_version}; "
                    f"it has tokens of version {oldest[group_id]}"
                )
                yield Problem("buffer", group_id, sentence)
            if group_id in rewards:
                mean = sum(rewards[group_id]) / len(rewards[group_id])
                if abs(mean - each.reward) > 1e-9 * max(1.0, abs(mean)):
                    sentence = (
                        f"group {group_id} was given to the buffer with a mean reward of {each.reward}; its episodes "
                        f"have {mean}"
                    )
                    yield Problem("buffer", group_id, sentence)
