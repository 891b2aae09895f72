"""The same prompt again.

Nearly the same is: the same numbers in the same order, and a similarity of the texts of 0.9 or more, case, marks and
blanks aside (rapidfuzz's normalised indel similarity). Texts with other numbers are other questions, however alike.
Which are compared, `minhash` chooses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from forge_core.data_checks.columns import Example
from forge_core.data_checks.findings import DataReport, Place
from forge_core.data_checks.minhash import candidates

LEAST_SIMILARITY = 0.9
_MOST_PAIRS = 200_000
"""Pairs of texts that are compared at most, some seconds."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_MARKS = re.compile(r"[\W_]+")


def check_duplicates(examples: list[Example], report: DataReport) -> None:
    """Note prompts that come again; those in two splits, and in one with two answers to meet, would ruin a run."""
    by_prompt: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_prompt[example.prompt.strip()].append(example)
    leaks: list[Place] = []
    contradictions: list[Place] = []
    choices: list[Place] = []
    repeats: list[Place] = []
    for same in by_prompt.values():
        places = [each.place for each in same]
        if len({each.split for each in same}) > 1:
            leaks += places
        if len({" ".join(each.result.split()) for each in same}) > 1:
            (choices if same[0].is_supervised else contradictions).extend(places)
        else:
            repeats += places[1:]
    report.add(
        "leak",
        leaks,
        "asked in more than one split, so that what is held out has been trained on",
        "leave them out of all splits but one",
        blocks=True,
    )
    report.add(
        "contradiction",
        contradictions,
        "the same prompt with different answers",
        "keep the right ones and leave the others out",
        blocks=True,
    )
    report.add(
        "contradiction",
        choices,
        "the same prompt with different answers",
        "leave some out unless each is to be learned",
        blocks=False,
    )
    report.add(
        "duplicate",
        repeats,
        "a repetition of rows before",
        "leave them out, or they count more than others",
        blocks=False,
    )
    _check_near(list({key: same[0] for key, same in by_prompt.items()}.values()), report)


def _check_near(examples: list[Example], report: DataReport) -> None:
    """Note pairs of different prompts that are nearly the same."""
    groups: dict[tuple[str, ...], list[Example]] = defaultdict(list)
    for example in examples:
        groups[tuple(_NUMBER.findall(example.prompt))].append(example)
    across: list[Place] = []
    within: list[Place] = []
    compared = left = 0
    for group in groups.values():
        texts = [_MARKS.sub(" ", example.prompt.casefold()).strip() for example in group]
        pairs = candidates(texts) if len(group) > 1 else []
        room = _MOST_PAIRS - compared
        left += max(0, len(pairs) - room)
        compared += min(len(pairs), room)
        for one, other in _near(texts, pairs[:room]):
            kind = within if group[one].split == group[other].split else across
            kind += [group[one].place, group[other].place]
    report.add(
        "near leak",
        across,
        "nearly the same as rows of another split",
        "look whether they ask the same, and leave them out of one split if so",
        blocks=False,
    )
    report.add(
        "near duplicate",
        within,
        "nearly the same as others of their split",
        "leave some out, or they count more than others",
        blocks=False,
    )
    # What is like many others makes more pairs than a check before a run has time for.
    report.figures["pairs_not_compared"] = left


def _near(texts: list[str], pairs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Those of the pairs that are nearly the same."""
    if not pairs:
        return
    # Deferred: only data with candidates needs it.
    from rapidfuzz import fuzz

    least = 100 * LEAST_SIMILARITY
    for one, other in pairs:
        if fuzz.ratio(texts[one], texts[other], score_cutoff=least):
            yield one, other
