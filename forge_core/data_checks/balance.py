"""Whether there is something to learn: rows in every split, answers of more than one kind, lengths that are alike."""

from __future__ import annotations

from collections import Counter

from forge_core.data_checks.columns import TEST, TRAIN, Example
from forge_core.data_checks.findings import DataReport, Finding

_LEAST_ROWS = 8
"""Rows from which on answers that are all alike are no chance."""
_LARGEST_SHARE = 0.9
_LONGEST_SHARE = 20
"""Times the median length from which on a prompt or an answer stands out."""


def check_splits(
    examples: list[Example],
    named: set[str],
    report: DataReport,
    *,
    path: str,
    needs_test: bool,
) -> None:
    """Note splits without a row, of those that files are named after, or of train and, where it is needed, test."""
    counts = Counter(example.split for example in examples)
    needed = sorted(named) if named else [TRAIN, TEST] if needs_test else [TRAIN]
    report.figures["rows"] = {split: counts[split] for split in sorted({*needed, *counts})}
    for split in needed:
        if not counts[split]:
            mend = "add rows to it" if named else "add rows, or take another share of them to test"
            says = f"{path}: {len(examples)} usable rows and none in the split {split!r}; {mend}"
            report.findings.append(Finding(check="empty split", blocks=True, says=says, rows=()))


def check_balance(examples: list[Example], report: DataReport) -> None:
    """Note answers that are all, or nearly all, the same, and lengths that stand out."""
    if not examples:
        return
    answers = Counter(" ".join(example.result.split()) for example in examples)
    (most, count), *_ = answers.most_common(1)
    report.figures["distinct_answers"] = len(answers)
    report.figures["most_common_answer"] = {"answer": most[:80], "share": count / len(examples)}
    alike = [e.place for e in examples if " ".join(e.result.split()) == most]
    if len(examples) >= _LEAST_ROWS and len(answers) == 1:
        report.add(
            "one class",
            alike,
            f"the answer of every row is {most[:80]!r}, which is learned without reading the question",
            "add rows with other answers",
            blocks=not examples[0].is_supervised,
        )
    elif len(examples) >= _LEAST_ROWS and count / len(examples) >= _LARGEST_SHARE:
        report.add(
            "balance",
            alike,
            f"the answer {most[:80]!r}, which {count / len(examples):.0%} of all rows have",
            "add rows with other answers, or leave some of these out",
            blocks=False,
        )
    for what in ("prompt", "answer"):
        lengths = [len(getattr(example, what)) for example in examples]
        report.figures[f"{what}_characters"] = distribution(lengths)
        median = sorted(lengths)[len(lengths) // 2]
        report.add(
            "outlier",
            [
                example.place
                for example, length in zip(examples, lengths, strict=True)
                if length > _LONGEST_SHARE * max(median, 10)
            ],
            f"{what}s more than {_LONGEST_SHARE} times as long as the median",
            "look whether they are whole and one row each",
            blocks=False,
        )


def distribution(numbers: list[int]) -> dict[str, int]:
    """Least, median, 95th percentile and largest of some numbers."""
    ordered = sorted(numbers)
    last = len(ordered) - 1
    return {
        "min": ordered[0],
        "median": ordered[last // 2],
        "p95": ordered[round(0.95 * last)],
        "max": ordered[last],
    }
