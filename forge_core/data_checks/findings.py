"""What a check has found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_SHOWN = 5


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a row stands."""

    file: str
    """The file."""
    number: int
    """Line of a JSONL file, row of another, from 1 and without a header."""

    def __str__(self) -> str:
        return f"{self.file} row {self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong with some rows, or may be."""

    check: str
    """Name of the check."""
    blocks: bool
    """Whether it would ruin a run."""
    says: str
    """One sentence: which rows, what is wrong with them, and what to do."""
    rows: tuple[Place, ...]
    """All rows that are meant."""


@dataclass(kw_only=True)
class DataReport:
    """What is found in a dataset, and what it is like."""

    figures: dict[str, object] = field(default_factory=dict)
    """Counts and distributions, by name."""
    findings: list[Finding] = field(default_factory=list)
    """In the order of the checks."""

    def add(self, check: str, rows: Iterable[Place], what: str, mend: str, *, blocks: bool) -> None:
        """Note that rows are wrong in some way, if there are any."""
        places = tuple(sorted(set(rows)))
        if places:
            says = f"{which(places)}: {what}; {mend}"
            self.findings.append(Finding(check=check, blocks=blocks, says=says, rows=places))

    @property
    def blocking(self) -> list[Finding]:
        """What would ruin a run."""
        return [each for each in self.findings if each.blocks]

    @property
    def warnings(self) -> list[Finding]:
        """What else is worth a look."""
        return [each for each in self.findings if not each.blocks]


def which(places: Sequence[Place]) -> str:
    """Names rows, the first few of them by number, and counts the others."""
    by_file: dict[str, list[int]] = {}
    for place in places[:_SHOWN]:
        by_file.setdefault(place.file, []).append(place.number)
    parts = [
        f"{file} {'row' if len(numbers) == 1 else 'rows'} {', '.join(map(str, numbers))}"
        for file, numbers in by_file.items()
    ]
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return f"{'; '.join(parts)}{more}"
