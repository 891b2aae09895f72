"""The rows of a dataset, each with its split, and every line that is no row: a reader stops at the first."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_core.data_checks.findings import DataReport, Place

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
"""Of files that are checked; a `.json` has one object a line as a `.jsonl` has."""
_BROKEN = ("\N{REPLACEMENT CHARACTER}", "Ã©", "Ã¨", "Ã¼", "Ã¶", "Ã¤", "â€™", "â€œ")
"""Text that was decoded wrongly once has these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """A row as it stands in its file."""

    place: Place
    """Where."""
    split: str | None
    """The split that its file is named after; None where files are not."""
    values: dict[str, Any]
    """By column."""


def read_raw(path: str, report: DataReport) -> list[RawRow]:
    """All rows of a file or folder that can be read; what cannot is noted. Raises ValueError if there is no file."""
    rows: list[RawRow] = []
    faults: dict[str, list[Place]] = {"encoding": [], "json": [], "object": []}
    for file, split in _files(path):
        if file.suffix in (".jsonl", ".json"):
            rows += _json_rows(file, split, faults)
        elif file.suffix == ".csv":
            rows += _csv_rows(file, split, faults)
        else:
            rows += _table_rows(file, split)
    report.add(
        "encoding", faults["encoding"], "not UTF-8", "write the file again in UTF-8", blocks=True
    )
    report.add("json", faults["json"], "no JSON", "write one whole JSON object a line", blocks=True)
    report.add(
        "json", faults["object"], "JSON, but no object", "write one JSON object a line", blocks=True
    )
    report.add(
        "encoding",
        [row.place for row in rows if any(_is_broken(text) for text in row.values.values())],
        "characters that come of a wrong decoding",
        "read the source in its own encoding and write it again in UTF-8",
        blocks=False,
    )
    return rows


def named_splits(path: str) -> set[str]:
    """The splits that files are named after, with or without rows. Raises ValueError if there is no file."""
    return {split for _, split in _files(path) if split is not None}


def _files(path: str) -> list[tuple[Path, str | None]]:
    """The files that are named, each with the split that its name tells."""
    named = Path(path).expanduser()
    if named.is_file():
        if named.suffix not in SUFFIXES:
            raise ValueError(
                f"{path!r} ends in {named.suffix!r}: give a file that ends in {', '.join(SUFFIXES)}, or a folder of "
                "them"
            )
        return [(named, None)]
    if not named.is_dir():
        raise ValueError(f"{path!r} is neither a file nor a folder: give the path of one")
    # Deferred: it brings pyarrow, which the other commands do without.
    from forge_core.supervised.files import split_of

    found = sorted(
        file
        for file in named.rglob("*")
        if file.suffix in SUFFIXES and file.is_file() and file.name not in _OF_DATASETS
    )
    if not found:
        raise ValueError(f"folder {path!r} has no file that ends in {', '.join(SUFFIXES)}")
    return [(file, split_of(file.relative_to(named))) for file in found]


_OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What `Dataset.save_to_disk` writes beside the rows."""


def _lines(file: Path, faults: dict[str, list[Place]]) -> Iterator[tuple[Place, str]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = Place(str(file), number)
            try:
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                faults["encoding"].append(place)


def _json_rows(file: Path, split: str | None, faults: dict[str, list[Place]]) -> list[RawRow]:
    rows = []
    for place, line in _lines(file, faults):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            faults["json"].append(place)
            continue
        if isinstance(values, dict):
            rows.append(RawRow(place=place, split=split, values=values))
        else:
            faults["object"].append(place)
    return rows


def _csv_rows(file: Path, split: str | None, faults: dict[str, list[Place]]) -> list[RawRow]:
    text = "".join(line for _, line in _lines(file, faults))
    table = csv.DictReader(io.StringIO(text, newline=""))
    return [
        RawRow(
            place=Place(str(file), number),
            split=split,
            values={name: value for name, value in row.items() if name is not None},
        )
        for number, row in enumerate(table, start=1)
    ]


def _table_rows(file: Path, split: str | None) -> list[RawRow]:
    # Deferred, as above.
    from forge_core.supervised.files import read_rows

    return [
        RawRow(place=Place(row.file, row.number), split=split, values=row.values)
        for row in read_rows(str(file), split or "train")
    ]


def _is_broken(text: object) -> bool:
    return isinstance(text, str) and any(mark in text for mark in _BROKEN)
