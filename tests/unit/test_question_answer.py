"""Questions from a file: splits, passes, the final answer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest

from forge_core.config import EnvironmentConfig
from forge_core.environments import Environment, load_environment

ROWS = [
    {"question": f"What is {i} times 1000?", "answer": f"Add zeros.\n#### {i},000"}
    for i in range(1, 90)
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def _environment(path: Path, seed: int = 0, **more: Any) -> Environment:
    params = {"path": str(path), **more.pop("params", {})}
    return load_environment(EnvironmentConfig(name="question_answer", params=params, **more), seed)


def test_each_pass_sees_every_training_question_once_in_an_order_of_its_own(file: Path) -> None:
    environment = _environment(file)
    held_out = {prompt.text for prompt in environment.test_prompts(1000)}
    num_train = len(ROWS) - len(held_out)
    passes = [
        [environment.train_prompt(n + epoch * num_train).text for n in range(num_train)]
        for epoch in range(2)
    ]
    assert set(passes[0]) == set(passes[1]) == {row["question"] for row in ROWS} - held_out
    assert passes[0] != passes[1]
    assert held_out
    other = _environment(file, seed=1)
    assert {prompt.text for prompt in other.test_prompts(1000)} == held_out
    assert [other.train_prompt(n).text for n in range(num_train)] != passes[0]
    assert environment.train_prompt(3) == _environment(file).train_prompt(3)


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("so\n#### 1,234", "It is 7 and then\n#### 1234", 1.0),
        ("so\n#### 1,234", "#### 1235", 0.0),
        ("#### 42", "thus \\boxed{42.0}, not 7", 1.0),
        ("#### 42", "first 42, then 43", 0.0),
        ("#### 42", "I get 41 + 1 = 42.", 1.0),
        ("#### -3", "the result is -3", 1.0),
        ("#### $18", "#### 18", 1.0),
        ("Paris", "#### paris ", 1.0),
        ("Paris", "London", 0.0),
        ("#### 42", "", 0.0),
        ("####", "", 0.0),
        ("#### nan", "#### nan", 1.0),
    ],
)
def test_results_are_compared_not_ways(
    tmp_path: Path, answer: str, response: str, reward: float
) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"question": "How many?", "answer": answer}))
    environment = _environment(file, test_fraction=1e-9)
    prompt = environment.train_prompt(0)
    assert environment.score(prompt, response) == reward
    assert environment.score(prompt, prompt.target) == (1.0 if answer != "####" else 0.0)


def test_a_large_csv_may_have_answers_of_several_lines(tmp_path: Path) -> None:
    answers = [f"First.\nThen.\n#### {i}" * 20 for i in range(5000)]
    table = pa.table({"question": [f"{i}?" for i in range(5000)], "answer": answers})
    pyarrow.csv.write_csv(table, str(tmp_path / "large.csv"))
    assert (tmp_path / "large.csv").stat().st_size > 2 * 2**20
    prompt = _environment(tmp_path / "large.csv").train_prompt(0)
    assert prompt.answer == answers[prompt.index]


def test_other_files_and_columns(tmp_path: Path) -> None:
    table = pa.table({"q": [f"{i}+1" for i in range(40)], "a": [i + 1 for i in range(40)]})
    pyarrow.csv.write_csv(table, str(tmp_path / "t.csv"))
    pyarrow.parquet.write_table(table, str(tmp_path / "t.parquet"))
    for name in ("t.csv", "t.parquet"):
        environment = _environment(
            tmp_path / name,
            params={"question": "q", "answer": "a"},
            prompt_template="Q: {question}\nA:",
        )
        prompt = environment.train_prompt(0)
        assert prompt.text == f"Q: {prompt.metadata['question']}\nA:"
        assert environment.score(prompt, f"#### {prompt.answer}") == 1.0


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"path": "nowhere.jsonl"}, "'nowhere.jsonl' is no file"),
        ({"path": 3}, "path = 3 is no text"),
        ({"part": "train"}, "part = 'train': question_answer takes path, question, answer, split"),
        (
            {"answer": "solution"},
            "answer = 'solution' is no column of .*, which has question, answer",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(file: Path, params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _environment(file, params=params)


def _rows(word: str, count: int = 40) -> list[dict[str, str]]:
    return [{"q": f"{word} {i}?", "a": str(i)} for i in range(count)]


COLUMNS = {"question": "q", "answer": "a"}


def _arrow(file: Path, rows: list[dict[str, str]]) -> None:
    """As `Dataset.save_to_disk` writes it."""
    table = pa.Table.from_pylist(rows)
    file.parent.mkdir(parents=True)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (file.parent / "state.json").write_text("{}")


@pytest.mark.parametrize("form", ["hub", "saved", "lines"])
def test_folders_of_datasets_keep_their_own_splits(tmp_path: Path, form: str) -> None:
    for split in ("train", "test", "validation"):
        rows = _rows(split)
        if form == "hub":
            for number in range(2):
                file = tmp_path / "data" / f"{split}-{number:05d}-of-00002.parquet"
                file.parent.mkdir(exist_ok=True)
                pyarrow.parquet.write_table(pa.Table.from_pylist(rows[number::2]), str(file))
        elif form == "saved":
            _arrow(tmp_path / split / "data-00000-of-00001.arrow", rows)
        else:
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    environment = _environment(tmp_path, params=COLUMNS)
    assert {environment.train_prompt(n).text for n in range(40)} == {r["q"] for r in _rows("train")}
    assert {p.text for p in environment.test_prompts(99)} == {r["q"] for r in _rows("test")}
    other = _environment(tmp_path, params={**COLUMNS, "test_split": "validation"})
    assert {p.text for p in other.test_prompts(99)} == {r["q"] for r in _rows("validation")}
    with pytest.raises(ValueError, match=r"split 'dev' is no split of .* test, train, validation"):
        _environment(tmp_path, params={**COLUMNS, "test_split": "dev"})


def test_of_one_split_alone_a_share_is_held_out_by_hash(tmp_path: Path) -> None:
    _arrow(tmp_path / "train" / "data-00000-of-00001.arrow", _rows("train"))
    environment = _environment(tmp_path, params=COLUMNS)
    held_out = {prompt.text for prompt in environment.test_prompts(99)}
    assert 0 < len(held_out) < 20
    assert held_out.isdisjoint(environment.train_prompt(n).text for n in range(99))
    assert held_out == {
        prompt.text
        for prompt in _environment(
            tmp_path / "train" / "data-00000-of-00001.arrow", params=COLUMNS
        ).test_prompts(99)
    }


def test_what_a_folder_holds_out_is_never_trained_on(tmp_path: Path) -> None:
    for split, rows in (("train", _rows("same") + _rows("other")), ("test", _rows("same"))):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    environment = _environment(tmp_path, params=COLUMNS)
    assert {environment.train_prompt(n).text for n in range(80)} == {
        row["q"] for row in _rows("other")
    }
    with pytest.raises(ValueError, match=r"question = 'question' is no column of .* q, a"):
        _environment(tmp_path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "gap.jsonl"
    broken.write_text('{"question": "a", ')
    empty.write_text('{"question": null, "answer": "b"}')
    for file, words in ((broken, "cannot be read"), (empty, "row 0 has the question None")):
        with pytest.raises(ValueError, match=words):
            _environment(file)
