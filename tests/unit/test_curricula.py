"""Mixtures of tasks, and tasks that grow harder: which prompt a draw is of, and that the log alone decides it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import made_episodes
import pyarrow as pa
import pytest
from made_run import MadeRun

from forge_core.config import CurriculumConfig, EnvironmentConfig, RunConfig
from forge_core.environments import load_environment
from forge_core.environments.base import Leveled, level_of
from forge_core.levels import Level
from forge_core.meshes import Meshes
from storage.episodes import SCHEMA
from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from storage.objects import LocalStore
from tasks.collect import admitted, draw
from tasks.run import ActiveRun

LEVELS = [
    {"max_terms": 2, "max_digits": 1},
    {"min_terms": 3, "max_terms": 3},
    {"max_terms": 6, "min_terms": 6},
]
SUMS: dict[str, Any] = {"name": "chain_sum", "params": {"max_digits": 2}}
MIXED: dict[str, Any] = {
    "name": "mixture",
    "tasks": {
        "sums": {**SUMS, "weight": 3.0},
        "letters": {"name": "spell_backward", "prompt_template": "Reverse: {question}"},
        "hard": {"name": "chain_sum", "params": {"min_terms": 5}, "weight": 2.0},
    },
}


def leveled(section: dict[str, Any], seed: int = 0) -> Leveled:
    environment = load_environment(EnvironmentConfig.model_validate(section), seed)
    assert isinstance(environment, Leveled)
    return environment


def test_a_mixture_has_its_tasks_by_their_weights_in_every_stretch() -> None:
    mixture = leveled(MIXED)
    prompts = [mixture.train_prompt(n) for n in range(600)]
    for first in range(0, 600, 60):
        counts = Counter(prompt.environment for prompt in prompts[first : first + 60])
        assert all(
            abs(counts[k] - n) <= 2 for k, n in (("sums", 30), ("hard", 20), ("letters", 10))
        )
    assert [mixture.task_of(n) for n in range(600)] == [prompt.environment for prompt in prompts]
    # Each task's own prompts, in its own order.
    alone = load_environment(EnvironmentConfig.model_validate(SUMS), 0)
    sums = [prompt.text for prompt in prompts if prompt.environment == "sums"]
    assert sums == [alone.train_prompt(n).text for n in range(len(sums))]
    again, other = leveled(MIXED), leveled(MIXED, seed=1)
    assert again.train_prompt(500) == prompts[500]
    assert [other.task_of(n) for n in range(20)] != [mixture.task_of(n) for n in range(20)]


def test_a_mixtures_held_out_prompts_are_of_all_tasks_and_scored_by_their_own() -> None:
    mixture = leveled(MIXED)
    held_out = mixture.test_prompts(30)
    counts = Counter(prompt.environment for prompt in held_out)
    assert all(abs(counts[k] - n) <= 1 for k, n in (("sums", 15), ("hard", 10), ("letters", 5)))
    assert held_out == leveled(MIXED, seed=9).test_prompts(30)
    assert len({prompt.text for prompt in held_out}) == len(held_out)
    assert {p.text for p in held_out}.isdisjoint(mixture.train_prompt(n).text for n in range(200))
    for prompt in held_out:
        assert mixture.score(prompt, prompt.answer) == 1.0
        assert mixture.score(prompt, "surely wrong") < 0.5
        assert prompt.text.startswith("Reverse: ") == (prompt.environment == "letters")


def test_levels_lay_their_parameters_over_the_tasks() -> None:
    task = leveled({**SUMS, "curriculum": {"levels": LEVELS, "success": 0.5}})
    for level, terms in enumerate(([2], [3], [6])):
        prompts = [task.train_prompt(n, level) for n in range(0, 9000, 450)]
        assert {len(p.metadata["fields"]["expression"].split()) // 2 + 1 for p in prompts} <= set(
            terms
        )
        assert {level_of(prompt) for prompt in prompts} == {level}
        assert all(task.score(prompt, prompt.answer) == 1.0 for prompt in prompts)
        assert prompts[-1] == leveled(
            {**SUMS, "curriculum": {"levels": LEVELS, "success": 0.5}}
        ).train_prompt(8550, level)
    held_out = task.test_prompts(30)
    assert Counter(map(level_of, held_out)) == {0: 10, 1: 10, 2: 10}
    texts = {prompt.text for prompt in held_out}
    assert texts.isdisjoint(
        task.train_prompt(n, level).text for n in range(99) for level in range(3)
    )


def test_a_level_ends_when_its_newest_groups_do_well() -> None:
    curriculum = CurriculumConfig(levels=[{}, {}, {}], success=0.5, groups=3)
    level = Level()
    numbers = []
    for drawn_at, reward in ((0, 0.0), (0, 1.0), (0, 0.4), (0, 0.1), (0, 1.0), (0, 1.0), (1, 1.0)):
        level.add(curriculum, drawn_at, reward)
        numbers.append(level.number)
    assert numbers == [0, 0, 0, 1, 1, 1, 1]
    for _ in range(9):
        level.add(curriculum, level.number, 1.0)
    assert level.number == 2


def taken(made: MadeRun, config: RunConfig) -> ActiveRun:
    """The run as whoever holds it sees it, from its log."""
    store, run_id = made.store, made.run_id
    return ActiveRun(
        run_id=run_id,
        config=config,
        store_uri=store.uri,
        store=store,
        folder=store.root,
        log=made.log,
        ledger=Ledger.fold(read_entries(store, run_id), read_incarnations(store, run_id)),
        meshes=Meshes(generators=(), opened_trainer=None, opened_verifier=None),
        environment=load_environment(config.environment, config.seed),
    )


def step(made: MadeRun, run: ActiveRun, number: int, reward: float) -> list[int]:
    """Draw and commit a step's four groups, each with this mean reward; the levels that they were drawn at."""
    drawn = draw(run, range(4 * number - 4, 4 * number))
    run.append(admitted(number, drawn))
    rows = [
        made_episodes.episode(each.draw, sample, reward=reward, environment=each.prompt.environment)
        for each in drawn
        for sample in range(2)
    ]
    episodes = pa.Table.from_pylist(rows, SCHEMA)
    made.log.append(made.generate(number, episodes), made.commit(number, episodes))
    return [level_of(each.prompt) for each in drawn]


def config_of(**environment: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"steps": 9, "groups_per_step": 4, "group_size": 2, "environment": environment}
    )


def test_levels_by_success_follow_from_the_log(tmp_path: Path) -> None:
    curriculum = {"levels": LEVELS, "success": 0.75, "groups": 8}
    config = config_of(**SUMS, curriculum=curriculum)
    made = MadeRun(LocalStore(tmp_path), "run")
    rewards = (0.0, 1.0, 1.0, 1.0, 0.0, 0.8, 0.8, 0.0)
    found = []
    for number, reward in enumerate(rewards, 1):
        # Each time anew from the log, as a run that goes on.
        found.append(step(made, taken(made, config), number, reward))
    assert found == [[level] * 4 for level in (0, 0, 0, 1, 1, 1, 1, 2)]
    whole = taken(made, config)
    ledger_levels = [group.draw.level for group in whole.ledger.groups.values() if group.draw]
    assert ledger_levels == [level for of_step in found for level in of_step]
    # What was drawn stays what it was, whatever has been learned since.
    first = draw(whole, range(4))
    assert [level_of(each.prompt) for each in first] == [0] * 4
    assert first == draw(taken(made, config), range(4))
    assert [level_of(each.prompt) for each in draw(whole, range(32, 36))] == [2] * 4


def test_one_that_never_left_its_process_draws_the_same(tmp_path: Path) -> None:
    curriculum = {"levels": LEVELS, "success": 0.75, "groups": 8}
    config = config_of(**SUMS, curriculum=curriculum)
    stores = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    kept, anew = MadeRun(stores[0], "run"), MadeRun(stores[1], "run")
    run = taken(kept, config)
    for number in range(1, 6):
        before = step(anew, taken(anew, config), number, 1.0)
        run.ledger = taken(kept, config).ledger
        assert step(kept, run, number, 1.0) == before
    assert before == [2] * 4


def test_levels_by_steps_and_tasks_without_levels(tmp_path: Path) -> None:
    tasks = {
        "rising": {**SUMS, "curriculum": {"levels": LEVELS, "steps": [2, 4]}},
        "same": {"name": "spell_backward"},
    }
    config = config_of(name="mixture", tasks=tasks)
    run = taken(MadeRun(LocalStore(tmp_path), "run"), config)
    levels: dict[int, set[int]] = {}
    for each in draw(run, range(36)):
        if each.prompt.environment == "rising":
            levels.setdefault(each.draw // 4 + 1, set()).add(level_of(each.prompt))
        else:
            assert level_of(each.prompt) == 0
    assert levels == {1: {0}, 2: {1}, 3: {1}} | {number: {2} for number in range(4, 10)}
    # A spare draw is of the step that is due, not of the end.
    spare = [each for each in draw(run, range(36, 50)) if each.prompt.environment == "rising"]
    assert spare and {level_of(each.prompt) for each in spare} == {0}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "mixture"}, "'mixture' with 0 environment.tasks"),
        ({"tasks": {"a": SUMS}}, "'number_sorting' with 1 environment.tasks"),
        ({**MIXED, "params": {"a": 1}}, "params is of one task, .*environment.tasks.NAME.params"),
        ({"name": "mixture", "tasks": {"a b": SUMS}}, "tasks.a b of 'chain_sum': name it"),
        ({"name": "mixture", "tasks": {"a": {"name": "mixture"}}}, "mix no mixture"),
        ({"curriculum": {"levels": [{}]}}, "has 1 levels and rises by nothing"),
        ({"curriculum": {"levels": [{}, {}], "steps": [2], "success": 1.0}}, "steps and success"),
        ({"curriculum": {"levels": [{}, {}, {}], "steps": [2]}}, "give 2 rising steps from 2 on"),
        ({"curriculum": {"levels": [{}, {}], "steps": [1]}}, "give 1 rising steps from 2 on"),
        ({"curriculum": {"success": 0.5}}, "has 0 levels"),
    ],
)
def test_what_is_neither_mixture_nor_curriculum_is_refused(
    section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        EnvironmentConfig.model_validate(section)


def test_what_cannot_be_made_names_the_task(tmp_path: Path) -> None:
    def load(section: dict[str, Any]) -> None:
        load_environment(EnvironmentConfig.model_validate(section), 0)

    with pytest.raises(ValueError, match=r"environment.tasks.a.name 'chain_sun' is no task"):
        load({"name": "mixture", "tasks": {"a": {"name": "chain_sun"}}})
    levels = {"levels": [{}, {"max_term": 3}], "steps": [2]}
    with pytest.raises(ValueError, match=r"max_term = 3.*max_terms"):
        load({**SUMS, "curriculum": levels})
    with pytest.raises(ValueError, match="'question_answer' is none of its tasks"):
        load({"name": "question_answer", "curriculum": levels})
    with pytest.raises(ValueError, match="let levels rise by steps"):
        RunConfig.model_validate(
            {
                "regime": "hybrid",
                "train_rounds": True,
                "environment": {**SUMS, "curriculum": {"levels": LEVELS, "success": 1.0}},
            }
        )
    assert cast(Any, RunConfig().environment.curriculum).levels == []
