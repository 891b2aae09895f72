"""Questions with reference answers from a file or folder, scored by their final number or text (GSM8K's form).

A reference answer ends in its result: what follows the last `####`, or all of it where there is none. A response
is right if its own result is the same: what follows its last `####`, or stands in its last `\\boxed{}`, or is its
last number.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from forge_core.config import EnvironmentConfig
from forge_core.environments import base
from forge_core.environments.question_files import PATH, Splits, find_splits, read_questions
from forge_core.environments.template import render

NAME = "question_answer"
_MARK = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Where questions and answers stand: `environment.params`, checked."""

    path: str
    """The file or folder."""
    question: str = "question"
    """Column of questions."""
    answer: str = "answer"
    """Column of reference answers."""
    split: str = "train"
    """Split that is trained on, where files are named after splits."""
    test_split: str | None = None
    """Split that is held out; None: `test` if there is one, a share by hash otherwise."""

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Questions:
        """As parameters say. Raises ValueError for others, and where no path is given or nothing lies there."""
        names = cls.__dataclass_fields__
        for name, value in params.items():
            if name not in names:
                raise ValueError(
                    f"environment.params.{name} = {value!r}: {NAME} takes {', '.join(names)}"
                )
            if not isinstance(value, str):
                raise ValueError(f"environment.params.{name} = {value!r} is no text: write a name")
        if "path" not in params:
            raise ValueError(
                f"{PATH} is not given: name a .jsonl, .csv, .parquet or .arrow file, or a folder, for {NAME}"
            )
        made = cls(**params)
        if not Path(made.path).expanduser().exists():
            raise ValueError(
                f"{PATH} {made.path!r} is no file and no folder: name one that is there"
            )
        return made

    def splits(self) -> Splits | None:
        """The dataset's own splits, if its files are named after some. Raises ValueError if it has not those named."""
        return find_splits(self.path, self.split, self.test_split)


class QuestionAnswerEnvironment:
    """A file or folder of rows. Each pass over the training questions has an order of its own."""

    def __init__(self, config: EnvironmentConfig, seed: int) -> None:
        questions = Questions.of(config.params)
        self._config = config
        self._seed = seed
        train, test = read_questions(
            questions.path, questions.question, questions.answer, questions.splits()
        )
        prompts = [self._prompt(i, *each) for i, each in enumerate(train)]
        if test is None:
            held_out = [p for p in prompts if base.is_held_out(p.text, config.test_fraction)]
        else:
            held_out = [self._prompt(i, *each) for i, each in enumerate(test)]
        self._test = list({prompt.text: prompt for prompt in held_out}.values())
        texts = {prompt.text for prompt in self._test}
        self._train = [prompt for prompt in prompts if prompt.text not in texts]
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
