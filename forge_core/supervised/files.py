"""Rows of supervised data, from a JSONL, Parquet or Arrow file, or a folder of them such as Hugging Face's datasets.

data.jsonl                       a JSON object a line
data.parquet                     a row a row
folder/…/train-00000.parquet     as `hf download` and `Dataset.to_parquet` leave them: all files of the split
folder/data-00000.arrow          as `Dataset.save_to_disk` leaves them
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".parquet", ".arrow")
"""Of files that are read; `.json` would be one document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row and where it stands."""

    file: str
    """The file."""
    number: int
    """Line of a JSONL file, row of another, from 1."""
    values: dict[str, Any]
    """By column."""

    def __str__(self) -> str:
        return f"{self.file} row {self.number}"


def data_files(path: str, split: str) -> list[Path]:
    """The files that a path names, in the order of their names.

    Of a folder those of the split: named after it, or in a folder that is; all, if none is named after any split.
    Raises ValueError if there are none.
    """
    named = Path(path).expanduser()
    if named.is_file():
        if named.suffix not in SUFFIXES:
            raise ValueError(
                f"{path!r} ends in {named.suffix!r}: give a file that ends in {', '.join(SUFFIXES)}, or a folder of "
                "them"
            )
        return [named]
    if not named.is_dir():
        raise ValueError(f"{path!r} is neither a file nor a folder: give the path of one")
    found = sorted(file for file in named.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise ValueError(f"folder {path!r} has no file that ends in {', '.join(SUFFIXES)}")
    splits = {file: split_of(file.relative_to(named)) for file in found}
    if not any(splits.values()):
        return found
    chosen = [file for file in found if splits[file] == split]
    if not chosen:
        names = ", ".join(sorted({each for each in splits.values() if each}))
        raise ValueError(f"folder {path!r} has splits {names} and no {split!r}: name one of them")
    return chosen


def split_of(file: Path) -> str | None:
    """`train` of `data/train-00000-of-00002.parquet`, `train/0000.parquet` and `train.jsonl`; None if none is named.

    The path is relative to the folder of the dataset.
    """
    first = file.stem.split("-")[0]
    if file.suffix != ".arrow" and first and not first.isdigit() and first not in ("data", "part"):
        return first
    folders = [folder for folder in file.parts[:-1] if folder not in ("data", "default")]
    return folders[-1] if folders else None


def read_rows(path: str, split: str) -> Iterator[Row]:
    """All rows, file by file. Raises ValueError, with file and row, for what cannot be read."""
    for file in data_files(path, split):
        if file.suffix == ".jsonl":
            yield from _json_lines(file)
        else:
            yield from _table_rows(file)


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{file} row {number} is no JSON: {error}: write one object a line"
                ) from error
            if not isinstance(values, dict):
                raise ValueError(
                    f"{file} row {number} is a {type(values).__name__}: write one object a line"
                )
            yield Row(file=str(file), number=number, values=values)


def _table_rows(file: Path) -> Iterator[Row]:
    number = 0
    try:
        for batch in _batches(file):
            for values in batch.to_pylist():
                number += 1
                yield Row(file=str(file), number=number, values=values)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} cannot be read after row {number}: {error}: write it again"
        ) from error


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches()
        return
    with pa.memory_map(str(file)) as source:
        try:
            # What `datasets` writes.
            yield from pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)
