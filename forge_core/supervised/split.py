"""Train and validation: by a hash of what is asked, so that no prompt is in both. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from forge_core.config import WarmStartConfig
from forge_core.supervised.examples import Example, read_examples


def split_examples(
    examples: Iterable[Example], config: WarmStartConfig
) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to validate with. Raises ValueError if there are none of either and some are needed."""
    train: list[Example] = []
    validation: list[Example] = []
    for example in examples:
        aside = example.is_validation(config.validation_fraction)
        (validation if aside else train).append(example)
    if not train:
        raise ValueError(
            f"warm_start.data {config.data!r} leaves no row to train on: add rows, or lower "
            f"warm_start.validation_fraction {config.validation_fraction:g}"
        )
    if config.validation_fraction and not validation:
        raise ValueError(
            f"warm_start.data {config.data!r} leaves none of {len(train)} rows to validate with: raise "
            f"warm_start.validation_fraction {config.validation_fraction:g}, or set it to 0"
        )
    return train, validation


def check_data(config: WarmStartConfig) -> None:
    """Read all rows, so that a fault is told before anything starts. Raises ValueError."""
    if config.data is None:
        return
    try:
        split_examples(read_examples(config.data, config.split), config)
    except ValueError as error:
        raise ValueError(_of_field(str(error))) from error


def _of_field(said: str) -> str:
    return said if said.startswith("warm_start.") else f"warm_start.data: {said}"
