"""What is refused before anything starts, with the store untouched, and what would be started."""

import json
import os
from pathlib import Path

import pytest

from flows.liveness import true_status
from flows.preflight import dry_run_plan, preflight
from forge_core.placement.hosts import visible_gpus
from forge_core.settings import load_config
from storage.objects import open_store
from storage.records import Controller, Incarnation
from storage.runs import store_config

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that looks like a model with a context of 64 tokens."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 64}')
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


def check(tmp_path: Path, *overrides: str, run_id: str | None = None) -> None:
    config = load_config(preset="tiny", file=None, overrides=list(overrides))
    preflight(config, str(tmp_path / "store"), run_id=run_id)


def refusal(tmp_path: Path, *overrides: str, run_id: str | None = None) -> str:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as caught:
        check(tmp_path, *overrides, run_id=run_id)
    assert sorted(tmp_path.rglob("*")) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_the_preset_passes_and_leaves_no_trace(tmp_path: Path) -> None:
    check(tmp_path, run_id="new")
    assert list(tmp_path.iterdir()) == []


def test_a_model_directory_passes(tmp_path: Path, model: Path) -> None:
    check(tmp_path, f"model.path={model}", "sampling.max_tokens=32")


def test_model_path_that_is_no_directory(tmp_path: Path) -> None:
    assert "hf://owner/name" in refusal(tmp_path, "model.path=some/model")
    assert "no hub id" in refusal(tmp_path, "model.path=hf://model")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_incomplete_model_directories(
    tmp_path: Path, model: Path, missing: str, words: str
) -> None:
    (model / missing).unlink()
    sentence = refusal(tmp_path, f"model.path={model}")
    assert words in sentence
    assert f"model.path '{model}'" in sentence


def test_pickled_weights(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickle" in refusal(tmp_path, f"model.path={model}")


def test_missing_shard(tmp_path: Path, model: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-1.safetensors" in refusal(tmp_path, f"model.path={model}")


def test_broken_config_and_tokenizer(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer.json that cannot be read" in refusal(tmp_path, f"model.path={model}")
    (model / "config.json").write_text("{")
    assert "no JSON" in refusal(tmp_path, f"model.path={model}")


def test_slow_tokenizers_pass(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text("{}")
    (model / "tokenizer.model").write_bytes(b"")
    check(tmp_path, f"model.path={model}", "sampling.max_tokens=32")


def test_prompt_and_response_longer_than_the_context(tmp_path: Path, model: Path) -> None:
    for asked, context in ((2048, "model.tiny.context_length 2048"), (5000, "2048")):
        sentence = refusal(tmp_path, f"sampling.max_tokens={asked}")
        assert f"sampling.max_tokens {asked}" in sentence
        assert context in sentence
    # Ten words and 54 tokens fill the 64 of the directory; one more does not fit.
    template = "environment.prompt_template=" + " ".join(["a"] * 9) + " {source_index}"
    check(tmp_path, f"model.path={model}", template, "sampling.max_tokens=54")
    sentence = refusal(tmp_path, f"model.path={model}", template, "sampling.max_tokens=55")
    assert "a prompt of 10 tokens makes 65" in sentence


def test_more_gpus_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    overrides = ["trainer.device=cuda", "generators.device=cuda", "generators.replicas=3"]
    sentence = refusal(tmp_path, *overrides)
    assert "generators.replicas 3 + trainer.ranks 2" in sentence
    assert "5 GPUs and there are 0" in sentence


@pytest.mark.parametrize("visible", ["", "-1", "-1,0"])
def test_gpus_that_are_hidden_do_not_count(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == ()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("environment.name=no_task", "'no_task'"),
        ("environment.name=nowhere:Thing", "nowhere:Thing"),
        ("environment.prompt_template={nope}", "{nope}"),
        ("environment.params.min_number=3", "min_number = 3"),
        ("environment.test_fraction=1e-12", "test_fraction 1e-12"),
    ],
)
def test_environments_that_cannot_give_prompts(tmp_path: Path, override: str, words: str) -> None:
    assert words in refusal(tmp_path, override)


def test_warm_start_without_answers(tmp_path: Path) -> None:
    overrides = ["environment.name=graph_color", "warm_start.steps=5"]
    assert "warm_start.steps 5" in refusal(tmp_path, *overrides)
    check(tmp_path, overrides[0], "warm_start.steps=0")


def test_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    assert str(tmp_path / "store") in refusal(tmp_path)


def test_run_id_that_exists_or_cannot_be_one(tmp_path: Path) -> None:
    store_config(open_store(str(tmp_path / "store")), "old", {})
    assert "--run-id 'old'" in refusal(tmp_path, run_id="old")
    assert "'../x'" in refusal(tmp_path, run_id="../x")
    check(tmp_path, run_id="new")


def test_heads_that_cannot_be_shared_out(tmp_path: Path) -> None:
    check(tmp_path, "generators.tensor_parallel=4")
    sentence = refusal(tmp_path, "generators.tensor_parallel=3")
    assert "generators.tensor_parallel 3" in sentence and "4 attention heads" in sentence
    check(tmp_path, "trainer.tensor_parallel=2", "trainer.ranks=2")
    for overrides, words in (
        (
            ["trainer.tensor_parallel=4", "trainer.ranks=4"],
            ["tensor_parallel 4", "2 heads of keys"],
        ),
        (
            ["trainer.tensor_parallel=2", "trainer.ranks=6", "groups_per_step=60"],
            ["trainer.ranks 6", "128 rows of queries", "a divisor of 128"],
        ),
    ):
        sentence = refusal(tmp_path, *overrides, "warm_start.batch_size=120")
        assert all(word in sentence for word in words), sentence


def test_plan_tells_processes_and_config(tmp_path: Path) -> None:
    overrides = ["generators.replicas=3", "trainer.ranks=4"]
    config = load_config(preset="tiny", file=None, overrides=overrides)
    plan = json.loads(json.dumps(dry_run_plan(config, str(tmp_path), None)))
    assert plan["meshes"]["generators"]["meshes"] == 3
    assert plan["meshes"]["trainer"]["processes_per_mesh"] == 4
    assert type(config).model_validate(plan["config"]) == config


def test_a_run_whose_controller_is_gone_is_interrupted() -> None:
    me = Controller.this_process(versions={}, git_commit=None)
    ghost = me.model_copy(update={"pid": 2**22 - 1})
    # Another process had this one's number when it claimed the run.
    namesake = me.model_copy(update={"claimed_at": 1000.0})
    elsewhere = ghost.model_copy(update={"host": "elsewhere"})
    assert os.getpid() == me.pid

    def status(logged: str, controller: Controller) -> str:
        incarnation = Incarnation(
            run_id="r", incarnation=0, previous_last=None, controller=controller
        )
        return true_status(logged, [incarnation])

    assert status("running", me) == "running"
    assert status("running", elsewhere) == "running"
    assert status("running", ghost) == "interrupted"
    assert status("running", namesake) == "interrupted"
    assert status("finished", ghost) == "finished"
