"""Environments: ids, the split, streams that can be asked again, and the package's own scorers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from forge_core.config import EnvironmentConfig
from forge_core.environments import Environment, Prompt, load_environment
from forge_core.environments.base import is_held_out, prompt_id
from forge_core.environments.jsonable import from_json, to_json
from forge_core.environments.template import render
from forge_core.settings import load_config


def environment(seed: int = 0, **config: Any) -> Environment:
    return load_environment(EnvironmentConfig(**config), seed)


def stored_and_read(prompt: Prompt) -> Prompt:
    return dataclasses.replace(prompt, metadata=json.loads(json.dumps(prompt.metadata)))


def test_training_shares_no_prompt_with_test_whatever_the_seed() -> None:
    config = load_config(preset="tiny", file=None, overrides=[]).environment
    tests = [load_environment(config, seed).test_prompts(500) for seed in (0, 1, 2)]
    assert tests[0] == tests[1] == tests[2]
    held_out = {prompt.text for prompt in tests[0]}
    assert len(held_out) == len(tests[0]) == 500
    for seed in (0, 1, 2):
        stream = load_environment(config, seed)
        assert held_out.isdisjoint(stream.train_prompt(n).text for n in range(1000))


def test_ordinals_are_deterministic_and_seeds_differ() -> None:
    left, right, other = environment(7), environment(7), environment(8)
    late = left.train_prompt(700)
    assert [right.train_prompt(n) for n in range(701)][-1] == late
    assert left.train_prompt(3) == right.train_prompt(3)
    texts = [left.train_prompt(n).text for n in range(200)]
    assert len(set(texts)) > 190
    # reasoning-gym's own seeds would make one stream the other, shifted by one.
    assert set(texts).isdisjoint(other.train_prompt(n).text for n in range(200))


def test_prompt_ids_are_stable() -> None:
    assert prompt_id("sum", "1+1=", "2") == "c811ee343feb9be18af1f16122fa80f4"
    ids = {
        prompt_id("sum", "1+1=", "2"),
        prompt_id("sum", "1+1=", "3"),
        prompt_id("s", "1+1=", "2"),
    }
    assert len(ids) == 3
    # Joined without care, these two would be one.
    assert prompt_id("a", "bc", "") != prompt_id("ab", "c", "")


def test_split_follows_the_text_and_holds_out_the_fraction() -> None:
    texts = [f"prompt {n}" for n in range(20_000)]
    for fraction in (0.1, 0.5):
        assert abs(sum(is_held_out(text, fraction) for text in texts) / 20_000 - fraction) < 0.01
    # A larger share only adds prompts.
    assert all(is_held_out(text, 0.5) for text in texts if is_held_out(text, 0.1))


@pytest.mark.parametrize(
    "name",
    [
        *("number_sorting", "chain_sum", "arc_agi", "spell_backward", "word_ladder", "acre"),
        *("gsm_symbolic", "pool_matrix", "countdown"),
    ],
)
def test_own_answer_scores_one_after_storage_and_nonsense_does_not(name: str) -> None:
    task, scorer = environment(name=name), environment(seed=5, name=name)
    for prompt in [*(task.train_prompt(n) for n in range(3)), *task.test_prompts(2)]:
        read = stored_and_read(prompt)
        assert read == prompt
        assert scorer.score(read, prompt.answer) == 1.0
        assert task.score(read, "surely wrong") < 0.5


@pytest.mark.parametrize("name", ["prime_factorization", "coin_flip", "game_of_life"])
def test_answers_that_a_scorer_cannot_parse_score_nothing(name: str) -> None:
    task = environment(name=name)
    prompt = task.train_prompt(0)
    for response in ("5 + 5", "1e999", "{}", "[]", ""):
        assert task.score(prompt, response) < 0.5


def test_a_scorer_that_fails_on_the_reference_answer_too_is_not_hidden() -> None:
    task = environment(name="prime_factorization")
    broken = dataclasses.replace(task.train_prompt(0), answer="no number")
    with pytest.raises(ValueError, match="no number"):
        task.score(broken, "2 + 5")


def test_template_renders_fields_and_joins_lists() -> None:
    metadata = {"direction": "ascending", "numbers": [3, 1], "question": "hidden"}
    template = "{direction:.1}|{numbers:, }|{metadata[direction]}|{question}|{{}}|{numbers}"
    rendered = render("prompt_template", template, "Q", metadata)
    assert rendered == "a|3, 1|ascending|Q|{}|[3, 1]"
    assert render("prompt_template", None, "Q {x}", metadata) == "Q {x}"


@pytest.mark.parametrize("template", ["{nope}", "{metadata[nope]}", "{}", "{question.nope}"])
def test_template_with_a_missing_field_lists_the_fields(template: str) -> None:
    with pytest.raises(
        ValueError, match=r"prompt_template.*fields are direction, question, metadata"
    ):
        render("prompt_template", template, "Q", {"direction": "up"})


@pytest.mark.parametrize("template", ["{question", "{question:d}"])
def test_template_that_is_no_format_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="cannot be rendered"):
        render("prompt_template", template, "Q", {})


def test_answer_template_writes_the_target_and_not_the_answer() -> None:
    params = {"min_numbers": 2, "max_numbers": 2, "max_decimals": 0}
    task = environment(params=params, answer_template="[{sorted_numbers:,}]")
    prompt = task.train_prompt(0)
    low, high = prompt.metadata["fields"]["sorted_numbers"]
    assert prompt.target == f"[{low},{high}]" != prompt.answer == f"['{low}', '{high}']"
    assert task.score(prompt, prompt.target) == 1.0
    assert environment(params=params).train_prompt(0).target == prompt.answer
    assert prompt.prompt_id == environment(params=params).train_prompt(0).prompt_id


def test_json_keeps_kinds_of_containers() -> None:
    value = {"a": (1, [2.5, None]), "b": {1: "x", (2, 3): {4}}, "c": {"__tuple__": [1]}, "d": True}
    assert from_json(json.loads(json.dumps(to_json(value)))) == value
    with pytest.raises(ValueError, match="object"):
        to_json(object())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "number_sortin"}, "'number_sortin'.*number_sorting"),
        ({"params": {"min_number": 3}}, "min_number = 3.*min_numbers"),
        ({"params": {"seed": 3}}, "seed = 3"),
        ({"params": {"min_numbers": 9, "max_numbers": 2}}, "not accepted"),
        ({"params": {"min_numbers": "many"}}, "not accepted"),
        ({"name": "no_such_module:Thing"}, "does not resolve"),
        ({"name": "json:NoSuchClass"}, "has no callable"),
        ({"name": "/nowhere/file.py:Thing"}, "does not resolve"),
        ({"name": "pathlib:PurePath"}, "cannot be made from a config"),
    ],
)
def test_environments_that_do_not_resolve_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        environment(**config)


def test_a_task_without_held_out_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="holds out no prompt"):
        environment(name="coin_flip", prompt_template="all", test_fraction=1e-9).test_prompts(1)
    with pytest.raises(ValueError, match="no prompt of coin_flip to train on"):
        environment(name="coin_flip", prompt_template="all", test_fraction=0.999999).train_prompt(0)


def test_fewer_test_prompts_where_there_are_no_more() -> None:
    few = environment(name="coin_flip", prompt_template="{num_trials}", test_fraction=0.5)
    prompts = few.test_prompts(100)
    assert 0 < len(prompts) < 100
    assert len({prompt.text for prompt in prompts}) == len(prompts)


def test_a_class_in_a_file_is_an_environment(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n"
        "    def __init__(self, config, seed):\n"
        "        self.name = f'mine-{seed}'\n"
        "    def train_prompt(self, ordinal): ...\n"
        "    def test_prompts(self, num_prompts): ...\n"
        "    def score(self, prompt, response):\n"
        "        return 0.25\n"
        "class Half:\n"
        "    def __init__(self, config, seed): ...\n"
    )
    mine = environment(seed=4, name=f"{file}:Mine")
    assert mine.name == "mine-4"
    with pytest.raises(ValueError, match="is no environment"):
        environment(name=f"{file}:Half")
