"""Which checkpoints were promoted, and which were not and why: the decisions of a line, one after another.

    promotions/<line>/000001.json ◀── 000002.json ◀── …      each put-if-absent, each made knowing all before it

A decision takes the number after the last one that it knows. Whoever finds the number taken must look again, for the
checkpoint that it was compared with may not be the promoted one any more. So a line never has two newest checkpoints,
and an experiment, which is looked for in all decisions before, makes one decision however often it is begun again.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt

from storage import layout
from storage.objects import ObjectNotFound, ObjectStore
from storage.records import Controller, Record, read_record, read_records


class PromotedCheckpoint(Record):
    """A checkpoint that a decision is about."""

    run_id: str
    """Run that made it."""
    step: int = Field(ge=0)
    """Its step in that run."""
    key: str
    """Its folder in the store."""
    weights_digest: str
    """Digest of its weights."""

    @property
    def reference(self) -> str:
        """What other commands take."""
        return f"{self.run_id}@{self.step}"


class Comparison(Record):
    """How two checkpoints did on the same prompts."""

    score: Literal["sampled", "greedy"]
    """Which answers were compared."""
    num_prompts: PositiveInt
    """Held-out prompts that both answered."""
    candidate: float
    """Mean score of the new checkpoint."""
    baseline: float
    """Mean score of the one that was promoted last."""
    gain: float
    """Mean difference by prompt."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    confidence: float
    """Share of the bootstrap's means within it."""
    resamples: PositiveInt
    """How often the bootstrap drew."""


class Decision(Record):
    """What became of one experiment."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    line: str
    """Line of promoted checkpoints."""
    number: PositiveInt
    """Its number in the line, from 1 without gaps."""
    experiment_id: str
    """The experiment, of which a line has one decision."""
    promoted: bool
    """Whether the checkpoint is the line's newest from then on."""
    reason: str
    """Why, in a sentence."""
    checkpoint: PromotedCheckpoint
    """What was decided about."""
    score: float
    """Its mean score on the held-out prompts."""
    against: PositiveInt | None
    """Number of the decision that promoted what it was compared with; None if nothing was promoted before."""
    against_run_id: str | None
    """Run that evaluated that one on the same prompts."""
    comparison: Comparison | None
    """How both did; None if nothing was promoted before."""
    controller: Controller
    """Who decided."""
    created_at: float
    """Unix seconds."""


class ExperimentPlan(Record):
    """What an experiment was begun with: it goes on with the same however often it is begun again."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    experiment_id: str
    """The experiment."""
    config: dict[str, Any]
    """Config of the run that makes the candidate."""
    promotion: dict[str, Any]
    """What the candidate is held against."""


def candidate_run(experiment_id: str) -> str:
    """Id of the run that makes an experiment's checkpoint."""
    return f"{experiment_id}-candidate"


def against_run(experiment_id: str, number: int) -> str:
    """Id of the run that evaluates, for an experiment, what the decision of that number promoted."""
    return f"{experiment_id}-against-{number:06d}"


def keep_plan(store: ObjectStore, plan: ExperimentPlan) -> ExperimentPlan:
    """Fix what an experiment does for good; what stands then.

    Raises ValueError, naming what differs, if it was begun with something else.
    """
    layout.check_run_id(candidate_run(plan.experiment_id))
    key = layout.experiment_key(plan.experiment_id)
    if store.put_if_absent(key, plan.to_bytes()):
        return plan
    kept = read_record(store, key, ExperimentPlan)
    for name in ("config", "promotion"):
        ours, theirs = getattr(plan, name), getattr(kept, name)
        differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if differing:
            raise ValueError(
                f"experiment {plan.experiment_id!r} was begun with another {name} ({', '.join(differing)} differ): "
                "leave them out to go on with it, or name a new experiment"
            )
    return kept


def read_plan(store: ObjectStore, experiment_id: str) -> ExperimentPlan | None:
    """What an experiment was begun with; None if it was not. Raises ValueError if it is unreadable."""
    try:
        return read_record(store, layout.experiment_key(experiment_id), ExperimentPlan)
    except ObjectNotFound:
        return None


def read_decisions(store: ObjectStore, line: str) -> list[Decision]:
    """All decisions of a line, in order. Raises ValueError if one is unreadable or missing in between."""
    keys = store.keys(layout.promotions_folder(line))
    due = [layout.promotion_key(line, number) for number in range(1, len(keys) + 1)]
    if keys != due:
        wrong = next(key for key, other in zip(due, keys, strict=True) if key != other)
        raise ValueError(f"{wrong} is missing, and decisions after it are not: restore it")
    return read_records(store, keys, Decision)


def newest_promotion(decisions: Sequence[Decision]) -> Decision | None:
    """The decision that promoted the line's newest checkpoint; None if nothing was promoted yet."""
    return next((each for each in reversed(decisions) if each.promoted), None)


def decision_of(decisions: Sequence[Decision], experiment_id: str) -> Decision | None:
    """The decision of an experiment; None if there is none yet."""
    return next((each for each in decisions if each.experiment_id == experiment_id), None)


def keep_decision(store: ObjectStore, decision: Decision) -> bool:
    """Make a decision true; False if another one has its number, so that it is to be made again.

    Idempotent by experiment: its own decision under that number is its own, whoever wrote it.
    """
    key = layout.promotion_key(decision.line, decision.number)
    if store.put_if_absent(key, decision.to_bytes()):
        return True
    return read_record(store, key, Decision).experiment_id == decision.experiment_id


def promoted_runs(store: ObjectStore) -> dict[str, str]:
    """By run, the line whose newest checkpoint it made. Raises ValueError if a decision is unreadable."""
    found = {}
    for line in store.folders(layout.PROMOTIONS):
        newest = newest_promotion(read_decisions(store, line))
        if newest is not None:
            found[newest.checkpoint.run_id] = line
    return found
