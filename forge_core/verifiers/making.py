"""From a config to its verifiers."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from forge_core.config import RunConfig
from forge_core.config.verifiers import (
    CodeParams,
    EnsembleParams,
    ExtractionParams,
    FormatParams,
    FunctionParams,
    Kind,
    LengthParams,
    MathParams,
    NumericParams,
    RegexParams,
    VerifierConfig,
)
from forge_core.environments import load_environment, question_answer
from forge_core.environments.base import Environment, Prompt
from forge_core.registration import VERIFIERS, environment_class, resolved
from forge_core.rewards import RewardPool
from forge_core.user_code import source_file
from forge_core.verifiers import text
from forge_core.verifiers.base import EachVerifier, Response, Verifier
from forge_core.verifiers.code import CodeScore
from forge_core.verifiers.ensemble import EnsembleVerifier
from forge_core.verifiers.function import OUT_OF_TIME, FunctionVerifier, MathVerifier
from forge_core.verifiers.panel import Panel

_BUILT_IN = "1"
"""Version of the verifiers in this package; raised with every change that may change a score."""
_MATH_SECONDS = 300.0
"""Until an answer of math-verify, which has its bound in processor time, is given up for another attempt."""


def make_panel(config: RunConfig, ensembles: Mapping[str, EnsembleVerifier] | None = None) -> Panel:
    """The verifiers of a config, `ensembles` being those that it names, by reference.

    Nothing is started before they are loaded or asked. Raises ValueError if its environment or a file does not resolve.
    """
    verifiers = config.verifiers
    if not verifiers and config.reward is not None:
        name = config.reward.rpartition(":")[2]
        kind: Kind = "ensemble" if "reward" in config.ensembles() else "function"
        verifiers = {name: VerifierConfig(kind=kind, params={"reference": config.reward})}
    elif not verifiers:
        return _environment_panel(config)
    known = ensembles or {}
    return Panel(
        {name: (each, _make(config, each, known)) for name, each in verifiers.items()},
        config.scoring,
    )


def make_evaluating_panel(config: RunConfig) -> Panel | None:
    """What scores held-out answers, where that is something else than what scores training.

    Raises ValueError as `make_panel` does.
    """
    is_other = config.reward is not None or bool(config.verifiers)
    if config.evaluation.scorer == "reward" or not is_other:
        return None
    return _environment_panel(config)


def _environment_panel(config: RunConfig) -> Panel:
    environment = _environment(config)
    return Panel(
        {environment.name: (VerifierConfig(kind="environment"), environment)}, config.scoring
    )


class EnvironmentVerifier:
    """The scorer of the environment that the prompts are of. Few of them may be asked by two threads at once."""

    looks_at_each = True

    def __init__(self, environment: Environment, *, version: str) -> None:
        self._environment = environment
        self.name = environment.name
        self._lock = threading.Lock()
        self.version = version

    def __call__(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        with self._lock:
            return [float(self._environment.score(prompt, r.text)) for r in responses]

    def load(self) -> None:
        pass

    def close(self) -> None:
        pass


def _make(
    config: RunConfig, verifier: VerifierConfig, ensembles: Mapping[str, EnsembleVerifier]
) -> Verifier:
    params = verifier.typed_params()
    made = _version(_BUILT_IN, params.model_dump(mode="json"))
    match params:
        case EnsembleParams():
            return ensembles[params.reference]
        case FunctionParams():
            reference = resolved("verifiers", VERIFIERS, params.reference)
            return FunctionVerifier(
                _pool(config, reference, config.timeouts.reward_seconds),
                version=_source_version(reference),
            )
        case MathParams():
            libraries = " ".join(f"{name} {version(name)}" for name in ("math-verify", "sympy"))
            pool = _pool(config, MathVerifier.REFERENCE, _MATH_SECONDS, OUT_OF_TIME)
            return MathVerifier(pool, params, version=f"{libraries} {made}")
        case NumericParams():
            score = text.compared(text.numeric(params), params.extract, params.extract_reference)
        case RegexParams():
            score = text.matches(params)
        case FormatParams():
            score = text.has_form(params)
        case LengthParams():
            score = text.soft_overlong(params, config.sampling.max_tokens)
            made = _version(_BUILT_IN, [params.model_dump(), config.sampling.max_tokens])
        case CodeParams():
            score = CodeScore(params)
        case ExtractionParams():
            is_same = text.is_exact if verifier.kind == "exact" else text.is_normalised
            score = text.compared(is_same, params.extract, params.extract_reference)
        case _:
            return _environment(config)
    return EachVerifier(score, version=made)


def _environment(config: RunConfig) -> EnvironmentVerifier:
    section = config.environment
    # Seeds order prompts and decide no score.
    environment = load_environment(section, config.seed)
    names = sorted({each.name for each in section.tasks.values()} or {section.name})
    software = " ".join(dict.fromkeys(map(_software, names)))
    about: object = section.params
    if section.tasks or section.curriculum.levels:
        about = section.model_dump(mode="json", include={"params", "tasks", "curriculum"})
    return EnvironmentVerifier(environment, version=_version(software, about))


def _software(name: str) -> str:
    """What decides the scores of an environment."""
    reference = environment_class("environment.name", name)
    if reference is not None:
        return _source_version(reference)
    if name == question_answer.NAME:
        return _BUILT_IN
    return f"reasoning-gym {version('reasoning-gym')}"


def _pool(
    config: RunConfig,
    reference: str,
    timeout_seconds: float,
    final_signals: frozenset[int] = frozenset(),
) -> RewardPool:
    return RewardPool(
        reference,
        timeout_seconds=timeout_seconds,
        startup_seconds=config.timeouts.startup_seconds,
        most=config.scoring.workers,
        attempts=config.scoring.attempts,
        final_signals=final_signals,
    )


def _source_version(reference: str) -> str:
    data = source_file("verifiers", reference).read_bytes()
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def _version(software: str, params: object) -> str:
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    return f"{software} {digest[:8]}"
