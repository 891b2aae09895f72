"""What each regime makes of the config, and the plan of its rounds."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flows.regimes import REGIMES, plan_rounds
from forge_core.config import RunConfig
from forge_core.settings import load_config
from tasks.together import together


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0, 1, 1)),
        ({"regime": "async"}, (2, 64, 1)),
        ({"regime": "async", "max_policy_age": 1}, (1, 1, 1)),
        ({"regime": "async", "max_policy_age": 0}, (0, 1, 1)),
        ({"regime": "async", "groups_per_step": 8}, (2, 8, 1)),
        ({"regime": "hybrid"}, (3, 1, 2)),
        ({"regime": "hybrid", "steps_per_round": 4}, (7, 1, 4)),
        ({"regime": "hybrid", "steps_per_round": None}, (3, 1, 2)),
    ],
)
def test_defaults_of_a_regime_satisfy_its_bound(given, expected):
    config = RunConfig.model_validate(given)
    assert (config.max_policy_age, config.window, config.steps_per_round) == expected
    assert RunConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["regime=hybrid", "steps_per_round=3", "max_policy_age=4"],
            "max_policy_age 4 is below 2 x steps_per_round - 1 = 5",
        ),
        (
            ["regime=async", "max_policy_age=1", "window=130"],
            r"ceil\(\(130 - 1\) / 64\) = 3.* lower window to 65",
        ),
        (["regime=sync", "max_policy_age=1"], "on-policy; set it to 0"),
        (["regime=sync", "window=2"], "window 2 is for regime async"),
        (["regime=async", "steps_per_round=2"], "steps_per_round 2 is for regime hybrid"),
        (["regime=async", "max_policy_age=old"], "max_policy_age = 'old'"),
        (["regime=hybrid", "steps_per_round=two"], "steps_per_round = 'two'"),
        (["regime=async", "groups_per_step=many"], "groups_per_step = 'many'"),
    ],
)
def test_what_breaks_the_bound_is_refused_with_the_formula(overrides, words):
    with pytest.raises(ValueError, match=words) as refused:
        load_config(preset=None, file=None, overrides=overrides)
    assert len(str(refused.value).splitlines()) <= 2


def test_a_layers_regime_table_counts_in_that_regime_only(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("steps = 5\n[regimes.hybrid]\nsteps = 6\ntrainer.ranks = 1\n")
    both = {"preset": None, "file": str(file)}
    assert load_config(**both, overrides=[]).steps == 5
    hybrid = load_config(**both, overrides=["regime=hybrid"])
    assert (hybrid.steps, hybrid.trainer.ranks) == (6, 1)
    assert load_config(**both, overrides=["regime=hybrid", "steps=7"]).steps == 7


def test_a_table_of_no_regime_is_refused(tmp_path):
    file = tmp_path / "mine.toml"
    for text, words in (
        ("[regimes.hybird]\nsteps = 6\n", "regimes.hybird: no such regime"),
        ("regimes = 3\n", "regimes = 3: it must be tables"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_config(preset=None, file=str(file), overrides=[])


def _rounds(steps: int, size: int, *, after: int = 0, **more: int) -> list[tuple[int, int, int]]:
    config = RunConfig.model_validate(
        {"regime": "hybrid", "steps": steps, "steps_per_round": size, **more}
    )
    return [(r.number, r.first_step, r.last_step) for r in plan_rounds(config, after)]


def test_rounds_cover_all_steps_and_a_run_that_goes_on_keeps_those_it_has_not_ended():
    assert _rounds(7, 3) == [(1, 1, 3), (2, 4, 6), (3, 7, 7)]
    assert _rounds(7, 3, after=2) == _rounds(7, 3)
    assert _rounds(7, 3, after=3) == [(2, 4, 6), (3, 7, 7)]
    assert _rounds(7, 3, after=7) == []


def test_the_rounds_of_a_fork_follow_the_steps_of_its_parent():
    fork = {"parent_run_id": "before", "parent_step": 4}
    assert _rounds(9, 2, after=4, **fork) == [(1, 5, 6), (2, 7, 8), (3, 9, 9)]


def test_no_steps_are_no_rounds_and_no_segments():
    ledger = SimpleNamespace(current_step=0)
    run = cast(Any, SimpleNamespace(config=RunConfig(steps=0), ledger=ledger))
    for regime in REGIMES.values():
        asyncio.run(regime(run))


def test_the_first_failure_ends_the_others_and_is_raised_itself():
    ended = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waits")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise OSError("gone")

    async def run() -> None:
        await together(waits(), together(fails(), waits()))

    with pytest.raises(OSError, match="gone"):
        asyncio.run(run())
    assert ended == ["waits", "waits"]
