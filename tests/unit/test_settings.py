"""Configs: which layer wins, and how each mistake is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forge_core.config import AlgorithmConfig, CorrectionConfig, RunConfig
from forge_core.settings import list_presets, load_config, stored_config
from storage.objects import LocalStore
from storage.runs import store_config


def refusal(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(preset="tiny", file=str(file) if file else None, overrides=list(overrides))
    sentence = str(caught.value)
    assert len(sentence.splitlines()) <= 2
    return sentence


def test_every_preset_is_a_valid_config() -> None:
    assert "tiny" in list_presets()
    for name in list_presets():
        load_config(preset=name, file=None, overrides=[])


def test_file_wins_over_preset_and_set_over_file(tmp_path: Path) -> None:
    preset = load_config(preset="tiny", file=None, overrides=[])
    file = tmp_path / "mine.toml"
    file.write_text("steps = 11\n[sampling]\nmax_tokens = 77\n[optimizer]\nlearning_rate = 0.5\n")
    config = load_config(preset="tiny", file=str(file), overrides=["steps=12"])
    assert (config.steps, config.sampling.max_tokens) == (12, 77)
    assert config.optimizer.learning_rate == 0.5
    assert config.group_size == preset.group_size
    assert config.environment == preset.environment


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "[environment.params]\nmin_numbers = 2\n"),
        ("a.json", '{"environment": {"params": {"min_numbers": 2}}}'),
        ("a.yaml", "environment:\n  params:\n    min_numbers: 2\n"),
    ],
)
def test_all_file_formats_merge_params_key_by_key(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    below = load_config(preset="tiny", file=None, overrides=[]).environment
    config = load_config(preset="tiny", file=str(file), overrides=["environment.params.size_x=3"])
    assert config.environment.params == {**below.params, "min_numbers": 2, "size_x": 3}
    assert config.environment.prompt_template == below.prompt_template


def test_another_environment_starts_its_section_afresh() -> None:
    config = load_config(preset="tiny", file=None, overrides=["environment.name=chain_sum"])
    assert config.environment.params == {}
    assert config.environment.prompt_template is None
    overrides = ["environment.name=chain_sum", "environment.params.max_terms=2"]
    config = load_config(preset="tiny", file=None, overrides=overrides)
    assert config.environment.params == {"max_terms": 2}


def test_values_of_set_are_read_as_their_field_needs() -> None:
    overrides = [
        "optimizer.learning_rate=1e-4",
        "environment.prompt_template={question}=",
        "model.path=null",
        "algorithm.scale_advantages=false",
        "environment.params={min_numbers: 3, max_numbers: 3}",
        "environment.params.note=a=b",
    ]
    config = load_config(preset="tiny", file=None, overrides=overrides)
    assert config.optimizer.learning_rate == 1e-4
    assert config.environment.prompt_template == "{question}="
    assert config.model.path is None
    assert config.algorithm.scale_advantages is False
    assert config.environment.params["min_numbers"] == 3
    assert config.environment.params["note"] == "a=b"


def test_a_loss_brings_its_numbers_and_those_given_win(tmp_path: Path) -> None:
    def algorithm(*overrides: str, file: Path | None = None) -> AlgorithmConfig:
        given = [f"algorithm.{each}" for each in overrides]
        path = str(file) if file else None
        return load_config(preset="tiny", file=path, overrides=given).algorithm

    plain = algorithm()
    assert (plain.loss, plain.clip_high, plain.scale_advantages) == ("dapo", 0.28, True)
    assert AlgorithmConfig() == plain.model_copy(update={"minibatches": 1})
    gspo = algorithm("loss=gspo")
    assert (gspo.clip_low, gspo.clip_high, gspo.minibatches) == (3e-4, 4e-4, plain.minibatches)
    assert algorithm("loss=gspo", "clip_low=0.1").clip_low == 0.1
    assert algorithm("loss=rloo").scale_advantages is False
    # Numbers of the loss below mean nothing to another.
    file = tmp_path / "mine.toml"
    file.write_text("[algorithm]\nclip_high = 0.9\nepochs = 3\n")
    assert algorithm(file=file).clip_high == 0.9
    other = algorithm("loss=grpo", file=file)
    assert (other.clip_high, other.epochs) == (0.2, 3)


def test_a_correction_brings_its_bounds() -> None:
    def correction(**given: Any) -> tuple[Any, ...]:
        made = CorrectionConfig(**given)
        again = CorrectionConfig.model_validate(made.model_dump())
        assert again == made
        return made.weights, made.level, made.low, made.high

    assert correction() == ("none", "token", None, None)
    assert correction(anchor="proximal") == ("truncated", "token", None, 2.0)
    assert correction(anchor="proximal", weights="none") == ("none", "token", None, None)
    assert correction(weights="masked", level="sequence") == ("masked", "sequence", 0.5, 5.0)
    assert correction(anchor="proximal", weights="masked", low=0.25)[2:] == (0.25, 5.0)


def test_another_anchor_starts_its_bounds_afresh() -> None:
    base = load_config(preset="tiny", file=None, overrides=["algorithm.correction.anchor=proximal"])
    override = "algorithm.correction.anchor=sampled"
    config = load_config(preset=None, file=None, overrides=[override], base=base.model_dump())
    assert config.algorithm.correction == CorrectionConfig()


def test_config_survives_json() -> None:
    config = load_config(preset="tiny", file=None, overrides=[])
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    assert type(config).model_validate(stored) == config


def test_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ValueError, match=r"'tinny'.*tiny"):
        load_config(preset="tinny", file=None, overrides=[])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=3", ["stepz = 3", "did you mean steps?"]),
        ("sampling.temprature=1", ["sampling.temprature", "sampling.temperature?"]),
        ("max_tokens=4", ["max_tokens = 4", "sampling.max_tokens?"]),
        ("steps=abc", ["steps = 'abc'", "whole number"]),
        ("steps=1.5", ["steps = 1.5", "whole number"]),
        ("steps=true", ["steps = True", "whole number"]),
        ("steps=-1", ["steps = -1", "greater than or equal to 0"]),
        ("sampling.temperature=9", ["sampling.temperature = 9", "less than or equal to 4"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate = inf", "finite"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate = nan"]),
        ("model.dtype=float16", ["model.dtype = 'float16'", "float32"]),
        ("model=3", ["model = 3", "table"]),
        ("steps.more=1", ["steps = {'more': 1}"]),
        ("algorithm.loss=popo", ["algorithm.loss = 'popo'", "dapo"]),
        (
            "algorithm.correction.weights=truncated",
            ["algorithm.correction.weights 'truncated'", "set anchor to 'proximal'"],
        ),
        ("algorithm.correction.high=3", ["algorithm.correction.high 3.0", "leave it out"]),
        (
            "algorithm.overlong_tokens=17",
            ["algorithm.overlong_tokens 17", "sampling.max_tokens 16"],
        ),
        ("sampling.top_p=0.5", ["sampling.top_p 0.5", "set it to 1.0"]),
        ("trainer.ranks=3", ["trainer.ranks 3", "groups_per_step", "multiple"]),
        ("trainer.tensor_parallel=3", ["ranks 2", "tensor_parallel 3", "3 times"]),
        ("model.tiny.num_heads=3", ["model.tiny.hidden_size 128", "num_heads 3"]),
        ("steps", ["--set 'steps'", "dotted.key=value"]),
        ("=3", ["--set '=3'", "dotted.key=value"]),
    ],
)
def test_refusals_name_field_value_and_mend(override: str, words: list[str]) -> None:
    sentence = refusal(override)
    for word in words:
        assert word in sentence


def test_turns_need_a_regime_and_devices_that_allow_them() -> None:
    colocated = "placement=colocated"
    assert "regime to sync or hybrid" in refusal(colocated, "regime=async")
    assert "trainer.device 'cuda' differ" in refusal(colocated, "trainer.device=cuda")
    on_gpu = [colocated, "trainer.device=cuda", "generators.device=cuda", "memory_fraction=0.5"]
    assert "memory_fraction 0.5 is below generators.gpu_memory_fraction 0.85" in refusal(*on_gpu)


def test_many_mistakes_take_two_lines() -> None:
    sentence = refusal("steps=a", "seed=-1", "group_size=1")
    assert len(sentence.splitlines()) == 2
    assert "1 more" in sentence


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "steps = = 3", "no valid toml"),
        ("a.json", "{", "no valid json"),
        ("a.yaml", "a: [", "no valid yaml"),
        ("a.yaml", "- 1", "holds a list"),
        ("a.ini", "", "unknown suffix"),
        ("a.toml", "sttteps = 3", "sttteps = 3"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert words in refusal(file=file)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(file=tmp_path / "none.toml")


def test_importing_the_config_loads_nothing_heavy() -> None:
    script = (
        "import sys, forge_core.config, forge_core.settings;"
        "print([m for m in ('torch', 'prefect', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_stored_config_that_another_version_wrote_is_one_sentence(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    config = RunConfig().model_dump(mode="json")
    store_config(store, "mine", config)
    assert stored_config(store, "mine") == RunConfig()
    config["generators"]["wings"] = 2
    store_config(store, "theirs", {**config, "steps": "many"})
    with pytest.raises(ValueError) as caught:
        stored_config(store, "theirs")
    sentence = str(caught.value)
    assert "whose config this one does not understand (generators.wings, steps)" in sentence
    assert sentence.endswith("which runs/theirs/incarnations/000000.json names")
    assert len(sentence.splitlines()) == 1
