"""What a report tells of a run, read from its log and its evaluations alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forge_core.quality.signs import signs
from forge_core.quality.steps import Quality, read_quality
from forge_core.timeline import Interval, merged
from storage import layout, log
from storage.facts import Evaluated
from storage.ledger import Ledger
from storage.objects import ObjectNotFound, ObjectStore
from storage.parts import read_part
from storage.runs import read_config
from storage.summary import summarize

_SAMPLES = 8
_FORMAL_KINDS = ("format", "regex")
"""Verifiers that say whether a response has the right form."""

Series = tuple[list[int], list[float]]
"""Steps and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One held-out prompt, answered before and after."""

    prompt: str
    answer: str
    before: str
    before_reward: float
    after: str
    after_reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run."""

    summary: dict[str, Any]
    """What run.json holds."""
    ledger: Ledger
    """Its log, folded."""
    samples: list[Sample]
    """The first held-out prompts that were answered both before and after."""
    quality: Quality
    """What its episodes say."""
    signs: list[str]
    """What in that speaks of reward hacking or collapse, a sentence each."""
    profiles: list[str]
    """Keys of traces and snapshots that profiled steps left."""

    @property
    def run_id(self) -> str:
        """Its id."""
        return str(self.summary["run_id"])

    def metric(self, name: str) -> Series:
        """A metric of steps, where it was measured."""
        steps = [step for step in self._steps() if name in step.metrics]
        return [step.step for step in steps], [step.metrics[name] for step in steps]

    def told(self, *prefixes: str) -> dict[str, Series]:
        """Figures of the run's episodes by step, of all names that begin so."""
        return {
            name: (list(values), list(values.values()))
            for name, values in self.quality.series.items()
            if name.startswith(prefixes)
        }

    def environments(self) -> dict[str, Series]:
        """Mean reward by environment, where there are several."""
        found = self.told("environment/")
        return found if len(found) > 1 else {}

    def ages(self) -> dict[str, Series]:
        """Largest and mean age of each step's groups, in versions."""
        ages = [
            (step.step, step.age_max, step.age_mean)
            for step in self._steps()
            if step.age_max is not None and step.age_mean is not None
        ]
        numbers = [number for number, *_ in ages]
        return {
            "age/max": (numbers, [float(largest) for _, largest, _ in ages]),
            "age/mean": (numbers, [mean for *_, mean in ages]),
        }

    def parity(self) -> dict[str, Series]:
        """Difference of trainer and generator at each publish, in nats."""
        told = [(p.policy_version, p.parity) for p in self.ledger.published if p.parity]
        versions = [version for version, _ in told]
        return {
            "parity/max": (versions, [parity.max for _, parity in told]),
            "parity/mean": (versions, [parity.mean for _, parity in told]),
        }

    def evaluations(self) -> dict[str, Series]:
        """Scores on held-out prompts by policy version."""
        told = sorted(self.ledger.evaluated.values(), key=lambda each: each.policy_version)
        versions = [each.policy_version for each in told]
        return {
            "sampled": (versions, [each.sampled for each in told]),
            "greedy": (versions, [each.greedy for each in told]),
        }

    def passed(self) -> dict[str, Series]:
        """Of held-out prompts the probability that one of k samples is right, by policy version."""
        told = sorted(self.ledger.evaluated.values(), key=lambda each: each.policy_version)
        found: dict[str, Series] = {}
        for each in told:
            for passed in each.pass_at:
                versions, values = found.setdefault(f"pass@{passed.k}", ([], []))
                versions.append(each.policy_version)
                values.append(passed.probability)
        return found

    def intervals(self) -> dict[str, list[Interval]]:
        """By mesh, what it did, in seconds since the run began; stretches of one kind that touch are one."""
        first = (
            self.ledger.incarnations[0].controller.claimed_at if self.ledger.incarnations else 0.0
        )
        return {
            mesh: merged(
                Interval(kind=each.kind, start=each.start - first, end=each.end - first)
                for each in sorted(intervals, key=lambda each: each.start)
            )
            for mesh, intervals in sorted(self.ledger.meshes.items())
        }

    def _steps(self) -> Iterator[Any]:
        return (self.ledger.steps[number] for number in sorted(self.ledger.steps))


def read_run(store: ObjectStore, run_id: str) -> RunData:
    """Everything that a report of the run tells.

    Raises ValueError if the run does not exist or its log is unreadable.
    """
    config = read_config(store, run_id)
    ledger = Ledger.fold(log.read_entries(store, run_id), log.read_incarnations(store, run_id))
    verifiers = config.get("verifiers", {})
    formal = [name for name, each in verifiers.items() if each["kind"] in _FORMAL_KINDS]
    quality = read_quality(store, ledger, well_formed=formal)
    return RunData(
        summary=summarize(run_id, config, ledger),
        quality=quality,
        signs=signs(quality.series, _metrics(ledger), _held_out(ledger)),
        ledger=ledger,
        samples=_samples(store, ledger),
        profiles=store.keys(layout.profiles_folder(run_id)),
    )


def _metrics(ledger: Ledger) -> dict[str, dict[int, float]]:
    """Step metrics by name and step."""
    found: dict[str, dict[int, float]] = {}
    for number in sorted(ledger.steps):
        for name, value in ledger.steps[number].metrics.items():
            found.setdefault(name, {})[number] = value
    return found


def _held_out(ledger: Ledger) -> list[float]:
    told = sorted(ledger.evaluated.values(), key=lambda each: each.policy_version)
    return [each.sampled for each in told]


def _samples(store: ObjectStore, ledger: Ledger) -> list[Sample]:
    initial, final = ledger.evaluated.get("initial"), ledger.evaluated.get("final")
    if initial is None or final is None:
        return []
    before, after = _answers(store, initial), _answers(store, final)
    common = [prompt_id for prompt_id in before if prompt_id in after]
    return [
        Sample(
            prompt=before[prompt_id]["prompt"],
            answer=before[prompt_id]["answer"],
            before=before[prompt_id]["response"],
            before_reward=before[prompt_id]["reward"],
            after=after[prompt_id]["response"],
            after_reward=after[prompt_id]["reward"],
        )
        for prompt_id in common[:_SAMPLES]
    ]


def _answers(store: ObjectStore, evaluated: Evaluated) -> dict[str, dict[str, Any]]:
    """By prompt id, in order, the samples that were drawn as in training; none if a part is gone."""
    columns = ["prompt_id", "prompt", "answer", "response", "reward", "sample"]
    try:
        rows = [
            row for part in evaluated.parts for row in read_part(store, part, columns).to_pylist()
        ]
    except (ObjectNotFound, ValueError):
        return {}
    return {row["prompt_id"]: row for row in rows if row["sample"] == 0}
