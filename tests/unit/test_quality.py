"""Figures of a run's episodes against values that were counted by hand, and the signs that are seen in them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import made_episodes
import numpy as np
import pyarrow as pa
import pytest
from made_run import MadeRun
from stored_run import StoredRun

from forge_core.quality.estimates import (
    disagreement,
    distinct,
    pass_at_k,
    powers_of_two,
    repetition,
    repetitions,
)
from forge_core.quality.signs import signs
from forge_core.quality.steps import read_quality
from storage import layout
from storage.episodes import SCHEMA
from storage.objects import LocalStore
from storage.resume import read_ledger


@pytest.mark.parametrize(("n", "c", "k"), list(itertools.product((4, 5), (0, 1, 3, 4), (1, 2, 4))))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n: int, c: int, k: int) -> None:
    """By counting all draws of k of the n samples."""
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_takes_k_samples() -> None:
    assert (
        powers_of_two(1) == [1] and powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(7)[-1] == 4
    )
    with pytest.raises(ValueError, match="pass@4 takes 4 samples of a prompt, and there are 3"):
        pass_at_k(3, 1, 4)


def test_grams_are_counted_within_responses() -> None:
    """[1 2 1 2 1] and [1 2] have the 2-grams 12 21 12 21 and 12: two distinct ones of five."""
    tokens, lengths = np.array([1, 2, 1, 2, 1, 1, 2]), [5, 2]
    assert distinct(tokens, lengths, 1) == pytest.approx(2 / 7)
    assert distinct(tokens, lengths, 2) == pytest.approx(2 / 5)
    assert repetitions(tokens, lengths, 2).tolist() == [0.5, 0.0]
    assert repetition(tokens, lengths, 2) == pytest.approx(0.25)
    # Of 3-grams the first has 121 212 121, the second none.
    assert distinct(tokens, lengths, 3) == pytest.approx(2 / 3)
    assert repetition(tokens, lengths, 3) == pytest.approx(1 / 3)
    assert distinct(tokens, lengths, 6) is None and repetition(tokens, lengths, 6) is None
    assert distinct(np.array([7]), [1], 4) is None


def test_grams_of_any_tokens_are_told_apart() -> None:
    """Against sets of tuples."""
    random = np.random.default_rng(0)
    # Few of many tokens, so that they recur and numbers of 4-grams would not fit into 64 bits.
    tokens, lengths = random.integers(0, 5, 600) * 2**29, [100, 0, 300, 200]
    ends = np.cumsum(lengths)
    rows = [tokens[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
    for n in (1, 2, 4):
        grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        assert distinct(tokens, lengths, n) == pytest.approx(len(set(grams)) / len(grams))
        by_row = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows if row]
        shares = [1 - len(set(each)) / len(each) for each in by_row]
        assert repetition(tokens, lengths, n) == pytest.approx(sum(shares) / len(shares))


def test_verifiers_disagree_on_samples_that_both_have_seen() -> None:
    none = np.nan
    votes = np.array([[1, 1, none], [1, 0, 1], [0, 0, 1], [0, 1, 0.0]])
    # First and second differ on two of four, first and third on one of three, second and third on all three.
    assert disagreement(votes) == pytest.approx((2 / 4 + 1 / 3 + 3 / 3) / 3)
    assert disagreement(votes[:, :1]) is None


def _row(draw: int, sample: int, **columns: Any) -> dict[str, Any]:
    tokens = columns.pop("tokens")
    return made_episodes.episode(
        draw, sample, response_token_ids=tokens, logprobs=[-0.5] * len(tokens),
        mask=[True] * len(tokens), token_policy_versions=[0] * len(tokens), **columns,
    )  # fmt: skip


def _scores(**values: float) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in values.items()]


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    """Step 1 trains on draw 0 and drops draw 1; draw 2 was never generated."""
    run = MadeRun(LocalStore(tmp_path / "store"))
    run.warm_start()
    rows = [
        _row(0, 0, tokens=[1, 1, 1, 1, 1, 1], reward=0.0, finish_reason="length", response="aaaaaa",
             scores=_scores(judge=-3.0, form=1.0)),
        _row(0, 1, tokens=[1, 2], reward=1.0, attempts=2, scores=_scores(judge=9.0, form=0.0)),
        _row(1, 0, tokens=[1, 2, 3], reward=1.0, environment="other",
             scores=_scores(judge=8.0, form=1.0)),
        _row(1, 1, tokens=[3], reward=1.0, environment="other", scores=_scores(judge=7.0)),
    ]  # fmt: skip
    run.round(0, [0, 1], pa.Table.from_pylist(rows, SCHEMA))
    run.admit(1, [2])
    run.train(1, [0])
    run.drop(1, "no_signal", step=1)
    run.drop(2, "failed")
    return run


def test_a_step_is_described_by_all_groups_that_were_considered(run: MadeRun) -> None:
    found = read_quality(run.store, read_ledger(run.store, "run"), well_formed=["form"])
    assert found.series == {
        "distinct/1": {1: pytest.approx(3 / 12)},
        "distinct/2": {1: pytest.approx(3 / 8)},
        "disagreement": {1: pytest.approx(2 / 3)},
        "environment/other": {1: 1.0},
        "environment/sums": {1: 0.5},
        "failed": {1: 0.25},
        "length/mean": {1: 3.0},
        "pass@1": {1: 0.75},
        "pass@2": {1: 1.0},
        "repetition": {1: pytest.approx(2 / 3)},
        "reward": {1: 0.75},
        "truncated": {1: 0.25},
        "verifier/form": {1: pytest.approx(2 / 3)},
        "verifier/judge": {1: pytest.approx(21 / 4)},
        "well_formed": {1: 0.5},
    }
    told = [(d.reason, d.groups, d.length_mean, d.length_max) for d in found.drops]
    assert told == [
        ("trained", 1, 4.0, 6),
        ("no_signal", 1, 2.0, 3),
        ("failed", 1, None, None),
    ]
    why = [sample.why for sample in found.samples]
    # There are two answers, to one prompt, and three gave the same.
    assert why == ["highest reward", "highest reward"]
    assert found.samples[1].response == "aaaaaa"
    assert found.samples[1].scores == {"judge": -3.0, "form": 1.0}


def test_what_is_gone_or_damaged_is_named_and_left_out(tmp_path: Path) -> None:
    run = StoredRun(LocalStore(tmp_path / "store"))
    for step in (1, 2):
        run.commit([2 * step, 2 * step + 1])
        run.train(step, [2 * step, 2 * step + 1])
    (key,) = run.store.keys(layout.episodes_prefix("run", layout.part_name(0, 0)))
    run.store.replace(key, b"nothing")
    found = read_quality(run.store, read_ledger(run.store, "run"))
    assert list(found.series["reward"]) == [2]
    assert found.unreadable == (layout.commit_key("run", layout.part_name(0, 0)),)


def _line(first: float, last: float, steps: int = 20) -> dict[int, float]:
    return {1 + i: first + (last - first) * i / (steps - 1) for i in range(steps)}


SOUND = {
    "reward": _line(0.3, 0.9), "verifier/form": _line(0.9, 0.95), "repetition": _line(0.05, 0.04),
    "length/mean": _line(100, 120), "distinct/2": _line(0.5, 0.4), "truncated": _line(0.05, 0.0),
}  # fmt: skip


def test_a_run_that_learns_shows_no_signs() -> None:
    entropy = {"entropy": _line(1.0, 0.3), "frac_reward_zero_std": _line(0.1, 0.5)}
    assert signs(SOUND, entropy, [0.3, 0.85]) == []


@pytest.mark.parametrize(
    ("series", "metrics", "held_out", "words"),
    [
        ({}, {}, [0.5, 0.3], "won by something else"),
        ({"verifier/form": _line(0.9, 0.5)}, {}, [], "verifier form fell from 0.8"),
        ({"repetition": _line(0.1, 0.6)}, {}, [], "repeat themselves"),
        ({"truncated": _line(0.0, 0.5)}, {}, [], "cut off"),
        ({"disagreement": _line(0.1, 0.5)}, {}, [], "disagree more"),
        ({"length/mean": _line(100, 400)}, {}, [], "responses went from 1"),
        ({"distinct/2": _line(0.5, 0.05)}, {}, [], "became alike"),
        ({}, {"entropy": _line(1.0, 0.01)}, [], "hardly explores"),
        ({}, {"frac_reward_zero_std": _line(0.1, 1.0)}, [], "taught nothing"),
    ],
)
def test_each_sign_is_seen(
    series: dict[str, Any], metrics: dict[str, Any], held_out: list[float], words: str
) -> None:
    (sign,) = signs({**SOUND, **series}, metrics, held_out)
    assert words in sign


def test_a_short_run_says_too_little() -> None:
    assert signs({"reward": _line(0.1, 0.9, steps=9)}, {}, [0.9, 0.1]) == []
