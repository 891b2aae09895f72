"""Supervised data: read with faults named, masked to what the assistant wrote, split by hash, stopped in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_core.algorithms.batch import Sequence
from forge_core.config import WarmStartConfig
from forge_core.model import EOS, build_tokenizer
from forge_core.supervised.encoding import encode
from forge_core.supervised.examples import Example, read_examples
from forge_core.supervised.files import Row, data_files, read_rows
from forge_core.supervised.order import Data, load_data
from forge_core.supervised.split import check_data, split_examples
from forge_core.supervised.training import SupervisedTraining

PAIRS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(60)]
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}" + EOS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = "{% for m in messages[-1:] %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
ROW = Row(file="data.jsonl", number=3, values={})


@pytest.fixture
def tokenizer() -> Any:
    """The tiny model's, which has no chat template."""
    return build_tokenizer(128)


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def settings(path: str | None, **more: Any) -> WarmStartConfig:
    return WarmStartConfig.model_validate({"steps": 5, "data": path, **more})


def test_json_lines_parquet_and_arrow_say_the_same(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(PAIRS)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    lines(tmp_path / "rows.jsonl", PAIRS)
    for name in ("rows.jsonl", "rows.parquet", "rows.arrow", "file.arrow"):
        rows = list(read_rows(str(tmp_path / name), "train"))
        assert [row.values for row in rows] == PAIRS
        assert [row.number for row in rows] == list(range(1, 61))


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"], 2),
        (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], 1),
        (["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"], 2),
        (["train.jsonl", "test.jsonl"], 1),
    ],
)  # fmt: skip
def test_a_dataset_folder_gives_the_files_of_its_split(
    tmp_path: Path, files: list[str], chosen: int
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = data_files(str(tmp_path), "train")
    assert [str(file.relative_to(tmp_path)) for file in found] == files[:chosen]


def test_a_path_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"ends in '.csv': give a file that ends in \.jsonl"):
        data_files(str(tmp_path / "a.csv"), "train")
    with pytest.raises(ValueError, match="has no file that ends in"):
        data_files(str(tmp_path), "train")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        data_files(str(tmp_path / "none"), "train")
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ValueError, match="has splits train and no 'test': name one of them"):
        data_files(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "row 2 has text: it needs messages, or prompt and completion"),
        ({"prompt": "a", "completion": None}, "row 2 has prompt: it needs"),
        ({"prompt": 1, "completion": "a"}, "row 2 has a prompt that is a int"),
        ({"prompt": "a", "completion": ""}, "row 2 has an empty completion"),
        ({"messages": []}, "row 2 has messages that are no list"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"messages\[0\] of role 'bot'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, r"messages\[0\] whose content is a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "none is the assistant's"),
        (["a"], "row 2 is a list: write one object a line"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_example_is_named_with_its_file(
    tmp_path: Path, row: Any, said: str
) -> None:
    path = lines(tmp_path / "rows.jsonl", [PAIRS[0], row])
    with pytest.raises(ValueError, match=said) as refused:
        check_data(settings(path))
    assert str(refused.value).startswith(f"warm_start.data: {path} row 2")


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    with pytest.raises(ValueError, match=r"a\.jsonl row 2 is no JSON"):
        check_data(settings(str(tmp_path / "a.jsonl")))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read after row 0"):
        check_data(settings(str(tmp_path / "a.parquet")))


def test_only_what_the_assistant_wrote_is_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    asked = ("system", "S"), ("user", "1?")
    messages = (*asked, ("assistant", "one"), ("user", "2?"), ("assistant", "two"), ("user", "3?"))
    sequence = encode(
        tokenizer, Example(row=ROW, messages=messages), max_tokens=200, limit="a limit"
    )
    full = f"[system]S[user]1?[assistant]one{EOS}[user]2?[assistant]two{EOS}"
    assert tokenizer.decode(sequence.token_ids) == full
    answer = sequence.token_ids[sequence.num_prompt_tokens :]
    learned = [token for token, counts in zip(answer, sequence.mask, strict=True) if counts]
    assert tokenizer.decode(learned) == f"one{EOS}two{EOS}"


def test_a_pair_is_a_prompt_and_its_answer(tokenizer: Any) -> None:
    example = Example(row=ROW, prompt="1+1=", completion="2")
    sequence = encode(tokenizer, example, max_tokens=200, limit="a limit")
    assert tokenizer.decode(sequence.token_ids) == f"1+1=2{EOS}"
    assert (sequence.num_prompt_tokens, sequence.mask) == (4, [True, True])


def test_what_cannot_be_masked_or_does_not_fit_is_refused_by_row(tokenizer: Any) -> None:
    chat = Example(row=ROW, messages=(("user", "a"), ("assistant", "b")))
    more = Example(row=ROW, messages=(*chat.messages, ("user", "c"), ("assistant", "d")))
    with pytest.raises(ValueError, match=r"data\.jsonl row 3 has messages, and the tokenizer no"):
        encode(tokenizer, chat, max_tokens=200, limit="a limit")
    pair = Example(row=ROW, prompt="1+1=", completion="2")
    with pytest.raises(ValueError, match=r"row 3 has 6 tokens, more than a limit: raise it"):
        encode(tokenizer, pair, max_tokens=5, limit="a limit")
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match="row 3: the chat template changes earlier text"):
        encode(tokenizer, more, max_tokens=200, limit="a limit")


def test_the_split_goes_by_what_is_asked_and_by_nothing_else(tmp_path: Path) -> None:
    rows = [*PAIRS, *({**row, "completion": "?"} for row in PAIRS)]
    forward = lines(tmp_path / "forward.jsonl", rows)
    backward = lines(tmp_path / "backward.jsonl", rows[::-1][:70])
    config = settings(forward, validation_fraction=0.25)
    train, held_out = split_examples(read_examples(forward, "train"), config)
    asked = {example.asked for example in held_out}
    assert not asked & {example.asked for example in train}
    assert len(train) + len(held_out) == 120 and 14 <= len(held_out) <= 46
    _, again = split_examples(read_examples(backward, "train"), config)
    assert {example.asked for example in again} <= asked
    with pytest.raises(ValueError, match="leaves none of 1 rows to validate with"):
        split_examples(train[:1], config)
    with pytest.raises(ValueError, match="leaves no row to train on"):
        split_examples(held_out, config)


def test_each_pass_has_every_row_once_in_an_order_of_its_own(
    tmp_path: Path, tokenizer: Any
) -> None:
    config = settings(lines(tmp_path / "rows.jsonl", PAIRS), validation_fraction=0.2)
    data = load_data(config, tokenizer, 7, context_length=64)
    number = len(data.train)
    passes = [
        [tuple(data.batch(step, 1)[0].token_ids) for step in range(first, first + number)]
        for first in (0, number)
    ]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(tuple(s.token_ids) for s in data.train)
    assert passes[0] != passes[1]
    steps = [sequence for step in range(4) for sequence in data.batch(step, number // 2)]
    assert [tuple(sequence.token_ids) for sequence in steps[:number]][: number // 2] == passes[0][
        : number // 2
    ]
    other = Data(train=data.train, validation=[], seed=8)
    assert data.batch(0, number) == data.batch(0, number) != other.batch(0, number)
    with pytest.raises(ValueError, match="more than the model's context of 5"):
        load_data(config, tokenizer, 7, context_length=5)


class Learner:
    """Learns to a step and then forgets again, as one that overfits."""

    def __init__(self, losses: list[float], fails_at: int | None = None) -> None:
        self.losses, self.fails_at = losses, fails_at
        self.weights = 0
        self.trained: list[int] = []

    def supervised_step(self, step: int, sequences: list[Sequence]) -> float:
        if step == self.fails_at:
            self.fails_at = None
            raise OSError("lost")
        self.weights = step + 1
        self.trained.append(step)
        return 1.0 / (step + 1)

    def supervised_loss(self, sequences: list[Sequence]) -> float:
        return self.losses[self.weights]

    def keep(self) -> Any:
        learner, kept = self, self.weights

        class Kept:
            def undo(self) -> None:
                learner.weights = kept

        return Kept()


def train(learner: Learner, held_out: int = 1, **more: Any) -> SupervisedTraining:
    config = WarmStartConfig.model_validate(
        {"data": "x", "validation_fraction": 0.1, "validate_every": 2, **more}
    )
    sequence = Sequence(token_ids=[1, 2], num_prompt_tokens=1, mask=[True])
    return SupervisedTraining(cast(Any, learner), config, lambda _: [], [sequence] * held_out)


def test_the_best_weights_are_taken_and_training_stops_in_time() -> None:
    learner = Learner([9.0, 0.0, 5.0, 0.0, 3.0, 0.0, 4.0, 0.0, 3.0, 0.0, 1.0])
    training = train(learner, steps=10, patience=2)
    training.run()
    assert training.validations == [(0, 9.0), (2, 5.0), (4, 3.0), (6, 4.0), (8, 3.0)]
    assert (training.steps, training.best_step, learner.weights) == (8, 4, 4)
    learner = Learner([9.0, 0.0, 5.0, 0.0, 3.0, 0.0, 4.0, 0.0, 3.0, 0.0, 1.0])
    training = train(learner, steps=9)
    learner.losses[9] = 2.0
    training.run()
    assert training.validations[-1] == (9, 2.0), "the last step is validated, too"
    assert (training.steps, training.best_step, learner.weights) == (9, 9, 9)


def test_a_start_that_broke_off_goes_on_and_learns_nothing_twice() -> None:
    learner = Learner([9.0, 0.0, 5.0, 0.0, 3.0, 0.0, 4.0], fails_at=3)
    training = train(learner, steps=6)
    with pytest.raises(OSError, match="lost"):
        training.run()
    training.run()
    assert learner.trained == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in training.validations] == [0, 2, 4, 6]
    assert learner.weights == training.best_step == 4


def test_without_validation_the_last_weights_are_taken() -> None:
    learner = Learner([])
    training = train(learner, held_out=0, steps=3)
    training.run()
    assert (learner.weights, training.best_step, training.validations) == (3, None, [])
    assert training.loss == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": "a.jsonl"}, "data 'a.jsonl' is trained on in steps, and steps is 0"),
        ({"validation_fraction": 0.1, "steps": 1}, "validation_fraction 0.1 is a share of data"),
        ({"data": "a", "steps": 1, "patience": 2}, "patience 2 waits for validations"),
    ],
)
def test_settings_that_do_nothing_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WarmStartConfig.model_validate(given)
