"""An ensemble as a reward: its verifiers score the samples of a prompt, and their scores become one probability."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forge_core.config import EnvironmentConfig
from forge_core.ensembles.posterior import posterior, used_verifiers
from forge_core.environments import load_environment
from forge_core.environments.base import Environment, Prompt
from forge_core.rewards import RewardError, RewardProcess
from forge_core.user_code import check_reference
from storage.annotations import find_scores, read_scores, read_set
from storage.ensembles import Ensemble, FittedVerifier
from storage.objects import ObjectStore
from storage.records import Commit


class Probability(float):
    """What an ensemble gives a sample, with what it is made of."""

    parts: dict[str, float]
    """Score by verifier."""

    def __new__(cls, value: float, parts: Mapping[str, float]) -> Probability:
        """The number itself, which remembers `parts`."""
        made = super().__new__(cls, value)
        made.parts = dict(parts)
        return made


class EnsembleReward:
    """A fitted ensemble, and what its verifiers need to score.

    Reward functions run in processes of their own, all at the same time; environments score in this one.

    Example:
        with EnsembleReward(ensemble, seed=0, timeout_seconds=60) as reward:
            probabilities = reward(prompt, completions, completion_ids)
    """

    def __init__(self, ensemble: Ensemble, *, seed: int, timeout_seconds: float) -> None:
        self.ensemble = ensemble
        self._seed = seed
        self._functions: dict[str, RewardProcess] = {}
        self._environments: dict[str, EnvironmentConfig] = {}
        self._loaded: dict[str, Environment] = {}
        for each in used_verifiers(ensemble):
            if each.environment is None:
                self._functions[each.name] = RewardProcess(
                    each.verifier, timeout_seconds=timeout_seconds
                )
            else:
                section = EnvironmentConfig.model_validate(each.environment)
                self._environments[each.name] = section
        # Threads that last: the kernel ends a process with the thread that started it.
        self._threads = ThreadPoolExecutor(max(1, len(self._functions)))

    def __enter__(self) -> EnsembleReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def load(self) -> None:
        """Start the processes and import what scores. Raises RewardError if that fails, or a file has changed."""
        for each in used_verifiers(self.ensemble):
            try:
                check_source(each)
            except ValueError as error:
                raise RewardError(f"ensemble {self.ensemble.reference!r}: {error}") from None
        list(self._threads.map(RewardProcess.load, self._functions.values()))
        for name in self._environments:
            self._environment(name)

    def __call__(
        self,
        prompt: Prompt,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        given: Mapping[str, Sequence[float]] | None = None,
    ) -> list[Probability]:
        """The probability that each of a prompt's completions is right.

        `given` has the scores of verifiers that gave them before, by name; those are not asked. Raises RewardError,
        naming the verifier, if one gives anything but one finite number each.
        """
        scores = dict(given or {})
        asked = {
            name: self._threads.submit(function, prompt, completions, completion_ids)
            for name, function in self._functions.items()
            if name not in scores
        }
        try:
            for name in self._environments.keys() - scores.keys():
                scores[name] = [self._score(name, prompt, text) for text in completions]
        finally:
            # Waited for in any case: a process answers one prompt after another.
            answers = {name: future.exception() for name, future in asked.items()}
        for name, error in answers.items():
            if error is not None:
                raise error
            scores[name] = asked[name].result()
        return [
            Probability(each, {name: float(of[i]) for name, of in scores.items()})
            for i, each in enumerate(posterior(self.ensemble, scores).tolist())
        ]

    def stop(self) -> None:
        """End the processes."""
        for function in self._functions.values():
            with contextlib.suppress(ProcessLookupError):
                function.stop()
        self._threads.shutdown()

    def _environment(self, name: str) -> Environment:
        if name not in self._loaded:
            self._loaded[name] = load_environment(self._environments[name], self._seed)
        return self._loaded[name]

    def _score(self, name: str, prompt: Prompt, completion: str) -> float:
        try:
            score = float(self._environment(name).score(prompt, completion))
        except OSError:  # may be the machine's, and mend itself
            raise
        except Exception as error:
            raise RewardError(
                f"verifier {name!r} of ensemble {self.ensemble.reference!r} raised {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(score):
            raise RewardError(
                f"verifier {name!r} of ensemble {self.ensemble.reference!r} gave {score}; a score must be a finite "
                "number"
            )
        return score


def check_source(verifier: FittedVerifier) -> None:
    """Raise ValueError unless the file that a verifier is defined in is there, as it was when it was fitted."""
    if verifier.source is None:
        return
    path: Path = check_reference(f"verifier {verifier.name!r}", verifier.verifier)
    if hashlib.sha256(path.read_bytes()).hexdigest() != verifier.source.sha256:
        raise ValueError(
            f"verifier {verifier.name!r} is in {path}, which has changed since it was fitted: fit the ensemble anew, "
            f"or put back the file, which is kept at {verifier.source.key}"
        )


def stored_scores(
    store: ObjectStore, commit: Commit, ensemble: Ensemble
) -> dict[str, dict[str, float]]:
    """What the store has of the scores that an ensemble's verifiers gave a commit's episodes, by verifier and episode.

    They count if the run has a set of the verifier's name that the same verifier has made. Raises ValueError if scores
    are damaged.
    """
    found = {}
    for each in used_verifiers(ensemble):
        if find_scores(store, commit, each.name) is None:
            continue
        decides = each.scorer, each.environment, each.source and each.source.sha256
        if read_set(store, commit.run_id, each.name).decides == decides:
            found[each.name] = read_scores(store, commit, each.name)
    return found
