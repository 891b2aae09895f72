"""All verifiers of a config: their scores, and the one reward that they make up."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from forge_core.config.verifiers import ScoringConfig, VerifierConfig
from forge_core.ensembles.reward import Probability
from forge_core.environments.base import Prompt
from forge_core.rewards import RewardError
from forge_core.verifiers.base import Response, Verifier

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one verifier gave one response."""

    name: str
    """Name of the verifier."""
    value: float
    """The score."""
    version: str
    """Version of the verifier."""
    seconds: float
    """What it took, of a group scored together an even share; 0 for one that was known."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of an ensemble, the score of each of its verifiers."""

    @property
    def values(self) -> dict[str, float]:
        """The score by the verifier's name, and after it those of an ensemble's verifiers as `NAME/VERIFIER`."""
        return {self.name: self.value} | {f"{self.name}/{n}": v for n, v in self.parts.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The reward of one response, and what it is made of."""

    reward: float
    """What is trained on."""
    scores: tuple[Score, ...]
    """One for each verifier that saw it, in the order in which they were asked."""


class Panel:
    """Verifiers by name, gates first, otherwise in the order of their names.

    What a gate does not let through, those after it do not see. A config is stored with its keys sorted, so that the
    order of its lines could not decide anything in a run that goes on.

    It may be called by several threads at the same time.
    """

    def __init__(
        self,
        verifiers: Mapping[str, tuple[VerifierConfig, Verifier]],
        scoring: ScoringConfig,
    ) -> None:
        self._verifiers = dict(
            sorted(verifiers.items(), key=lambda item: (item[1][0].gate is None, item[0]))
        )
        self._scoring = scoring
        self._known: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the verifiers, in the order in which they are asked."""
        return tuple(self._verifiers)

    def load(self) -> None:
        """Make all of them ready. Raises RewardError if that fails."""
        for _, verifier in self._verifiers.values():
            verifier.load()

    def close(self) -> None:
        """End what they have started."""
        for _, verifier in self._verifiers.values():
            verifier.close()

    def __call__(
        self, prompt: Prompt, responses: Sequence[Response], *, policy_version: float
    ) -> list[Scored]:
        """The rewards of one prompt's responses, by the weights for what `policy_version` has sampled.

        Raises RewardError, naming the verifier and the prompt, where one gives no finite number, and whatever else it
        raises: none of that is ever a reward.
        """
        scores: list[list[Score]] = [[] for _ in responses]
        is_closed = [False] * len(responses)
        for name, (config, verifier) in self._verifiers.items():
            seen = [i for i, closed in enumerate(is_closed) if not closed]
            given = self._ask(name, verifier, prompt, [responses[i] for i in seen])
            for i, score in zip(seen, given, strict=True):
                scores[i].append(score)
                is_closed[i] = config.gate is not None and score.value < config.gate
        return [
            Scored(reward=self._reward(each, closed, policy_version), scores=tuple(each))
            for each, closed in zip(scores, is_closed, strict=True)
        ]

    def _reward(self, scores: Sequence[Score], is_closed: bool, policy_version: float) -> float:
        if is_closed:
            return self._scoring.closed_reward
        if self._scoring.compose == "product":
            return math.prod(s.value for s in scores if self._verifiers[s.name][0].gate is None)
        weights = [self._verifiers[s.name][0].weight_at(policy_version) for s in scores]
        return math.fsum(w * s.value for w, s in zip(weights, scores, strict=True))

    def _ask(
        self, name: str, verifier: Verifier, prompt: Prompt, responses: Sequence[Response]
    ) -> list[Score]:
        keys = _keys(name, verifier, prompt, responses)
        with self._lock:
            values = {key: self._known[key] for key in keys if key in self._known}
        # Each once, though a group may have it often; all of them, if the verifier compares them.
        asked = {key: r for key, r in zip(keys, responses, strict=True) if key not in values}
        started = time.perf_counter()
        if asked:
            whole = list(asked.values()) if verifier.looks_at_each else list(responses)
            of = list(asked) if verifier.looks_at_each else keys
            given = verifier(prompt, whole)
            _check(name, prompt, given, len(whole))
            values.update(zip(of, given, strict=True))
            self._keep(dict(zip(of, given, strict=True)))
        share = (time.perf_counter() - started) / max(1, len(asked))
        return [
            Score(
                name=name,
                value=float(values[key]),
                version=verifier.version,
                seconds=share if key in asked and key not in keys[:i] else 0.0,
                parts=_parts_of(values[key]),
            )
            for i, key in enumerate(keys)
        ]

    def _keep(self, values: Mapping[str, float]) -> None:
        with self._lock:
            self._known.update(values)
            while len(self._known) > self._scoring.cache_entries:
                self._known.popitem(last=False)


def _parts_of(value: float) -> Mapping[str, float]:
    """What a score is made of, if it is an ensemble's."""
    return value.parts if isinstance(value, Probability) else {}


def _keys(
    name: str, verifier: Verifier, prompt: Prompt, responses: Sequence[Response]
) -> list[str]:
    """What scores are kept by: all that they depend on."""
    about = [name, verifier.version, prompt.prompt_id, prompt.text, prompt.answer, prompt.metadata]
    texts = [[response.text, response.token_ids] for response in responses]
    if verifier.looks_at_each:
        return [_digest([about, text]) for text in texts]
    return [_digest([about, texts, place]) for place in range(len(texts))]


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check(name: str, prompt: Prompt, given: Sequence[float], count: int) -> None:
    if len(given) == count and all(map(math.isfinite, given)):
        return
    raise RewardError(
        f"verifier {name!r} gave {list(given)} where {count} finite numbers are due, on the prompt "
        f"{prompt.text[:_SHOWN_CHARACTERS]!r}"
    )
