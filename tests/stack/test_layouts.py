"""Layouts of the trainer train alike: one rank, FSDP2, tensor parallelism and both."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import run_ranks
from safetensors.torch import load_file

from forge_core.config import TinyModelConfig
from forge_core.model import build_tiny_model

SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, context_length=128
)
LAYOUTS = {"one": (1, 1), "fsdp": (2, 1), "tensor": (2, 2), "both": (4, 2)}
"""Ranks, and how many of them share a layer."""
STEPS = 20
GOES_ON = 3
"""Steps after a checkpoint of another layout."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    build_tiny_model(SHAPE, 0, folder / "model")
    return folder


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    """What each layout tells of its steps, and of those after the checkpoint of one rank.

    Each also loads the checkpoint of the layout before it and writes it again.
    """
    runs, before = [], ""
    for name, (ranks, share) in LAYOUTS.items():
        jobs = [f"{name}=nothing+{STEPS}", f"{name}-on=one+{STEPS + GOES_ON}"]
        if before:
            jobs.append(f"{name}-copy={before}+{STEPS}")
        runs.append(f"{ranks}x{share}:{','.join(jobs)}")
        before = name
    return run_ranks(folder, *runs)


def _kept(folder: Path, key: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    found = {}
    for path in sorted((folder / "store" / key).rglob("*.safetensors")):
        found |= {f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def _of(told: list[dict[str, Any]], key: str, figure: str) -> list[float]:
    return [each[figure] for each in told if each["key"] == key]


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_every_layout_has_the_curve_of_one_rank(told: list[dict[str, Any]], name: str) -> None:
    losses = _of(told, "one", "loss")
    assert len(losses) == STEPS and len({round(loss, 3) for loss in losses}) > STEPS // 2
    # Every step was clipped, and learned.
    assert min(_of(told, "one", "grad_norm")) > 0.1
    for figure in ("loss", "grad_norm", "entropy"):
        wanted, found = (_of(told, each, figure) for each in ("one", name))
        assert found == pytest.approx(wanted, rel=0, abs=1e-4), figure


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_weights_and_moments_end_alike(folder: Path, told: list[dict[str, Any]], name: str) -> None:
    wanted, found = _kept(folder, "one"), _kept(folder, name)
    assert found.keys() == wanted.keys() and len(wanted) > 60
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-3, msg=key)


def test_a_checkpoint_of_any_layout_is_loaded_by_any_other_to_the_bit(
    folder: Path, told: list[dict[str, Any]]
) -> None:
    names = list(LAYOUTS)
    for before, name in pairwise(names):
        wanted, found = _kept(folder, before), _kept(folder, f"{name}-copy")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_every_layout_goes_on_from_it_alike(told: list[dict[str, Any]], name: str) -> None:
    for figure in ("loss", "grad_norm"):
        wanted, found = (_of(told, f"{each}-on", figure) for each in ("one", name))
        assert len(wanted) == GOES_ON
        assert found == pytest.approx(wanted, rel=0, abs=1e-4), figure
