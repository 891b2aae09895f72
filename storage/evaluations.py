"""The scores of an evaluation, prompt by prompt."""

from dataclasses import dataclass

import pyarrow as pa

from storage.facts import Evaluated
from storage.objects import ObjectStore
from storage.parts import read_part

_SAMPLES = {"sampled": 0, "greedy": 1}
"""Numbers of a prompt's samples, by what the log calls their means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """One kind of answers of an evaluation, in the order of the prompts."""

    prompt_ids: tuple[str, ...]
    """Hash of environment, prompt and reference answer, of each."""
    rewards: tuple[float, ...]
    """Reward of each."""


def prompt_scores(store: ObjectStore, evaluated: Evaluated, score: str) -> PromptScores:
    """What an evaluation gave each prompt for its `sampled` or `greedy` answer.

    Raises ObjectNotFound or ValueError if its parts are gone or damaged, or not as many as the log says.
    """
    columns = ["draw", "sample", "prompt_id", "reward"]
    tables = [read_part(store, part, columns) for part in evaluated.parts]
    rows = sorted(
        (row for row in pa.concat_tables(tables).to_pylist() if row["sample"] == _SAMPLES[score]),
        key=lambda row: row["draw"],
    )
    if [row["draw"] for row in rows] != list(range(evaluated.num_prompts)):
        raise ValueError(
            f"evaluation {evaluated.name} has {len(rows)} {score} episodes for {evaluated.num_prompts} prompts: "
            "forgeflow verify tells what is wrong"
        )
    return PromptScores(
        prompt_ids=tuple(row["prompt_id"] for row in rows),
        rewards=tuple(row["reward"] for row in rows),
    )
