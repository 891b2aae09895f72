"""Broken datasets: each is found, by its rows, before anything is started."""

from __future__ import annotations

import json
import logging
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from broken_datasets import BROKEN, Broken, sound_rows, write_lines

from flows.preflight import preflight
from forge_core.data_checks.columns import Columns, read_columns
from forge_core.data_checks.findings import DataReport
from forge_core.data_checks.report import check_dataset
from forge_core.data_checks.rows import read_raw
from forge_core.data_checks.tokens import Limits
from forge_core.settings import load_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like a model with a context of 64 tokens, a token a word of ASCII letters or digits."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"max_position_embeddings": 64}')
    (folder / "model.safetensors").write_bytes(b"")
    characters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = ["[UNK]", "<|end|>", *characters]
    words = {word for row in sound_rows() for text in row.values() for word in text.split()}
    vocabulary += sorted({"one", *words} - set(vocabulary))
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 1, "content": "<|end|>", "special": True, **special}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(vocabulary)},
            "unk_token": "[UNK]",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def limits(model: Path) -> Limits:
    return Limits(tokenizer=model / "tokenizer.json", context=64)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_each_is_found_with_its_rows_and_what_to_do(
    tmp_path: Path, model: Path, broken: Broken
) -> None:
    report = check_dataset(str(broken.make(tmp_path)), limits=limits(model))
    found = [each for each in report.findings if each.check == broken.check]
    assert len(found) == 1, report.findings
    assert found[0].blocks == broken.blocks
    assert sorted(row.number for row in found[0].rows) == broken.rows
    assert re.search(broken.words, found[0].says), found[0].says
    # Nothing else that would stop a run is seen in it.
    assert [each.check for each in report.blocking] == ([broken.check] if broken.blocks else [])


def test_nothing_is_found_in_sound_data(tmp_path: Path, model: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", sound_rows())
    report = check_dataset(str(file), limits=limits(model))
    assert report.findings == []
    assert report.figures["pairs_not_compared"] == 0
    assert report.figures["prompt_tokens"] == {"min": 8, "median": 8, "p95": 8, "max": 8}


@pytest.mark.parametrize("name", [name for name, each in BROKEN.items() if each.blocks])
def test_a_run_on_it_is_refused_before_anything_starts(
    tmp_path: Path, model: Path, name: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = BROKEN[name].make(folder)
    with pytest.raises(ValueError, match=BROKEN[name].words) as caught:
        _run_on(path, tmp_path, model)
    assert str(caught.value).startswith("environment.params.path: ")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "store").exists()


def test_what_may_be_meant_is_told_and_stops_nothing(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = BROKEN["duplicate"].make(tmp_path)
    with caplog.at_level(logging.WARNING):
        _run_on(path, tmp_path, model)
    (told,) = [record.message for record in caplog.records if "repetition" in record.message]
    assert told.startswith("environment.params.path: ")


def _run_on(path: Path, tmp_path: Path, model: Path) -> None:
    overrides = [
        f"model.path={model}", "environment.name=question_answer",
        f"environment.params.path={path}", "environment.test_fraction=0.2",
        "sampling.max_tokens=16", "warm_start.steps=0",
    ]  # fmt: skip
    config = load_config(preset="tiny", file=None, overrides=overrides)
    preflight(config, str(tmp_path / "store"))


def test_supervised_data_is_checked_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"{name}?", "completion": "yes"} for name in "abcdefghijkl"]
    rows[3]["completion"] = "x" * 50
    file = write_lines(tmp_path / "data.jsonl", rows)
    overrides = [f"warm_start.data={file}", "warm_start.steps=1", "warm_start.max_tokens=40"]
    config = load_config(preset="tiny", file=None, overrides=overrides)
    words = r"warm_start.data: .*data.jsonl row 4: more tokens than warm_start.max_tokens 40"
    with pytest.raises(ValueError, match=words):
        preflight(config, str(tmp_path / "store"))


def test_a_row_never_changes_its_split_when_others_are_added(tmp_path: Path) -> None:
    def splits(rows: list[dict[str, str]]) -> dict[str, str]:
        report = DataReport()
        raw = read_raw(str(write_lines(tmp_path / "data.jsonl", rows)), report)
        examples = read_columns(raw, Columns(), report, test_fraction=0.3)
        return {example.prompt: example.split for example in examples}

    few = splits(sound_rows()[10:20])
    many = splits(list(reversed(sound_rows())))
    assert few.items() <= many.items()
    assert set(many.values()) == {"train", "test"}


def test_other_numbers_are_another_question(tmp_path: Path) -> None:
    rows = [
        {"question": f"What is {number} times 1000, all told?", "answer": str(number * 1000)}
        for number in range(30)
    ]
    report = check_dataset(str(write_lines(tmp_path / "data.jsonl", rows)))
    assert report.findings == []


def test_csv_is_read_and_its_rows_are_counted_without_the_header(tmp_path: Path) -> None:
    lines = ['"Is it, or not?",yes', '"Two\nlines?",no', ",maybe"]
    (tmp_path / "data.csv").write_text("question,answer\n" + "\n".join(lines))
    report = check_dataset(str(tmp_path / "data.csv"), test_fraction=0.0, needs_test=False)
    assert [each.says for each in report.blocking] == [
        f"{tmp_path}/data.csv row 3: nothing is asked; fill in what is asked, or leave the rows out"
    ]


def test_the_command_reports_and_its_exit_code_tells(tmp_path: Path) -> None:
    sound = write_lines(tmp_path / "sound.jsonl", sound_rows())
    broken = BROKEN["contradiction"].make(tmp_path)

    def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", "doctor", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = doctor(str(sound))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing is wrong with it." in done.stdout
    done = doctor(str(broken), "--json")
    assert done.returncode == 1
    (finding,) = [each for each in json.loads(done.stdout)["findings"] if each["blocks"]]
    assert [row["row"] for row in finding["rows"]] == [2, 41]
    done = doctor(str(tmp_path / "nowhere.jsonl"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "neither a file nor a folder" in done.stderr
