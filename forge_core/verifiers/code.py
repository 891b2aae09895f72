"""Programs that a model wrote, run in the sandbox against tests that come with their prompt."""

from __future__ import annotations

import json
import secrets
from typing import Any

import regex

from forge_core.config.verifiers import CodeParams
from forge_core.environments.base import Prompt
from forge_core.rewards import RewardError
from forge_core.sandbox import Limits, Outcome, run_program
from forge_core.verifiers.base import Response

_FENCE = regex.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", regex.DOTALL)
_SHOWN_CHARACTERS = 200


class CodeScore:
    """1 where a response's program passes its prompt's tests.

    Tests are Python code, run after the program, that raises where it is wrong; or a list whose items are such code or
    `{"input": …, "output": …}`, texts for the standard input and of the standard output, blanks at the ends of lines
    aside. A list may be JSON text.
    """

    def __init__(self, params: CodeParams) -> None:
        self._params = params
        self._limits = Limits(
            seconds=params.seconds,
            cpu_seconds=params.cpu_seconds,
            memory_bytes=params.memory_mib * 2**20,
        )

    def __call__(self, prompt: Prompt, response: Response) -> float:
        program = program_of(response.text)
        tests = self._tests(prompt)
        passed = 0
        for number, test in enumerate(tests, 1):
            passed += self._passes(program, test)
            if passed < number and not self._params.partial:
                return 0.0
        return passed / len(tests)

    def _tests(self, prompt: Prompt) -> list[str | dict[str, str]]:
        field = self._params.tests
        # The fields of a reasoning-gym task lie one deeper.
        places = (prompt.metadata, prompt.metadata.get("fields") or {})
        found: Any = prompt.answer
        if field != "answer":
            found = next((place[field] for place in places if field in place), None)
        if isinstance(found, str) and found.lstrip().startswith("["):
            found = _json_list(found)
        tests = [found] if isinstance(found, str) and found.strip() else found
        if not isinstance(tests, list) or not tests or not all(map(_is_test, tests)):
            shown = repr(found)[:_SHOWN_CHARACTERS]
            raise RewardError(
                f"the tests of the prompt {prompt.text[:_SHOWN_CHARACTERS]!r} are {shown}: give Python code or a list "
                f"of inputs and outputs in {field!r}, or name another field in params.tests"
            )
        return tests

    def _passes(self, program: str, test: str | dict[str, str]) -> bool:
        if isinstance(test, str):
            # Told last of all, so that a program that ends itself has not passed.
            word = secrets.token_hex(16)
            outcome = self._run(f"{program}\n\n{test}\n\nprint({word!r})\n", "")
            return outcome.verdict == "ok" and outcome.stdout.rstrip().endswith(word.encode())
        outcome = self._run(program, test["input"])
        return outcome.verdict == "ok" and _lines(
            outcome.stdout.decode(errors="replace")
        ) == _lines(test["output"])

    def _run(self, program: str, stdin: str) -> Outcome:
        return run_program(
            program, stdin=stdin, limits=self._limits, packages=self._params.packages
        )


def program_of(text: str) -> str:
    """The last fenced block of a response, or all of it."""
    blocks = _FENCE.findall(text)
    return str(blocks[-1] if blocks else text)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _is_test(test: Any) -> bool:
    return isinstance(test, str) or (
        isinstance(test, dict)
        and all(isinstance(test.get(key), str) for key in ("input", "output"))
    )


def _json_list(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # a list in Python, to be evaluated by whoever wrote it
