"""The forms of deployed flows: what Prefect's pages make of them, and the configs that they stand for."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows import deployed
from flows.forms import EvaluationForm, Preset, RoundsForm, TrainingForm, WarmStartForm
from forge_core.settings import list_presets, load_config

FLOWS = {each.name: each for each in vars(deployed).values() if isinstance(each, Flow)}


def test_every_flow_has_a_form_whose_fields_are_described_and_not_deep() -> None:
    assert len(FLOWS) == 9
    for name, flow in FLOWS.items():
        schema = parameter_schema(flow).model_dump()
        for title, field in schema["properties"].items():
            assert field.get("description"), (name, title)
        for form, definition in schema["definitions"].items():
            assert definition["additionalProperties"] is False
            for title, field in definition["properties"].items():
                assert field.get("description"), (form, title)
                # A form within a form is one too many.
                assert "$ref" not in str(field), (form, title)


def test_presets_are_a_drop_down_of_all_there_are() -> None:
    assert sorted(typing.get_args(Preset)) == list_presets()
    field = parameter_schema(FLOWS["post-train"]).definitions["TrainingForm"]["properties"]
    assert field["preset"]["enum"] == list_presets()


@pytest.mark.parametrize("preset", list_presets())
def test_an_untouched_form_is_the_preset(preset: Any) -> None:
    plain = load_config(preset=preset, file=None, overrides=[])
    assert TrainingForm(preset=preset).config() == plain


def test_what_is_filled_in_lies_over_the_preset_and_overrides_over_that() -> None:
    form = TrainingForm(
        regime="async", steps=7, seed=3, learning_rate=1e-5, overrides=["seed=4", "group_size=4"]
    )
    config = form.config()
    assert (config.regime, config.steps, config.seed, config.group_size) == ("async", 7, 4, 4)
    assert config.optimizer.learning_rate == 1e-5
    assert WarmStartForm(steps=5).config().warm_start.steps == 5
    assert WarmStartForm().config().warm_start_only
    rounds = RoundsForm(steps=8, steps_per_round=4).config()
    assert (rounds.train_rounds, rounds.regime, rounds.steps_per_round) == (True, "hybrid", 4)
    assert EvaluationForm(num_prompts=9).all_overrides() == ["evaluation.num_prompts=9"]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"preset": "big"}, {"stepz": 1}, {"group_size": 1}, {"seed": 2**31}]
)
def test_a_form_refuses_what_the_config_would(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingForm.model_validate(wrong)


def test_an_override_that_is_wrong_is_told_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"stepz = 1: no such key in the config; did you mean"):
        TrainingForm(overrides=["stepz=1"]).config()
