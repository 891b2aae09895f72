"""The table of failure units, and what config and decorator make of it."""

import pytest

from forge_core.config import RunConfig
from forge_core.services.policy import (
    FAILURE_UNITS,
    check_policy,
    failure_unit,
    faults,
    policy_of,
)
from forge_core.settings import load_config

CHOICES = ("generators", "verifier", "trainer", "reference", "critic", "weights")


def test_a_run_defaults_to_what_the_table_says() -> None:
    config = RunConfig().faults
    for row in FAILURE_UNITS:
        assert getattr(config, row.name, None) == row.default, row.name
        assert (row.default is None) == (not row.allowed)


@pytest.mark.parametrize("unit", CHOICES)
def test_config_takes_what_the_table_allows_and_nothing_else(unit: str) -> None:
    allowed = failure_unit(unit).allowed  # type: ignore[arg-type]
    for policy in ("fail_fast", "restart", "route_around", "ignore"):
        overrides = [f"faults.{unit}={policy}"]
        if policy in allowed:
            config = load_config(preset="tiny", file=None, overrides=overrides)
            assert getattr(config.faults, unit) == policy
        else:
            with pytest.raises(ValueError, match=rf"faults.{unit}"):
                load_config(preset="tiny", file=None, overrides=overrides)


def test_a_class_that_says_nothing_fails_fast() -> None:
    class Plain: ...

    @faults(policy="route_around")
    class Marked: ...

    assert policy_of(Plain) == "fail_fast"
    assert policy_of(Marked) == "route_around"


def test_a_policy_that_does_not_exist_is_refused_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match="'retry' is none: choose one of fail_fast, restart, route"
    ):
        check_policy("retry")
