"""What each row asks and what it answers, and the rows that do not tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forge_core.data_checks.findings import DataReport, Place
from forge_core.data_checks.rows import RawRow
from forge_core.environments.base import is_held_out

_MARK = "####"
TRAIN, TEST = "train", "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where rows have what is asked and answered."""

    question: str = "question"
    """Column of questions."""
    answer: str = "answer"
    """Column of reference answers; what follows the last `####` is the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row that can be used."""

    place: Place
    """Where it stands."""
    split: str
    """Split that it belongs to."""
    prompt: str
    """What is asked."""
    answer: str
    """What is answered, whole."""
    result: str
    """What of the answer must be met: all of it in supervised data."""
    is_supervised: bool
    """Whether the answer is to be learned word for word."""


def read_columns(
    rows: list[RawRow],
    columns: Columns,
    report: DataReport,
    *,
    test_fraction: float,
    rendered: Callable[[str], str] = str,
) -> list[Example]:
    """The examples that rows are; rows that are none are noted.

    A row is a question with its answer, `messages`, or `prompt` and `completion`, as most of them are. Its split is
    that of its file, or follows from a hash of the prompt as it is rendered: whatever other rows there are.
    """
    if not rows:
        return []
    kind = _kind(rows, columns)
    needed = {
        "question": (columns.question, columns.answer),
        "messages": ("messages",),
        "prompt": ("prompt", "completion"),
    }[kind]
    _check_columns(rows, needed, report)
    examples, empty_prompts, empty_answers = [], [], []
    for row in rows:
        if any(row.values.get(name) is None for name in needed):
            continue
        prompt, answer = _texts(row.values, kind, needed)
        if prompt is None or answer is None:
            continue
        result = answer.rpartition(_MARK)[2] if kind == "question" else answer
        if not prompt.strip():
            empty_prompts.append(row.place)
        elif not result.strip():
            empty_answers.append(row.place)
        else:
            text = rendered(prompt)
            by_hash = TEST if is_held_out(text, test_fraction) else TRAIN
            examples.append(
                Example(
                    place=row.place,
                    split=row.split or by_hash,
                    prompt=text,
                    answer=answer,
                    result=result.strip(),
                    is_supervised=kind != "question",
                )
            )
    report.add(
        "empty",
        empty_prompts,
        "nothing is asked",
        "fill in what is asked, or leave the rows out",
        blocks=True,
    )
    report.add(
        "empty",
        empty_answers,
        "an empty answer, which no response can meet",
        "fill in the answers, or leave the rows out",
        blocks=True,
    )
    return examples


def _kind(rows: list[RawRow], columns: Columns) -> str:
    """Which form most rows have; questions and answers where none has any."""
    seen: Counter[str] = Counter()
    for row in rows:
        has = row.values.keys()
        if columns.question in has or columns.answer in has:
            seen["question"] += 1
        elif "messages" in has:
            seen["messages"] += 1
        elif "prompt" in has or "completion" in has:
            seen["prompt"] += 1
    return seen.most_common(1)[0][0] if seen else "question"


def _check_columns(rows: list[RawRow], needed: tuple[str, ...], report: DataReport) -> None:
    for name in needed:
        lacking = [row for row in rows if row.values.get(name) is None]
        has = ", ".join(sorted({key for row in lacking for key in row.values})) or "nothing"
        report.add(
            "columns",
            [row.place for row in lacking],
            f"no column {name!r} but {has}",
            "fill it in, leave the rows out, or name the column that has it",
            blocks=True,
        )
        kinds: dict[str, list[Place]] = {}
        for row in rows:
            if (value := row.values.get(name)) is not None:
                kinds.setdefault(_kind_of(value), []).append(row.place)
        if len(kinds) > 1:
            usual = max(kinds, key=lambda kind: len(kinds[kind]))
            for kind in sorted(kinds.keys() - {usual}):
                report.add(
                    "columns",
                    kinds[kind],
                    f"a {kind} in the column {name!r}, where most rows have a {usual}",
                    "write all values of a column alike",
                    blocks=True,
                )


def _kind_of(value: Any) -> str:
    match value:
        case bool():
            return "truth value"
        case int() | float():
            return "number"
        case str():
            return "text"
        case list():
            return "list"
        case _:
            return "table"


def _texts(
    values: dict[str, Any], kind: str, needed: tuple[str, ...]
) -> tuple[str | None, str | None]:
    """What is asked and what is answered; None for what is neither text nor messages."""
    if kind != "messages":
        asked, answered = (values[name] for name in needed)
        if kind == "question":
            return (asked, str(answered)) if isinstance(asked, str) else (None, None)
        return _joined(asked), _joined(answered)
    messages = values["messages"]
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        return None, None
    roles = [each.get("role") for each in messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    return _joined(messages[:first]), _joined(messages[first:])


def _joined(given: Any) -> str | None:
    if isinstance(given, str):
        return given
    if isinstance(given, list) and all(isinstance(each, dict) for each in given):
        return "\n".join(str(each.get("content") or "") for each in given)
    return None
