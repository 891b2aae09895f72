"""A fitted ensemble of weak verifiers, as one verifier."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from forge_core.ensembles.reward import EnsembleReward, Probability
from forge_core.environments.base import Prompt
from forge_core.verifiers.base import Response


class EnsembleVerifier:
    """It asks its own verifiers at the same time, and scores one prompt after another."""

    looks_at_each = False

    def __init__(self, reward: EnsembleReward) -> None:
        self._reward = reward
        self._lock = threading.Lock()
        self.ensemble = reward.ensemble
        self.version = f"ensemble {self.ensemble.reference}"

    def __call__(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        return [*self.score(prompt, responses, {})]

    def score(
        self,
        prompt: Prompt,
        responses: Sequence[Response],
        given: Mapping[str, Sequence[float]],
    ) -> list[Probability]:
        """As called, without asking those of its verifiers whose scores are given, by their names."""
        with self._lock:
            texts, token_ids = [r.text for r in responses], [r.token_ids for r in responses]
            return self._reward(prompt, texts, token_ids, given)

    def load(self) -> None:
        self._reward.load()

    def close(self) -> None:
        self._reward.stop()
