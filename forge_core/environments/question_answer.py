"""Questions with reference answers from a file of the user's, scored by their final number or text (GSM8K's form).

A reference answer ends in its result: what follows the last `####`, or all of it where there is none. A response
is right if its own result is the same: what follows its last `####`, or stands in its last `\\boxed{}`, or is its
last number.
"""

from __future__ import annotations

import functools
import random
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from forge_core.config import EnvironmentConfig
from forge_core.environments import base
from forge_core.environments.template import render

NAME = "question_answer"
_PARAMS = {"path": None, "question": "question", "answer": "answer"}
"""Parameters and their defaults: the file, and which of its columns hold questions and answers."""
_MARK = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


class QuestionAnswerEnvironment:
    """A JSON-lines, CSV or Parquet file. Each pass over the training questions has an order of its own."""

    def __init__(self, config: EnvironmentConfig, seed: int) -> None:
        for name in config.params:
            if name not in _PARAMS:
                raise ValueError(
                    f"environment.params.{name} = {config.params[name]!r}: {NAME} takes {', '.join(_PARAMS)}"
                )
        params = {**_PARAMS, **config.params}
        if not isinstance(params["path"], str):
            raise ValueError(
                f"environment.params.path is not given: name a .jsonl, .csv or .parquet file for {NAME}"
            )
        self._config = config
        self._seed = seed
        prompts = [
            self._prompt(index, row[params["question"]], row[params["answer"]])
            for index, row in enumerate(_read(params))
        ]
        is_test = [base.is_held_out(prompt.text, config.test_fraction) for prompt in prompts]
        self._train = [p for p, held_out in zip(prompts, is_test, strict=True) if not held_out]
        test = [p for p, held_out in zip(prompts, is_test, strict=True) if held_out]
        self._test = list({prompt.text: prompt for prompt in test}.values())
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    @property
    def name(self) -> str:
        return NAME

    def train_prompt(self, ordinal: int) -> base.Prompt:
        if not self._train:
            raise ValueError(
                f"environment.test_fraction {self._config.test_fraction} leaves no question to train on: lower it"
            )
        epoch, place = divmod(ordinal, len(self._train))
        return self._train[self._order(epoch)[place]]

    def test_prompts(self, num_prompts: int) -> list[base.Prompt]:
        if not self._test:
            raise ValueError(
                f"environment.test_fraction {self._config.test_fraction} holds out no question: raise it"
            )
        return self._test[:num_prompts]

    def score(self, prompt: base.Prompt, response: str) -> float:
        return float(_is_same(_result_of_response(response), _result(prompt.answer)))

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._train)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order

    def _prompt(self, index: int, question: Any, answer: Any) -> base.Prompt:
        if not isinstance(question, str) or not question or answer is None:
            raise ValueError(
                f"environment.params.path: row {index} has the question {question!r} and the answer {answer!r}; "
                "give both"
            )
        answer = str(answer)
        text = render("prompt_template", self._config.prompt_template, question, {})
        return base.Prompt(
            prompt_id=base.prompt_id(NAME, text, answer),
            text=text,
            answer=answer,
            target=render("answer_template", self._config.answer_template, answer, {}),
            index=index,
            environment=NAME,
            metadata={"question": question},
        )


def _read(params: dict[str, Any]) -> list[dict[str, Any]]:
    """The file's rows. Raises ValueError that names what is wrong with it."""
    # Deferred: only this environment needs them, and they take a while.
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    path = Path(params["path"]).expanduser()
    readers = {
        ".jsonl": pyarrow.json.read_json,
        ".json": pyarrow.json.read_json,
        ".csv": functools.partial(
            pyarrow.csv.read_csv,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        ),
        ".parquet": functools.partial(pyarrow.parquet.read_table, use_threads=False),
    }
    if path.suffix not in readers or not path.is_file():
        raise ValueError(
            f"environment.params.path {params['path']!r} is no file with one of {', '.join(readers)}: name one"
        )
    try:
        table = readers[path.suffix](str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"environment.params.path {params['path']!r} cannot be read: {' '.join(str(error).split())}"
        ) from error
    for key in ("question", "answer"):
        if params[key] not in table.column_names:
            raise ValueError(
                f"environment.params.{key} = {params[key]!r} is no column of {params['path']}, which has "
                f"{', '.join(table.column_names)}"
            )
    rows: list[dict[str, Any]] = table.select(
        list(dict.fromkeys([params["question"], params["answer"]]))
    ).to_pylist()
    return rows


def _result(answer: str) -> str:
    return answer.rpartition(_MARK)[2].strip()


def _result_of_response(response: str) -> str:
    if _MARK in response:
        return _result(response)
    if boxed := _BOXED.findall(response):
        return str(boxed[-1]).strip()
    numbers = _NUMBER.findall(response)
    return numbers[-1] if numbers else response.strip()


def _is_same(given: str, wanted: str) -> bool:
    """Equal as numbers if both are numbers, else as text, case and blanks aside."""
    left, right = _number(given), _number(wanted)
    if left is not None and right is not None:
        return left == right
    return bool(wanted) and " ".join(given.lower().split()) == " ".join(wanted.lower().split())


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "").strip().strip("$%. "))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
