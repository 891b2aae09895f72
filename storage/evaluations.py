"""The scores of an evaluation, prompt by prompt."""

import math
from dataclasses import dataclass

import pyarrow as pa

from storage.facts import Evaluated
from storage.objects import ObjectStore
from storage.parts import read_part


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """One kind of answers of an evaluation, in the order of the prompts."""

    prompt_ids: tuple[str, ...]
    """Hash of environment, prompt and reference answer, of each."""
    rewards: tuple[float, ...]
    """Reward of each."""


def prompt_scores(store: ObjectStore, evaluated: Evaluated, score: str) -> PromptScores:
    """What an evaluation gave each prompt: for its `greedy` answer, or the mean over its `sampled` ones.

    Raises ObjectNotFound or ValueError if its parts are gone or damaged, or not as many as the log says.
    """
    columns = ["draw", "sample", "prompt_id", "reward"]
    tables = [read_part(store, part, columns) for part in evaluated.parts]
    first = range(evaluated.num_samples)
    wanted = first if score == "sampled" else range(first.stop, first.stop + 1)
    prompts: dict[int, tuple[str, list[float]]] = {}
    for row in pa.concat_tables(tables).to_pylist():
        if row["sample"] in wanted:
            prompts.setdefault(row["draw"], (row["prompt_id"], []))[1].append(row["reward"])
    draws = range(evaluated.num_prompts)
    if sorted(prompts) != list(draws) or {len(each) for _, each in prompts.values()} != {
        len(wanted)
    }:
        raise ValueError(
            f"evaluation {evaluated.name} has not the {len(wanted)} {score} episodes of each of its "
            f"{evaluated.num_prompts} prompts: forgeflow verify tells what is wrong"
        )
    return PromptScores(
        prompt_ids=tuple(prompts[draw][0] for draw in draws),
        rewards=tuple(math.fsum(prompts[draw][1]) / len(wanted) for draw in draws),
    )
