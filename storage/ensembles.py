"""Ensembles of verifiers as they are stored: fitted once, never changed, each fit a version of its name.

```
ensembles/<name>/versions/<n>.json   version n
                /source/…            the user's files that its verifiers are defined in, as they were
```

What the figures mean, `forge_core.ensembles` says; here is their form.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from storage import layout
from storage.objects import ObjectNotFound, ObjectStore
from storage.records import Controller, FileRef, Record, read_record


class Rates(Record):
    """How often a verifier's votes are right."""

    accuracy: float
    """Share of all samples that it judges rightly."""
    true_positive_rate: float
    """Share of the right samples that it votes for."""
    true_negative_rate: float
    """Share of the wrong samples that it votes against."""


class FittedVerifier(Record):
    """One verifier: what it is, how its scores are read, and how good it is."""

    name: str
    """Name of the set of scores that it was fitted on."""
    verifier: str
    """What scores, as `rescore --verifier` was told."""
    scorer: str
    """Name of the environment or of the user's function."""
    environment: dict[str, Any] | None
    """Section of the config that makes the environment, if one scores."""
    source: FileRef | None
    """The file of the user's code that scores, if it is theirs, kept with the ensemble."""
    low: float
    """Score that is normalised to 0."""
    high: float
    """Score that is normalised to 1."""
    threshold: float
    """A score above it is a vote for right."""
    vote_share: float
    """Share of the samples that it votes for."""
    estimated: Rates | None
    """By the fitted model; None if it was left out before."""
    labelled: Rates | None
    """By the labels of prompts that were not fitted to; None without labels."""
    use: Literal["kept", "inverted", "dropped"]
    """Inverted: its vote for right counts against, since it is worse than chance."""
    why_dropped: str | None
    """Why, if it is dropped."""


class Unit(Record):
    """Verifiers that are read as one: a single one, or those that share their errors.

    Their votes, turned around where `inverted` says so, are counted: 0 to the number of verifiers.
    """

    verifiers: tuple[str, ...]
    """Their names."""
    inverted: tuple[bool, ...]
    """Whose votes are turned around before they are counted."""
    given_wrong: tuple[float, ...]
    """Probability of each count, from 0 up, if the sample is wrong."""
    given_right: tuple[float, ...]
    """Probability of each count, from 0 up, if the sample is right."""


class LabelsUsed(Record):
    """What was known of the truth. A sample is right if its label is above 0.5."""

    name: str
    """Set of scores that the labels are; `run` for the run's own rewards."""
    prompts_fitted: NonNegativeInt
    """Prompts whose labels the fit knew."""
    prompts_reported: NonNegativeInt
    """Prompts whose labels it did not know, and that the report is about."""


class CalibrationBin(Record):
    """Samples whose probability of being right lies within a tenth."""

    low: float
    """Lower end, within but for 0."""
    high: float
    """Upper end."""
    samples: NonNegativeInt
    """Their number."""
    predicted: float | None
    """Mean probability; None if there are none."""
    right: float | None
    """Share that is right; None if there are none."""


class PickRates(Record):
    """Share of groups of which a right sample is picked by the largest score; of equal scores each is as likely."""

    ensemble: float
    """By the ensemble."""
    best_single: float
    """By the one verifier with which, judged by the labels themselves, it is largest."""
    best_single_name: str
    """That verifier."""
    majority: float
    """By the number of verifiers that vote for it."""
    mean: float
    """By the mean of the normalised scores."""
    chance: float
    """By nothing."""
    possible: float
    """Share of groups that have a right sample at all."""


class LabelledReport(Record):
    """How the ensemble did on labels that it did not know."""

    pick_rates: PickRates
    """Of the ensemble and what it is compared to."""
    calibration: tuple[CalibrationBin, ...]
    """The calibration curve."""
    calibration_error: float
    """Mean distance of predicted and true shares, over bins weighted by their samples."""
    share_right: float
    """True share of right samples."""


class Ensemble(Record):
    """Weak verifiers, and what makes one probability of their scores."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    name: str
    """Its name."""
    version: PositiveInt
    """Number of this fit among those of its name, from 1."""
    run_id: str
    """Run whose episodes it was fitted on."""
    inputs_sha256: str
    """Hex digest over all that the fit depends on."""
    num_samples: NonNegativeInt
    """Episodes that it was fitted on."""
    num_prompts: NonNegativeInt
    """Prompts that those answer."""
    class_balance: float
    """Share of right samples, as estimated or as given."""
    is_balance_given: bool
    """Whether it was given."""
    expected_pick_rate: float
    """Share of groups of which it expects to pick a right sample, by its own probabilities."""
    verifiers: tuple[FittedVerifier, ...]
    """All of them, in the order in which they were named."""
    units: tuple[Unit, ...]
    """What the probability is made of; verifiers that are dropped are in none."""
    labels: LabelsUsed | None
    """What was known of the truth; None for nothing."""
    report: LabelledReport | None
    """How it did on labels; None without any that it did not know."""
    warnings: tuple[str, ...]
    """What speaks against trusting it, a sentence each."""
    controller: Controller
    """Who fitted it."""
    created_at: float
    """Unix seconds."""

    @property
    def reference(self) -> str:
        """What names it as a verifier or a reward."""
        return f"ensemble:{self.name}@{self.version}"


def store_ensemble(store: ObjectStore, fitted: Ensemble) -> Ensemble:
    """Store a fit as the next version of its name, and the files of its verifiers beside it.

    Idempotent: a version that was fitted on the same inputs is returned as it stands. Raises ObjectNotFound if a file
    is gone from the store.
    """
    while True:
        keys = store.keys(layout.ensemble_versions(fitted.name))
        for there in (read_record(store, key, Ensemble) for key in keys):
            if there.inputs_sha256 == fitted.inputs_sha256:
                return there
        verifiers = tuple(_with_source(store, fitted.name, each) for each in fitted.verifiers)
        new = fitted.model_copy(update={"version": len(keys) + 1, "verifiers": verifiers})
        # Lost to another fit of the same name: looked at again, and the number after it taken.
        store.put_if_absent(layout.ensemble_key(new.name, new.version), new.to_bytes())


def _with_source(store: ObjectStore, name: str, verifier: FittedVerifier) -> FittedVerifier:
    """The verifier with its file kept with the ensemble, which outlives the run that it was fitted on."""
    if verifier.source is None:
        return verifier
    file = verifier.source.key.rpartition("/")[2].partition("-")[2]
    key = layout.ensemble_source_key(name, verifier.source.sha256, file)
    store.put_if_absent(key, store.read(verifier.source.key))
    source = verifier.source.model_copy(update={"key": key})
    return verifier.model_copy(update={"source": source})


def read_ensemble(store: ObjectStore, name: str, version: int) -> Ensemble:
    """A version of an ensemble. Raises ValueError, with what there is, if there is no such."""
    try:
        return read_record(store, layout.ensemble_key(name, version), Ensemble)
    except ObjectNotFound:
        newest = newest_version(store, name)
        if newest is not None:
            raise ValueError(
                f"ensemble {name!r} has no version {version} in store {store.uri!r}: its newest is {newest}"
            ) from None
        there = ", ".join(store.folders(layout.ENSEMBLES)) or "none"
        raise ValueError(
            f"there is no ensemble {name!r} in store {store.uri!r} (there are: {there}): `forgeflow fit-verifiers` "
            "fits some"
        ) from None


def newest_version(store: ObjectStore, name: str) -> int | None:
    """The largest version of an ensemble; None if there is none of its name."""
    return len(store.keys(layout.ensemble_versions(name))) or None
