"""The rows of a file or folder of questions and answers, those to train on apart from those that are held out.

A folder is one of Hugging Face's datasets, or of the same form: `.jsonl`, `.parquet` or `.arrow` files, which may be
named after splits, as `hf download`, `Dataset.to_parquet` and `DatasetDict.save_to_disk` leave them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = "environment.params.path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Which of a dataset's own splits are used."""

    train: str
    """That which is trained on."""
    test: str | None
    """That which is held out; None: a share of the first, by hash."""

    @property
    def used(self) -> tuple[str, ...]:
        """Both."""
        return (self.train,) if self.test is None else (self.train, self.test)


def find_splits(path: str, train: str, test: str | None) -> Splits | None:
    """The splits that a folder's files are named after; None where they are not, or the path is a file's.

    Without `test` it is `test`, if there is such a split. Raises ValueError for a split that there is not.
    """
    named = Path(path).expanduser()
    if not named.is_dir():
        return None
    # Deferred: it brings pyarrow, which other commands do without.
    from forge_core.supervised.files import SUFFIXES, split_of

    files = [file for file in named.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    found = {split for file in files if (split := split_of(file.relative_to(named))) is not None}
    if not found:
        return None
    for field, split in (("split", train), ("test_split", test)):
        if split is not None and split not in found:
            raise ValueError(
                f"environment.params.{field} {split!r} is no split of {path!r}, which has {', '.join(sorted(found))}: "
                "name one of them"
            )
    if test is None and "test" in found - {train}:
        test = "test"
    return Splits(train=train, test=test)


def read_questions(
    path: str, question: str, answer: str, splits: Splits | None
) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]] | None]:
    """Questions with their answers: those to train on, and those held out; None for the latter: by hash.

    Raises ValueError that names what is wrong.
    """
    if Path(path).expanduser().is_file():
        return _of_file(path, question, answer), None
    train = list(_of_folder(path, question, answer, "train" if splits is None else splits.train))
    if splits is None or splits.test is None:
        return train, None
    return train, list(_of_folder(path, question, answer, splits.test))


def _of_folder(path: str, question: str, answer: str, split: str) -> Iterator[tuple[Any, Any]]:
    from forge_core.supervised.files import read_rows

    try:
        for row in read_rows(path, split):
            for key, column in (("question", question), ("answer", answer)):
                if column not in row.values:
                    raise ValueError(
                        f"environment.params.{key} = {column!r} is no column of {row}, which has "
                        f"{', '.join(row.values)}"
                    )
            yield row.values[question], row.values[answer]
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith("environment.") else f"{PATH}: {told}") from error


def _of_file(path: str, question: str, answer: str) -> list[tuple[Any, Any]]:
    # Deferred: only this environment needs them, and they take a while.
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    readers = {
        ".jsonl": pyarrow.json.read_json,
        ".json": pyarrow.json.read_json,
        ".csv": functools.partial(
            pyarrow.csv.read_csv,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        ),
        ".parquet": functools.partial(pyarrow.parquet.read_table, use_threads=False),
    }
    file = Path(path).expanduser()
    if file.suffix == ".arrow":
        return list(_of_folder(path, question, answer, "train"))
    if file.suffix not in readers:
        raise ValueError(
            f"{PATH} {path!r} is no file with one of {', '.join([*readers, '.arrow'])}: name one, or a folder of them"
        )
    try:
        table = readers[file.suffix](str(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{PATH} {path!r} cannot be read: {' '.join(str(error).split())}"
        ) from error
    for key, column in (("question", question), ("answer", answer)):
        if column not in table.column_names:
            raise ValueError(
                f"environment.params.{key} = {column!r} is no column of {path}, which has "
                f"{', '.join(table.column_names)}"
            )
    return list(zip(table[question].to_pylist(), table[answer].to_pylist(), strict=True))
