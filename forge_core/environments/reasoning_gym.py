"""Any task of the reasoning-gym package, by its name and parameters, scored by its own scorer.

The package's generators take a seed and an index, and item i+1 of seed s is item i of seed s+1. So
items come in chunks, each a data set of its own whose seed is hashed from the stream's name and the
chunk's number. Training and test are two such streams, each filtered by the hash of the rendered
prompt.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import math
from typing import Any

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from forge_core.config import EnvironmentConfig
from forge_core.environments import base
from forge_core.environments.jsonable import from_json, to_json
from forge_core.environments.template import render
from forge_core.registration import ENVIRONMENTS, registered_names

_CHUNK = 500
"""Items per data set: the package's default size; some tasks prepare all items of a set at once."""
_LONGEST_SEARCH = 10_000
"""Indices in a row without a prompt of a split after which there is taken to be none."""
_TASK_ERRORS = (
    SystemExit,  # some scorers evaluate the answer, which may say `exit()`
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the package's tasks raise about parameters that they cannot fulfil and answers that they cannot parse."""


class ReasoningGymEnvironment:
    """One task. Training prompts are found in order and kept, so that any ordinal can be asked again."""

    def __init__(self, config: EnvironmentConfig, seed: int) -> None:
        _check_name(config.name)
        self._config = config
        self._train_stream = f"train-{seed}"
        self._train: list[base.Prompt] = []
        self._next_index = 0
        # Few: streams are read in order, and a data set can hold all of its items.
        self._dataset = functools.lru_cache(maxsize=4)(self._make_dataset)
        self._scorer = self._dataset("score", 0)

    @property
    def name(self) -> str:
        return self._config.name

    def train_prompt(self, ordinal: int) -> base.Prompt:
        while len(self._train) <= ordinal:
            self._train.append(self._next_train_prompt())
        return self._train[ordinal]

    def train_prompt_at(self, ordinal: int) -> base.Prompt:
        """A training prompt with this ordinal of another order, for whose sake none before it is made.

        Raises ValueError if there is none.
        """
        for turn in range(_LONGEST_SEARCH):
            prompt = self._prompt(f"{self._train_stream}-{turn}", ordinal)
            if not base.is_held_out(prompt.text, self._config.test_fraction):
                return prompt
        raise self._none_to_train_on()

    def test_prompts(self, num_prompts: int) -> list[base.Prompt]:
        fraction = self._config.test_fraction
        found: dict[str, base.Prompt] = {}
        for index in range(1000 + math.ceil(4 * num_prompts / fraction)):
            if len(found) == num_prompts or (not found and index == _LONGEST_SEARCH):
                break
            prompt = self._prompt("test", index)
            if base.is_held_out(prompt.text, fraction):
                found.setdefault(prompt.text, prompt)
        if not found:
            raise ValueError(
                f"environment.test_fraction {fraction} holds out no prompt of {self.name}: raise "
                "it, or make the task more varied"
            )
        return list(found.values())

    def score(self, prompt: base.Prompt, response: str) -> float:
        entry = {
            "question": prompt.metadata["question"],
            "answer": prompt.answer,
            "metadata": from_json(prompt.metadata["fields"]),
        }
        try:
            return float(self._scorer.score_answer(response, entry))
        except _TASK_ERRORS:
            # Some scorers of the package raise on an answer they cannot parse, which is a wrong answer. One that
            # raises on the reference answer too is broken, and that is no reward.
            self._scorer.score_answer(prompt.answer, entry)
            return 0.0

    def _next_train_prompt(self) -> base.Prompt:
        for index in range(self._next_index, self._next_index + _LONGEST_SEARCH):
            prompt = self._prompt(self._train_stream, index)
            if not base.is_held_out(prompt.text, self._config.test_fraction):
                self._next_index = index + 1
                return prompt
        raise self._none_to_train_on()

    def _none_to_train_on(self) -> ValueError:
        return ValueError(
            f"environment.test_fraction {self._config.test_fraction} leaves no prompt of "
            f"{self.name} to train on: lower it, or make the task more varied"
        )

    def _prompt(self, stream: str, index: int) -> base.Prompt:
        item = self._item(stream, index)
        metadata = item.get("metadata", {})
        answer = "" if item["answer"] is None else str(item["answer"])
        text = render("prompt_template", self._config.prompt_template, item["question"], metadata)
        target = render("answer_template", self._config.answer_template, answer, metadata)
        return base.Prompt(
            prompt_id=base.prompt_id(self.name, text, answer),
            text=text,
            answer=answer,
            target=target,
            index=index,
            environment=self.name,
            metadata={"question": item["question"], "fields": to_json(metadata)},
        )

    def _item(self, stream: str, index: int) -> dict[str, Any]:
        chunk, offset = divmod(index, _CHUNK)
        try:
            return self._dataset(stream, chunk)[offset]
        except _TASK_ERRORS as error:
            raise ValueError(
                f"environment.params {self._config.params} make {self.name} fail: "
                f"{type(error).__name__}: {error}; change them"
            ) from error

    def _make_dataset(self, stream: str, chunk: int) -> ProceduralDataset:
        dataset_class, config_class = DATASETS[self.name]
        params = self._config.params
        names = sorted(
            {field.name for field in dataclasses.fields(config_class)} - {"seed", "size"}
        )
        for param in params:
            if param not in names:
                raise ValueError(
                    f"environment.params.{param} = {params[param]!r}: {self.name} takes "
                    f"{', '.join(names)}"
                )
        try:
            return dataset_class(config_class(**params, seed=_seed(stream, chunk), size=_CHUNK))
        except _TASK_ERRORS as error:
            raise ValueError(
                f"environment.params {params} are not accepted by {self.name}: {error}"
            ) from error


def _check_name(name: str) -> None:
    if name in DATASETS:
        return
    known = [*DATASETS, *registered_names(ENVIRONMENTS)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    mend = f"the nearest are {', '.join(near)}" if near else "such as chain_sum or number_sorting"
    raise ValueError(
        f"environment.name {name!r} is no task of reasoning-gym and not registered by an installed package: {mend}"
    )


def _seed(stream: str, chunk: int) -> int:
    """A data set's seed; with every index added it fits 32 bits, which is all that numpy takes."""
    digest = hashlib.sha256(f"forgeflow/{stream}/{chunk}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**32 - _CHUNK)
