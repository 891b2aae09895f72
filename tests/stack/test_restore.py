"""Checkpoints of any number of ranks are loaded by any other: the same weights, moments and next steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from many_ranks import run_ranks
from safetensors.torch import load_file

from forge_core.config import TinyModelConfig
from forge_core.model import build_tiny_model

SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, context_length=128
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    build_tiny_model(SHAPE, 0, folder / "model")
    return folder


def _kept(folder: Path, key: str) -> dict[str, bytes]:
    """Every tensor of a checkpoint as bytes."""
    found = {}
    for path in sorted((folder / "store" / key).rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.name}/{name}"] = tensor.numpy().tobytes()
    return found


def test_a_checkpoint_is_loaded_by_any_number_of_ranks_and_goes_on_to_the_same_bits(
    folder: Path,
) -> None:
    # Written again after a restore, and after a restore of that; trained on, and trained at once.
    run_ranks(
        folder,
        "2x1:made=nothing+2,again=made+2,thrice=again+2,rest=thrice+3,whole=nothing+3",
        "1x1:alone=made+2",
    )
    made = _kept(folder, "made")
    assert len(made) > 60
    for key in ("again", "thrice", "alone"):
        assert _kept(folder, key) == made, key
    assert _kept(folder, "rest") == _kept(folder, "whole") != made
