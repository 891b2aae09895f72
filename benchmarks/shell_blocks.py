"""The shell blocks of README and docs, and where each of them runs.

A block is fenced as `sh`, or indented and begins with a command. Where it runs follows
from its commands, unless a comment before it says something else:

    short      in CI, by tests/unit/test_shell_blocks.py
    long       by `make prove BAR=docs`: it starts a run, or another thing that takes more than some seconds
    ci         what CI runs itself, such as `make test`
    elsewhere  not here, for a reason: `<!-- shell: elsewhere, needs a bucket -->`
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

ROOT = Path(__file__).parents[1]

Where = Literal["short", "long", "ci", "elsewhere"]

_COMMENT = re.compile(r"^<!-- shell: (?P<where>\w+)(?:, (?P<reason>.+))? -->$")
_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>\S*)")
_COMMAND = re.compile(
    r"^(\$ )?((\S*/)?(forgeflow|make|python3?|pip|prefect|export|tensorboard)\b|\. \.venv/|[A-Z_]+=\S)"
)
_SHORT_COMMANDS = frozenset(
    ("show", "verify", "episodes", "runs", "report", "gc", "promoted", "--help", "--version")
)
"""Commands of forgeflow that only read a store."""
_QUICKENING = frozenset(("--dry-run", "--help", "--no-engine"))
"""Options with which any command starts nothing."""
_SERVERS = (["make", "server"], ["forgeflow", "server"])
"""Commands that do not end."""
_DATA = (".jsonl", ".csv", ".parquet")
"""Files that `forgeflow doctor FILE` examines, which starts nothing either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One shell block."""

    document: str
    """Path below the root of the repository."""
    line: int
    """Line of its first command, counted from 1."""
    text: str
    """What the shell is given."""
    where: Where
    """Where it runs."""
    reason: str
    """Why it runs elsewhere; empty for all others."""

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[Path]:
    """Every page of the docs that is written by hand or kept with the source."""
    written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(path for path in written if path != ROOT / "docs" / "cli.md")


def shell_blocks(document: Path) -> list[Block]:
    """The shell blocks of a document, in order. Raises ValueError for a comment that says nothing known."""
    found = []
    for line, language, text, comment in _code(document.read_text("utf-8").splitlines()):
        if language != "sh" and not (language == "indented" and _COMMAND.match(text)):
            continue
        if comment:
            where, reason = _said(document, comment)
        elif any(words[:2] in _SERVERS for words in commands(text)):
            where, reason = "elsewhere", "runs until it is stopped"
        else:
            where, reason = _where(text), ""
        name = str(document.relative_to(ROOT)) if document.is_relative_to(ROOT) else document.name
        found.append(Block(document=name, line=line, text=text, where=where, reason=reason))
    return found


def _code(lines: list[str]) -> Iterator[tuple[int, str, str, str]]:
    """Line, language (`indented` where there is no fence), text, and the comment before it, of each block of code."""
    before, number = "", 0
    while number < len(lines):
        line = lines[number]
        opening = _FENCE.match(line)
        if opening or (line.startswith("    ") and not lines[number - 1].strip()):
            start = number = number + 1 if opening else number
            while number < len(lines) and (
                not lines[number].startswith(opening["fence"])
                if opening
                else lines[number].startswith("    ") or _goes_on(lines, number)
            ):
                number += 1
            body = lines[start:number]
            text = "\n".join(body if opening else (row[4:] for row in body))
            comment = before if before.startswith("<!-- shell") else ""
            yield start + 1, opening["language"] if opening else "indented", text, comment
            before = ""
            number += bool(opening)
            continue
        if line.strip():
            before = line.strip()
        number += 1


def _goes_on(lines: list[str], number: int) -> bool:
    """Whether an empty line lies within an indented block."""
    return not lines[number].strip() and any(
        row.startswith("    ") for row in lines[number + 1 : number + 2]
    )


def _said(document: Path, comment: str) -> tuple[Where, str]:
    match = _COMMENT.match(comment)
    if match is None:
        raise ValueError(f"{document.name}: {comment!r} does not say where a block runs")
    where, reason = match["where"], match["reason"] or ""
    if where not in get_args(Where) or (where == "elsewhere") != bool(reason):
        raise ValueError(
            f"{document.name}: {comment!r}: name one of {', '.join(get_args(Where))}, "
            "and for elsewhere, and only there, the reason"
        )
    return where, reason  # type: ignore[return-value]


def _where(text: str) -> Where:
    """Where a block without a comment runs: the commands say."""
    in_ci = set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    kinds = set()
    for command in commands(text):
        program, *arguments = command
        if Path(program).name == "make" and arguments:
            kinds.add("ci" if arguments[0] in in_ci else _of_make(arguments[0]))
        elif Path(program).name == "forgeflow" and arguments:
            is_short = (
                arguments[0] in _SHORT_COMMANDS
                or _QUICKENING & set(arguments)
                or (arguments[0] == "doctor" and arguments[1:2] and arguments[1].endswith(_DATA))
            )
            kinds.add("short" if is_short else "long")
        elif Path(program).name.startswith(("python", "prefect")) and arguments:
            kinds.add("long")
    return next((kind for kind in ("long", "ci") if kind in kinds), "short")  # type: ignore[return-value]


def _of_make(target: str) -> Where:
    return "short" if target in ("help", "setup") else "long"


def commands(text: str) -> list[list[str]]:
    """The words of each command line; comments and the bodies of here-documents are left out."""
    found, end = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        if end:
            end = "" if line.strip() == end else end
            continue
        if marker := re.search(r"<<-?\s*'?(\w+)'?", line):
            end = marker[1]
        words = shlex.split(line, comments=True)
        # What stands before the program itself, such as `timeout 9`, says nothing of where it runs.
        known = (n for n, word in enumerate(words) if Path(word).name in ("forgeflow", "make"))
        if words:
            found.append(words[next(known, 0) :])
    return found
