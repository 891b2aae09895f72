"""Fifty tasks of reasoning-gym picked at random, through the project's own path: generate, store, score."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from reasoning_gym.factory import DATASETS

from forge_core.actors.messages import DrawnPrompt, ScoreRequest
from forge_core.actors.rows import group_rows
from forge_core.actors.verifier import Verifier
from forge_core.config import RunConfig
from forge_core.environments import load_environment
from forge_core.rollout import Episode
from storage.episodes import SCHEMA
from storage.objects import LocalStore
from storage.parts import read_part, write_part

NUM_TASKS, NUM_PROMPTS = 50, 2
TASKS = sorted(random.Random(50).sample(sorted(DATASETS), NUM_TASKS))


def of_the_package(name: str, response: str, item: dict[str, Any]) -> float:
    """What the package's own scorer says; 0 where it cannot read the response at all."""
    dataset_class, config_class = DATASETS[name]
    scorer = dataset_class(config_class(seed=1, size=1))
    with contextlib.suppress(Exception):
        return float(scorer.score_answer(response, item))
    return 0.0


def an_episode(response: str) -> Episode:
    """What a policy that writes this would have left."""
    ids = list(response.encode("utf-8", "surrogatepass")) or [0]
    return Episode(
        response=response,
        prompt_token_ids=[1],
        response_token_ids=ids,
        logprobs=[-0.5] * len(ids),
        mask=[True] * len(ids),
        token_policy_versions=[0] * len(ids),
        turns=[],
        finish_reason="stop",
        seed=1,
    )


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_the_packages_own(name: str, tmp_path: Path) -> None:
    # Most of the prompts are held out, so that few have to be made: one of some tasks takes a second.
    config = RunConfig.model_validate({"environment": {"name": name, "test_fraction": 0.9}})
    environment = load_environment(config.environment, seed=3)
    store = LocalStore(tmp_path)
    rows, due = [], []
    prompts = environment.test_prompts(NUM_PROMPTS)
    for draw, prompt in enumerate(prompts):
        item = environment._item("test", prompt.index)
        other = prompts[1 - draw].answer
        responses = [prompt.answer, other, f"So it is {prompt.answer}!", "surely wrong", ""]
        drawn = DrawnPrompt(draw=draw, group_id=f"run-{draw:08d}", prompt=prompt)
        rows += group_rows("run", drawn, list(map(an_episode, responses)), attempt=1, seconds=0.1)
        due += [of_the_package(name, response, item) for response in responses]
        # A task of plans has no reference answer.
        assert due[-len(responses)] > 0.9 or not prompt.answer
    part = write_part(store, "part", pa.Table.from_pylist(rows, SCHEMA))
    actor = Verifier(config, store.uri, 0.0)
    reply = actor._score_part(ScoreRequest(run_id="run", part=part, key_prefix="scored"))
    scored = read_part(store, reply.part)
    assert scored["reward"].to_pylist() == due
    assert {each[0]["name"] for each in scored["scores"].to_pylist()} == {name}
