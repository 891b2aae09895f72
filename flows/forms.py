"""What people fill in to start a flow from Prefect's pages or a schedule: few fields, each with a default that works.

A form says what differs from a preset or from another run; `overrides` reaches every key of the config. Prefect builds
its pages from the models' JSON schema, so descriptions carry units, and bounds are those of the config.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from forge_core.config import RunConfig
from forge_core.regime import Regime
from forge_core.settings import load_config

Preset = Literal["gsm8k-0.6b", "gsm8k-8b", "tiny"]
"""Presets of the package, for a drop-down."""

Overrides = Annotated[
    list[str],
    Field(
        description="Further keys of the config, one KEY=VALUE each, such as sampling.temperature=0.8; they go before "
        "the fields above.",
    ),
]


class Form(BaseModel):
    """Base of all: closed, so that a misspelt field is refused before a run exists."""

    model_config = ConfigDict(extra="forbid")


class TrainingForm(Form):
    """What is trained, as far as it differs from a preset."""

    preset: Preset = Field("tiny", description="Config that all other fields lie over.")
    regime: Regime | None = Field(
        None, description="How generation and training are composed; empty: the preset's."
    )
    steps: int | None = Field(None, ge=1, description="Training steps; empty: the preset's.")
    groups_per_step: int | None = Field(
        None, ge=1, description="Prompts of a step; empty: the preset's."
    )
    group_size: int | None = Field(
        None, ge=2, description="Samples of a prompt; empty: the preset's."
    )
    learning_rate: float | None = Field(
        None, ge=0.0, description="Of the optimizer; empty: the preset's."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="Of prompts, samples and model; empty: the preset's."
    )
    model: str | None = Field(
        None, description="Hugging Face directory or hf://owner/name; empty: the preset's."
    )
    reward: str | None = Field(
        None, description="Function of your own that scores, as path/file.py:name; empty: none."
    )
    overrides: Overrides = Field(default_factory=list)

    def config(self) -> RunConfig:
        """The whole config. Raises ValueError, with a sentence that names field, value and mend."""
        given = {
            "regime": self.regime,
            "steps": self.steps,
            "groups_per_step": self.groups_per_step,
            "group_size": self.group_size,
            "optimizer.learning_rate": self.learning_rate,
            "seed": self.seed,
            "model.path": self.model,
            "reward": self.reward,
        }
        layers = [f"{key}={value}" for key, value in given.items() if value is not None]
        return load_config(preset=self.preset, file=None, overrides=[*layers, *self.overrides])


class WarmStartForm(Form):
    """A warm start alone, as far as it differs from a preset."""

    preset: Preset = Field("tiny", description="Config that all other fields lie over.")
    steps: int | None = Field(None, ge=1, description="Supervised steps; empty: the preset's.")
    batch_size: int | None = Field(None, ge=1, description="Samples a step; empty: the preset's.")
    learning_rate: float | None = Field(None, ge=0.0, description="Empty: the preset's.")
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="Of prompts and model; empty: the preset's."
    )
    overrides: Overrides = Field(default_factory=list)

    def config(self) -> RunConfig:
        """The whole config. Raises ValueError, with a sentence that names field, value and mend."""
        given = {
            "warm_start.steps": self.steps,
            "warm_start.batch_size": self.batch_size,
            "warm_start.learning_rate": self.learning_rate,
            "seed": self.seed,
        }
        layers = ["warm_start_only=true"]
        layers += [f"{key}={value}" for key, value in given.items() if value is not None]
        return load_config(preset=self.preset, file=None, overrides=[*layers, *self.overrides])


class RoundsForm(Form):
    """A run that trains on rounds which others collect, as far as it differs from a preset."""

    preset: Preset = Field("tiny", description="Config that all other fields lie over.")
    steps: int | None = Field(None, ge=1, description="Training steps; empty: the preset's.")
    steps_per_round: int | None = Field(
        None, ge=1, description="Steps whose groups are collected together; empty: the preset's."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="Of prompts, samples and model; empty: the preset's."
    )
    overrides: Overrides = Field(default_factory=list)

    def config(self) -> RunConfig:
        """The whole config. Raises ValueError, with a sentence that names field, value and mend."""
        given = {
            "steps": self.steps,
            "steps_per_round": self.steps_per_round,
            "seed": self.seed,
        }
        layers = ["regime=hybrid", "train_rounds=true"]
        layers += [f"{key}={value}" for key, value in given.items() if value is not None]
        return load_config(preset=self.preset, file=None, overrides=[*layers, *self.overrides])


class EvaluationForm(Form):
    """Which weights are evaluated, and how."""

    checkpoint: str = Field(
        "newest",
        description="RUN@STEP, or RUN for its newest checkpoint; newest: that of the store's newest run.",
        min_length=1,
    )
    num_prompts: int | None = Field(
        None, ge=1, description="Held-out prompts; empty: as many as that run evaluates on."
    )
    overrides: Overrides = Field(default_factory=list)

    def all_overrides(self) -> list[str]:
        """What lies over the config of the checkpoint's run."""
        if self.num_prompts is None:
            return self.overrides
        return [f"evaluation.num_prompts={self.num_prompts}", *self.overrides]


class ReplayForm(Form):
    """Which episodes are trained on again, and by which scores."""

    runs: list[str] = Field(description="Ids of past runs, in order.", min_length=1)
    scores: str = Field(
        "run", description="Set of scores that rescore made; run: the runs' own.", min_length=1
    )
    epochs: int = Field(1, ge=1, description="How often each group is trained on.")
    checkpoint: str | None = Field(
        None, description="RUN@STEP whose weights are trained; empty: the first run's first."
    )
    overrides: Overrides = Field(default_factory=list)
