"""Verifiers in processes of their own: functions of TRL's signature, and math-verify, which is made one."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence

from forge_core.config.verifiers import MathParams
from forge_core.environments.base import Prompt
from forge_core.rewards import RewardLost, RewardPool
from forge_core.verifiers.base import Response
from forge_core.verifiers.text import extractor

OUT_OF_TIME = frozenset({int(signal.SIGPROF)})
"""What ends math-verify's process when a comparison takes too much processor time."""
_CRASHES = frozenset(map(int, (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE)))


class FunctionVerifier:
    """A function of the user's. It sees a prompt's responses together, and may compare them."""

    looks_at_each = False

    def __init__(self, pool: RewardPool, *, version: str) -> None:
        self._pool = pool
        self.version = version

    def __call__(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        return self._pool(prompt, [r.text for r in responses], [r.token_ids for r in responses])

    def load(self) -> None:
        self._pool.load()

    def close(self) -> None:
        self._pool.close()


class MathVerifier:
    """math-verify, one response at a time, so that it is known which of them it cannot finish: that one is wrong."""

    looks_at_each = True
    REFERENCE = "forge_core.verifiers.mathematics:equal"

    def __init__(self, pool: RewardPool, params: MathParams, *, version: str) -> None:
        self._pool = pool
        self._params = params
        self._of_response = extractor(params.extract)
        self._of_reference = extractor(params.extract_reference)
        self.version = version

    def __call__(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        wanted = self._of_reference(prompt.answer)
        if not wanted:
            return [0.0] * len(responses)
        asked = dataclasses.replace(
            prompt, answer=wanted, metadata={"cpu_seconds": self._params.cpu_seconds}
        )
        return [self._score(asked, response) for response in responses]

    def _score(self, prompt: Prompt, response: Response) -> float:
        answer = self._of_response(response.text)
        if not answer:
            return 0.0
        try:
            (score,) = self._pool(prompt, [answer], [()])
        except RewardLost as lost:
            # Its processor time was over, or it crashed of this, again and again. What was merely killed is no answer.
            if -(lost.exit_code or 0) in (*OUT_OF_TIME, *_CRASHES):
                return 0.0
            raise
        return score

    def load(self) -> None:
        self._pool.load()

    def close(self) -> None:
        self._pool.close()
