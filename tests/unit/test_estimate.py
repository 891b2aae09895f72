"""Estimates of memory and disk: parameters are counted as models count them, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.estimate import GIB, Need, check_fits, estimate, model_shape
from flows.model_directory import ModelDirectory
from flows.preflight import check_machine
from forge_core.config import RunConfig
from forge_core.model import build_tiny_model, load_causal_lm
from forge_core.rounds import round_config
from forge_core.settings import load_config

FORGEFLOW = str(Path(sys.executable).parent / "forgeflow")


def _config(tmp_path: Path, preset: str, *overrides: str) -> RunConfig:
    questions = tmp_path / "questions.jsonl"
    if not questions.exists():
        rows = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(100)]
        questions.write_text("\n".join(json.dumps(row) for row in rows))
    path = [] if preset == "tiny" else [f"environment.params.path={questions}"]
    return load_config(preset=preset, file=None, overrides=[*path, *overrides])


def test_parameters_are_those_of_the_model_norms_aside(tmp_path: Path) -> None:
    config = _config(tmp_path, "tiny")
    build_tiny_model(config.model.tiny, 0, tmp_path / "model")
    matrices = [p for p in load_causal_lm(str(tmp_path / "model")).parameters() if p.ndim > 1]
    directory = ModelDirectory.open(str(tmp_path / "model"))
    for of_config, model in (
        (config, None),
        (
            config.model_copy(update={"model": config.model.model_copy(update={"path": "x"})}),
            directory,
        ),
    ):
        shape = model_shape(of_config, model)
        assert shape is not None
        assert shape.num_parameters == sum(p.numel() for p in matrices)


def test_a_mixture_of_experts_is_no_dense_model(tmp_path: Path) -> None:
    build_tiny_model(_config(tmp_path, "tiny").model.tiny, 0, tmp_path / "model")
    config_file = tmp_path / "model" / "config.json"
    document = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**document, "num_experts": 128}))
    config = _config(tmp_path, "tiny", f"model.path={tmp_path / 'model'}")
    assert model_shape(config, ModelDirectory.open(str(tmp_path / "model"))) is None


@pytest.mark.parametrize(("preset", "billions"), [("gsm8k-0.6b", 0.596), ("gsm8k-8b", 8.19)])
def test_presets_have_the_size_of_their_name(tmp_path: Path, preset: str, billions: float) -> None:
    shape = _config(tmp_path, preset).model.shape
    assert shape is not None
    assert shape.num_parameters / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(
    ("preset", "too_small", "enough"), [("gsm8k-0.6b", 12, 24), ("gsm8k-8b", 40, 80)]
)
def test_gpus_that_are_too_small_are_refused(
    tmp_path: Path, preset: str, too_small: int, enough: int
) -> None:
    def of_gpus(gib: int) -> list[object]:
        config = _config(tmp_path, preset, f"gpu_memory_gib={gib}")
        shape = config.model.shape
        assert shape is not None
        return [n for n in estimate(config, shape, str(tmp_path)) if n.name.startswith("GPU")]

    check_fits(of_gpus(enough))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"GPU of each .* has {too_small}.0 GiB .* about"):
        check_fits(of_gpus(too_small))  # type: ignore[arg-type]


def test_sharding_lowers_what_a_rank_holds(tmp_path: Path) -> None:
    def rank(ranks: int, share: int = 1) -> int:
        config = _config(
            tmp_path,
            "gsm8k-8b",
            f"trainer.ranks={ranks}",
            f"trainer.tensor_parallel={share}",
        )
        assert config.model.shape is not None
        (need,) = [
            n for n in estimate(config, config.model.shape, str(tmp_path)) if "trainer" in n.name
        ]
        return need.parts["parameters, gradients, optimizer"]

    assert rank(8) == pytest.approx(rank(4) / 2, rel=1e-6)
    assert rank(4) > 30 * GIB
    # Each rank of a group holds the embeddings.
    assert rank(8) < rank(8, share=2) < 1.5 * rank(8)


def _needs(config: RunConfig, store: Path) -> dict[str, Need]:
    assert config.model.shape is not None
    return {need.name: need for need in estimate(config, config.model.shape, str(store))}


def test_a_run_that_starts_no_engine_is_not_asked_for_one(tmp_path: Path) -> None:
    trains = _config(tmp_path, "gsm8k-8b", "regime=hybrid", "train_rounds=true")
    collects = round_config(trains, "t", 2, 0)
    whole = trains.model_copy(update={"train_rounds": False})
    of_whole, of_training, of_collecting = (
        _needs(config, tmp_path) for config in (whole, trains, collects)
    )
    assert "GPU of each generator" in of_whole.keys() & of_collecting.keys()
    assert "GPU of each generator" not in of_training
    assert "generators" not in of_training["this machine's memory"].mend
    memory = [needs["this machine's memory"].parts for needs in (of_training, of_whole)]
    assert memory[0].keys() == {"controller", "trainer"}
    assert memory[0].keys() < memory[1].keys()
    # Episodes are the disk of who generates them, a round's of who collects one, and checkpoints of who trains.
    episodes = [needs["the store's disk"].parts.get("episodes") for needs in
                (of_training, of_whole, of_collecting)]  # fmt: skip
    assert episodes[0] is None
    assert episodes[1] == episodes[2] * trains.steps / trains.steps_per_round  # type: ignore[operator]
    assert len(of_collecting["the store's disk"].parts) == 1


def test_gpus_are_counted_by_what_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = _config(tmp_path, "gsm8k-8b", "regime=hybrid", "train_rounds=true")
    with pytest.raises(ValueError, match=rf"^trainer.ranks {config.trainer.ranks} on device cuda"):
        check_machine(config, str(tmp_path), None)
    with pytest.raises(ValueError, match=r"^generators.replicas .* trainer.ranks"):
        check_machine(round_config(config, "t", 1, 0), str(tmp_path), None)


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ([], 5),
        (["checkpoint.keep_last=0"], 12),
        (["checkpoint.keep_last=1", "checkpoint.keep_every=50"], 5),
        (["checkpoint.keep_best=true"], 6),
        (["checkpoint.every=0"], 2),
    ],
)
def test_checkpoints_that_are_pruned_need_no_room(
    tmp_path: Path, overrides: list[str], number: int
) -> None:
    config = _config(
        tmp_path,
        "gsm8k-8b",
        "steps=100",
        "checkpoint.every=10",
        "checkpoint.keep_last=3",
        *overrides,
    )
    assert f"{number} checkpoints or more" in _needs(config, tmp_path)["the store's disk"].parts


def test_a_dry_run_prints_the_estimate_and_then_refuses(tmp_path: Path) -> None:
    _config(tmp_path, "gsm8k-8b")
    command = [
        FORGEFLOW, "run", "--preset", "gsm8k-8b", "--dry-run", "--store", str(tmp_path / "store"),
        "--set", f"environment.params.path={tmp_path / 'questions.jsonl'}",
        "--set", "gpu_memory_gib=24", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    plan = json.loads(done.stdout)
    assert done.returncode == 2
    assert done.stderr.strip() == plan["refused"]
    assert {need["name"] for need in plan["needs"]} >= {
        "GPU of each generator", "GPU of each trainer rank", "this machine's memory", "the store's disk",
    }  # fmt: skip
    assert all(need["bytes"] == sum(need["parts_bytes"].values()) for need in plan["needs"][1:])
    assert not (tmp_path / "store").exists()
