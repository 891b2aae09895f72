"""Ensembles of weak verifiers: what is estimated without labels, against simulations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_verifiers import logistic_regression, simulate

from forge_core.ensembles.fit import fit_ensemble
from forge_core.ensembles.label_model import UNKNOWN
from forge_core.ensembles.report import labelled_report, pick_rate
from forge_core.ensembles.scales import fit_scale

INDEPENDENT = [*range(14), 18, 19]


def test_without_labels_it_picks_nearly_as_well_as_a_regression_with_labels() -> None:
    """The mean of twenty seeds, and every estimate of every seed."""
    behind, ahead, errors = [], [], []
    for seed in range(20):
        drawn = simulate(seed, shared=(1.0, 0.9, 0.7, 0.5)[seed % 4])
        fit = fit_ensemble(drawn.votes.astype(np.float64))
        truth = drawn.right.astype(np.float64)
        picked = pick_rate(fit.posterior, truth, drawn.groups)
        supervised = logistic_regression(drawn.votes, truth)
        behind.append(pick_rate(supervised, truth, drawn.groups) - picked)
        ahead.append(picked - pick_rate(drawn.votes.sum(axis=1), truth, drawn.groups))
        # One as good as a coin tells nothing, but what it is is known all the same.
        estimated = np.array([fit.rates[j].accuracy for j in INDEPENDENT])
        errors.append(np.abs(estimated - drawn.accuracy[INDEPENDENT]).max())
        assert abs(fit.balance - 0.2) < 0.05
    assert np.mean(behind) <= 0.05
    assert np.mean(ahead) >= 0.04
    assert max(errors) <= 0.05


def test_verifiers_that_share_their_errors_are_read_as_one() -> None:
    drawn = simulate(1, num_prompts=500, shared=0.8)
    units = {unit.members for unit in fit_ensemble(drawn.votes.astype(np.float64)).units}
    assert (14, 15, 16, 17) in units
    assert {len(unit) for unit in units} == {1, 4}


def test_one_that_contradicts_another_is_read_with_it_turned_around() -> None:
    drawn = simulate(1, num_prompts=500, shared=1.0)
    votes = drawn.votes.copy()
    votes[:, 16] = ~votes[:, 16]
    fit = fit_ensemble(votes.astype(np.float64))
    (unit,) = [unit for unit in fit.units if len(unit.members) > 1]
    assert unit.members == (14, 15, 16, 17)
    assert unit.inverted == (False, False, True, False)


def test_what_is_worse_than_chance_counts_the_other_way_around() -> None:
    drawn = simulate(3, num_prompts=500)
    fit = fit_ensemble(drawn.votes.astype(np.float64))
    rates = fit.rates[18]
    assert rates.true_positive_rate + rates.true_negative_rate < 1
    (unit,) = [unit for unit in fit.units if unit.members == (18,)]
    assert unit.levels[1, 1] < unit.levels[1, 0]


def test_rates_of_right_and_of_wrong_samples_are_told_apart() -> None:
    """A verifier that lets nearly all pass and one that lets hardly any pass are as accurate, and not alike."""
    random = np.random.default_rng(0)
    right = random.random(8000) < 0.3
    rates = [(0.95, 0.4), (0.3, 0.95), (0.8, 0.7), (0.7, 0.8), (0.6, 0.9)]
    votes = np.stack(
        [np.where(right, random.random(8000) < t, random.random(8000) > f) for t, f in rates],
        axis=1,
    )
    fit = fit_ensemble(votes.astype(np.float64))
    for number, (true_positive, true_negative) in enumerate(rates):
        assert abs(fit.rates[number].true_positive_rate - true_positive) < 0.05
        assert abs(fit.rates[number].true_negative_rate - true_negative) < 0.05


def test_those_that_tell_nothing_are_dropped_and_said_why() -> None:
    drawn = simulate(5, num_prompts=500)
    coin = np.random.default_rng(0).random(len(drawn.right)) < 0.5
    scores = np.column_stack([drawn.votes[:, :10], coin, np.ones(len(coin))]).astype(np.float64)
    dropped = fit_ensemble(scores).dropped
    assert "alike for right and for wrong" in dropped[10]
    assert "votes for 0.0% of the samples" in dropped[11]
    assert 0 not in dropped


def test_scores_of_any_unit_make_votes() -> None:
    drawn = simulate(2, num_prompts=300)
    random = np.random.default_rng(0)
    votes = drawn.votes[:, :8]
    scores = votes * 40.0 - 300.0 + random.normal(size=votes.shape)
    assert np.allclose(fit_ensemble(scores).posterior, fit_ensemble(votes * 1.0).posterior)
    scale = fit_scale(np.array([-1e9, 1.0, 1.1, 0.9, 2.0, 2.1, 1.9, 1e9] * 5 + [1.0, 2.0] * 100))
    assert 1.1 < scale.threshold < 1.9
    assert list(scale.normalised(np.array([-1e9, 1e9]))) == [0.0, 1.0]


def test_a_few_labels_settle_what_cannot_be_told_without() -> None:
    """Two verifiers are too few without labels; and where most are worse than chance, labels say which way is up."""
    drawn = simulate(4, num_prompts=400)
    two = drawn.votes[:, [6, 9]].astype(np.float64)
    with pytest.raises(ValueError, match="it takes 3 to tell without labels"):
        fit_ensemble(two)
    labels = np.full(len(two), UNKNOWN)
    labels[:400] = drawn.right[:400]
    assert fit_ensemble(two, labels=labels).rates.keys() == {0, 1}
    upside_down = 1.0 - drawn.votes[:, :10]
    assert fit_ensemble(upside_down).balance > 0.5
    rates = fit_ensemble(upside_down, labels=labels).rates
    best = int(np.argmax(drawn.accuracy[:10]))
    assert rates[best].true_positive_rate + rates[best].true_negative_rate < 1


def test_a_class_balance_that_is_given_counts() -> None:
    drawn = simulate(6, num_prompts=200)
    assert fit_ensemble(drawn.votes.astype(np.float64), balance=0.25).balance == 0.25


def test_of_equal_scores_each_is_as_likely_to_be_picked() -> None:
    right = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    groups = ["a", "a", "a", "b", "b"]
    assert pick_rate(np.zeros(5), right, groups) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert pick_rate(np.array([1.0, 1.0, 0.0, 0.0, 5.0]), right, groups) == pytest.approx(0.25)


def test_the_report_compares_and_calibrates() -> None:
    drawn = simulate(7, num_prompts=500)
    scores = drawn.votes.astype(np.float64)
    fit = fit_ensemble(scores)
    names = [f"v{number}" for number in range(20)]
    report = labelled_report(fit.posterior, scores, fit.scales, names, drawn.right, drawn.groups)
    rates = report.pick_rates
    assert rates.chance < rates.majority < rates.ensemble <= rates.possible
    assert rates.best_single_name == f"v{int(np.argmax(drawn.accuracy))}"
    assert rates.mean == rates.majority  # Of votes, the mean is the majority.
    assert report.calibration_error < 0.05
    assert sum(each.samples for each in report.calibration) == len(drawn.right)
