"""Small datasets, each broken in one way, as the files that people bring."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NAMES = [
    "apples", "pears", "ships", "maps", "birds", "rivers", "lamps", "chairs", "clouds", "trains",
    "roads", "stones", "wolves", "bells", "coins", "doors", "eggs", "flags", "goats", "hats",
]  # fmt: skip


def sound_rows() -> list[dict[str, Any]]:
    """Forty rows with nothing wrong."""
    return [
        {
            "question": f"How many {name} are {place + 2} times {factor} {name}?",
            "answer": f"Multiply.\n#### {(place + 2) * factor}",
        }
        for place, name in enumerate(NAMES)
        for factor in (3, 7)
    ]


def write_lines(file: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@dataclass(frozen=True)
class Broken:
    """A dataset and what is to be found in it."""

    make: Callable[[Path], Path]
    """Writes it into a folder; its path."""
    check: str
    """Check that finds it."""
    blocks: bool
    """Whether it would ruin a run."""
    rows: list[int]
    """Rows that are meant, by their number in their file."""
    words: str
    """Pattern of the sentence."""


def _changed(number: int, **values: Any) -> Callable[[Path], Path]:
    """Sound rows, of which one, by its number from 1, has other values; None for a column that it lacks."""

    def make(folder: Path) -> Path:
        rows = sound_rows()
        row = {**rows[number - 1], **values}
        rows[number - 1] = {key: value for key, value in row.items() if value is not None}
        return write_lines(folder / "data.jsonl", rows)

    return make


def _added(*rows: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda folder: write_lines(folder / "data.jsonl", [*sound_rows(), *rows])


def _raw_line(number: int, line: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = write_lines(folder / "data.jsonl", sound_rows())
        lines = file.read_bytes().splitlines()
        lines[number - 1] = line
        file.write_bytes(b"\n".join(lines))
        return file

    return make


def _splits(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, rows in (("train", train), ("test", test)):
            schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
            pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{name}.parquet")
        return folder

    return make


def _one_class(folder: Path) -> Path:
    rows = [{**row, "answer": "#### yes"} for row in sound_rows()]
    return write_lines(folder / "data.jsonl", rows)


SOUND = sound_rows()
ALIKE = {"question": SOUND[4]["question"].upper() + "!", "answer": SOUND[4]["answer"]}

BROKEN = {
    "leak": Broken(
        _splits(SOUND[:30], [*SOUND[30:], SOUND[4]]), "leak", True, [5, 11],
        r"test.parquet row 11; .*train.parquet row 5: asked in more than one split.*leave them out",
    ),
    "near-leak": Broken(
        _splits(SOUND[:30], [*SOUND[30:], ALIKE]), "near leak", False, [5, 11],
        r"test.parquet row 11; .*train.parquet row 5: nearly the same as rows of another split",
    ),
    "empty-answer": Broken(
        _changed(7, answer="Multiply.\n#### "), "empty", True, [7],
        r"data.jsonl row 7: an empty answer.*fill in the answers, or leave the rows out",
    ),
    "long-answer": Broken(
        _changed(9, answer=f"#### {'one ' * 100}"), "length", True, [9],
        r"data.jsonl row 9: answers that do not fit behind their prompts into the context.* 64 tokens",
    ),
    "encoding": Broken(
        _raw_line(3, '{"question": "Où?", "answer": "ici"}'.encode("latin-1")), "encoding", True, [3],
        r"data.jsonl row 3: not UTF-8; write the file again in UTF-8",
    ),
    "mixed-columns": Broken(
        _changed(11, answer=42), "columns", True, [11],
        r"data.jsonl row 11: a number in the column 'answer', where most rows have a text; write all",
    ),
    "one-class": Broken(
        _one_class, "one class", True, list(range(1, 41)),
        r"rows 1, 2, 3, 4, 5 and 35 more: the answer of every row is 'yes'.*add rows with other",
    ),
    "contradiction": Broken(
        _added({**SOUND[1], "answer": "#### 5"}), "contradiction", True, [2, 41],
        r"data.jsonl rows 2, 41: the same prompt with different answers; keep the right ones",
    ),
    "invalid-json": Broken(
        _raw_line(8, b'{"question": "How ma'), "json", True, [8],
        r"data.jsonl row 8: no JSON; write one whole JSON object a line",
    ),
    "missing-column": Broken(
        _changed(6, answer=None, reply="12"), "columns", True, [6],
        r"data.jsonl row 6: no column 'answer' but question, reply; fill it in",
    ),
    "empty-split": Broken(
        _splits(SOUND, []), "empty split", True, [],
        r"40 usable rows and none in the split 'test'; add rows",
    ),
    "unknown-tokens": Broken(
        _changed(5, question="Wie viele Äpfel?"), "unknown tokens", False, [5],
        r"data.jsonl row 5: text that the tokenizer has no tokens for; write it in characters",
    ),
    "special-tokens": Broken(
        _changed(5, question="How many? <|end|>"), "special tokens", False, [5],
        r"data.jsonl row 5: text that is read as special tokens \(<\|end\|>\); take it out",
    ),
    "duplicate": Broken(
        _added(SOUND[0], SOUND[0]), "duplicate", False, [41, 42],
        r"data.jsonl rows 41, 42: a repetition of rows before; leave them out",
    ),
    "broken-characters": Broken(
        _changed(2, question="How many cafÃ©s?"), "encoding", False, [2],
        r"data.jsonl row 2: characters that come of a wrong decoding; read the source",
    ),
}  # fmt: skip
