"""Figures of a run by step, from the episodes of all groups that were considered for it, dropped ones among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forge_core.ensembles.scales import fit_scale
from forge_core.quality.estimates import (
    RIGHT_ABOVE,
    disagreement,
    distinct,
    pass_at_k,
    powers_of_two,
    repetition,
    repetitions,
)
from storage.episodes import columns_schema
from storage.ledger import Ledger
from storage.objects import ObjectNotFound, ObjectStore
from storage.parts import CommitReader
from storage.records import Commit, read_record

MOST_STEPS = 200
"""Steps that are looked at, evenly spread over the run: what a report costs does not grow with the run."""
_MANY_GRAM = 4
_SAMPLES_OF_A_KIND = 2
_COLUMNS = [
    "group_id",
    "environment",
    "response_token_ids",
    "finish_reason",
    "reward",
    "scores",
    "attempts",
]
_TEXTS = ["prompt", "answer", "response"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """An episode of the last step, and why it is shown."""

    why: str
    """What it stands out by."""
    prompt: str
    """The prompt."""
    answer: str | None
    """The reference answer."""
    response: str
    """What the policy wrote."""
    reward: float
    """Its reward."""
    scores: dict[str, float]
    """Score by verifier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Groups that came to the same end."""

    reason: str
    """`trained`, or what they were dropped as."""
    groups: int
    """Number of them."""
    length_mean: float | None
    """Mean length of their responses in tokens, of those that were looked at; None if none had any."""
    length_max: int | None
    """The longest of those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a run's episodes say."""

    series: dict[str, dict[int, float]] = field(default_factory=dict)
    """Values by step, by name. Names with a `/` before a verifier's or environment's name: `verifier/NAME`."""
    samples: tuple[StepSample, ...] = ()
    """Of the last step."""
    drops: tuple[Outcome, ...] = ()
    """What became of its groups, those that were trained on first."""
    unreadable: tuple[str, ...] = ()
    """Commits whose episodes are gone or damaged, and not among the figures."""


def read_quality(store: ObjectStore, ledger: Ledger, *, well_formed: Sequence[str] = ()) -> Quality:
    """Figures of a run, from what of its episodes can be read.

    Args:
        store: keeps the run.
        ledger: its log, folded.
        well_formed: verifiers that say whether a response has the right form, by a score above 0.
    """
    groups_of: dict[int, list[str]] = defaultdict(list)
    for group_id, step in _steps_of_groups(ledger).items():
        groups_of[step].append(group_id)
    chosen = _spread(sorted(groups_of), MOST_STEPS)
    reader = _Reader(store, ledger)
    series: dict[str, dict[int, float]] = defaultdict(dict)
    lengths: dict[str, list[int]] = defaultdict(list)
    scores: dict[int, dict[str, np.ndarray]] = {}
    for step in chosen:
        table = reader.read(groups_of[step], _COLUMNS)
        if table.num_rows == 0:
            continue
        scores[step] = _scores(table)
        for name, value in _figures(table, scores[step], well_formed).items():
            series[name][step] = value
        for group_id, length in zip(
            table["group_id"].to_pylist(), _lengths(table).tolist(), strict=True
        ):
            lengths[group_id].append(length)
    judged = _votes_by_verifier(scores)
    for step, of_step in judged.items():
        if (share := disagreement(of_step)) is not None:
            series["disagreement"][step] = share
    samples: tuple[StepSample, ...] = ()
    if scores:
        last = max(scores)
        shown = reader.read(groups_of[last], [*_COLUMNS, *_TEXTS])
        samples = tuple(_samples(shown, judged[last]))
    return Quality(
        series=dict(sorted(series.items())),
        samples=samples,
        drops=_drops(ledger, lengths),
        unreadable=tuple(sorted(reader.unreadable)),
    )


class _Reader:
    """Episodes of groups, without those whose commits cannot be read, which it notes."""

    def __init__(self, store: ObjectStore, ledger: Ledger) -> None:
        self.unreadable: set[str] = set()
        self._store, self._ledger = store, ledger
        self._commits = CommitReader(store)

    def read(self, group_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        wanted = pa.array(sorted(group_ids), pa.string())
        tables = [columns_schema(columns).empty_table()]
        for key in dict.fromkeys(str(self._ledger.groups[each].commit) for each in group_ids):
            try:
                table = self._commits.read(read_record(self._store, key, Commit), columns)
            except (ObjectNotFound, ValueError):
                self.unreadable.add(key)
                continue
            tables.append(table.filter(pc.is_in(table["group_id"], wanted)))
        return pa.concat_tables(tables)


def _steps_of_groups(ledger: Ledger) -> dict[str, int]:
    """The step that each committed group was first considered for."""
    steps = {}
    for group_id, group in ledger.groups.items():
        step = group.steps[0] if group.steps else group.dropped_at
        if step is not None and group.commit is not None:
            steps[group_id] = step
    return steps


def _spread(steps: list[int], most: int) -> list[int]:
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _votes_by_verifier(scores: Mapping[int, Mapping[str, np.ndarray]]) -> dict[int, np.ndarray]:
    """By step, the vote of each verifier on each episode, (n, k); NaN where it has seen none.

    What counts as a vote is read off all of the run's scores, so that it means the same at each step.
    """
    names = sorted({name for of_step in scores.values() for name in of_step})
    sizes = {step: len(next(iter(of.values()))) if of else 0 for step, of in scores.items()}
    judged = {step: np.full((sizes[step], len(names)), np.nan) for step in scores}
    for column, name in enumerate(names):
        seen = [of[name][~np.isnan(of[name])] for of in scores.values() if name in of]
        threshold = fit_scale(np.concatenate(seen)).threshold
        for step, of in scores.items():
            if name in of:
                for_it = np.where(of[name] > threshold, 1.0, 0.0)
                judged[step][:, column] = np.where(np.isnan(of[name]), np.nan, for_it)
    return judged


def _scores(table: pa.Table) -> dict[str, np.ndarray]:
    """Scores by verifier, NaN where it has seen none."""
    column = table["scores"].combine_chunks()
    counts = np.asarray(pc.list_value_length(column).fill_null(0))
    rows = np.repeat(np.arange(table.num_rows), counts)
    flat = pc.list_flatten(column)
    names = np.asarray(flat.field("name"), dtype=object)
    values = np.asarray(flat.field("value"), dtype=np.float64)
    found = {}
    for name in sorted(set(names.tolist())):
        found[name] = np.full(table.num_rows, np.nan)
        is_its = names == name
        found[name][rows[is_its]] = values[is_its]
    return found


def _figures(
    table: pa.Table, scores: Mapping[str, np.ndarray], well_formed: Sequence[str]
) -> dict[str, float]:
    lengths, rewards = _lengths(table), table["reward"].to_numpy()
    tokens = np.asarray(pc.list_flatten(table["response_token_ids"]), dtype=np.int64)
    told: dict[str, float | None] = {
        "length/mean": float(lengths.mean()),
        "distinct/1": distinct(tokens, lengths.tolist(), 1),
        "distinct/2": distinct(tokens, lengths.tolist(), 2),
        "repetition": repetition(tokens, lengths.tolist(), _MANY_GRAM),
        "truncated": float(np.mean(np.asarray(table["finish_reason"]) == "length")),
        "failed": float(np.mean(table["attempts"].to_numpy() > 1)),
        "reward": float(rewards.mean()),
        **_passed(table["group_id"].to_pylist(), rewards > RIGHT_ABOVE),
    }
    if len(scores) > 1:
        told |= {f"verifier/{name}": float(np.nanmean(each)) for name, each in scores.items()}
    formal = [scores[name] > 0 for name in well_formed if name in scores]
    if formal:
        told["well_formed"] = float(np.mean(np.logical_and.reduce(formal)))
    environments = np.asarray(table["environment"], dtype=object)
    told |= {
        f"environment/{name}": float(rewards[environments == name].mean())
        for name in sorted(set(environments.tolist()))
    }
    return {name: value for name, value in told.items() if value is not None}


def _passed(group_ids: Sequence[str], right: np.ndarray) -> dict[str, float]:
    """pass@k over the step's groups, as far as all of them have samples."""
    _, of = np.unique(np.asarray(group_ids), return_inverse=True)
    sizes, num_right = np.bincount(of), np.bincount(of, right)
    pairs = list(zip(sizes.tolist(), num_right.astype(int).tolist(), strict=True))
    return {
        f"pass@{k}": sum(pass_at_k(size, c, k) for size, c in pairs) / len(pairs)
        for k in powers_of_two(int(sizes.min()))
    }


def _lengths(table: pa.Table) -> np.ndarray:
    return np.asarray(pc.list_value_length(table["response_token_ids"]), dtype=np.int64)


def _samples(table: pa.Table, judged: np.ndarray) -> Iterator[StepSample]:
    """Those that stand out, equal answers to a prompt once."""
    rewards, lengths = table["reward"].to_numpy(), _lengths(table)
    tokens = np.asarray(pc.list_flatten(table["response_token_ids"]), dtype=np.int64)
    repeated = np.nan_to_num(repetitions(tokens, lengths.tolist(), _MANY_GRAM))
    kinds = {"highest reward": rewards, "lowest reward": -rewards, "longest": lengths}
    if repeated.max() > 0:
        kinds["repeats itself most"] = repeated
    if judged.shape[1] > 1:
        spread = np.nanstd(judged, axis=1)
        if spread.max() > 0:
            kinds["verifiers disagree most"] = spread
    rows: list[dict[str, Any]] = table.drop_columns(["response_token_ids"]).to_pylist()
    shown: set[tuple[str, str]] = set()
    for why, values in kinds.items():
        left = _SAMPLES_OF_A_KIND
        for i in np.argsort(-values, kind="stable").tolist():
            said = rows[i]["prompt"], rows[i]["response"]
            if left and said not in shown:
                left -= 1
                shown.add(said)
                yield StepSample(
                    why=why,
                    prompt=rows[i]["prompt"],
                    answer=rows[i]["answer"],
                    response=rows[i]["response"],
                    reward=rows[i]["reward"],
                    scores={score["name"]: score["value"] for score in rows[i]["scores"] or []},
                )


def _drops(ledger: Ledger, lengths: Mapping[str, Sequence[int]]) -> tuple[Outcome, ...]:
    of_reasons: dict[str, list[str]] = {"trained": []}
    for group_id, group in ledger.groups.items():
        if group.steps:
            of_reasons["trained"].append(group_id)
        elif group.reason is not None:
            of_reasons.setdefault(group.reason, []).append(group_id)
    outcomes = []
    for reason, group_ids in of_reasons.items():
        tokens = [length for group_id in group_ids for length in lengths.get(group_id, ())]
        outcomes.append(
            Outcome(
                reason=reason,
                groups=len(group_ids),
                length_mean=sum(tokens) / len(tokens) if tokens else None,
                length_max=max(tokens, default=None),
            )
        )
    return tuple(outcomes)
