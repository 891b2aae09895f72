"""Layouts of the trainer train alike, and each one's weights go from TorchStore to whoever wants which slices of them:
one rank, FSDP2, tensor parallelism and both.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import run_ranks
from safetensors.torch import load_file

from forge_core.config import TinyModelConfig
from forge_core.model import build_tiny_model
from forge_core.process_environment import MONARCH_ENVIRONMENT
from forge_core.weights.digest import digest
from forge_core.weights.manifest import Manifest, Slot
from forge_core.weights.segments import Pool
from forge_core.weights.slices import Slice

SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, context_length=128
)
LAYOUTS = {"one": (1, 1), "fsdp": (2, 1), "tensor": (2, 2), "both": (4, 2)}
"""Ranks, and how many of them share a layer."""
STEPS = 20
STORE = "layouts"
CALL_SECONDS = 60.0
FIELDS = {
    "recomputed": "activation_checkpointing=true",
    "half": "precision=bf16_autocast",
    "half-recomputed": "precision=bf16_autocast;activation_checkpointing=true;logprob_chunk_tokens=5",
}
"""Of trainers with which all layouts have to get on as well."""
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
    for name, fields in FIELDS.items():
        runs += [f"{r}x{t};{fields}:{name}-{r}x{t}=nothing+{STEPS}" for r, t in ((1, 1), (4, 2))]
    return run_ranks(folder, *runs)


def _kept(folder: Path, key: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    found = {}
    for path in sorted((folder / "store" / key).rglob("*.safetensors")):
        found |= {f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What came of one layout's version."""

    manifest: Manifest
    whole: dict[str, torch.Tensor]
    """All tensors."""
    slices: dict[tuple[int, int], dict[str, torch.Tensor]]
    """By rank of a consumer and how many there are."""
    num_buckets: dict[tuple[int, int], int]
    """Buckets that were fetched for them."""
    refusals: list[str]
    """Of a version one of whose bytes was changed in the store."""
    is_left: bool
    """Whether anything of it was in the store once it was deleted."""


def _manifest(folder: Path) -> Manifest:
    document = json.loads((folder / "manifest.json").read_text())
    slots = tuple(
        Slot(
            **{
                **slot,
                "shape": tuple(slot["shape"]),
                "held": Slice(*(tuple(each) for each in slot["held"].values())),
            }
        )
        for slot in document["slots"]
    )
    sizes = tuple(document["bucket_bytes"])
    return Manifest(**{**document, "slots": slots, "bucket_bytes": sizes, "store": STORE})


def _buckets(folder: Path, is_shared: bool) -> list[dict[int, torch.Tensor]]:
    """What each rank would put, by rank; in shared memory, or to travel in messages."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        buckets = {int(index): bucket for index, bucket in load_file(path).items()}
        if is_shared:
            segments = Pool().take([bucket.numel() for bucket in buckets.values()])
            pairs = zip(segments, buckets.values(), strict=True)
            buckets = dict(zip(buckets, (s.copy_(bucket) for s, bucket in pairs), strict=True))
        found.append(buckets)
    return found


def _wanted(manifest: Manifest, rank: int, ranks: int) -> dict[str, Slice]:
    """What a tensor parallel consumer wants: rows of the vocabulary and of colwise layers, columns of rowwise ones."""
    wanted = {}
    for slot in manifest.slots:
        shape = slot.shape
        if slot.name.endswith(("o_proj.weight", "down_proj.weight")):
            wanted[slot.name] = Slice.part(shape, 1, rank, ranks)
        elif slot.name.endswith("_proj.weight"):
            wanted[slot.name] = Slice.part(shape, 0, rank, ranks)
        elif len(shape) == 2:
            # Of an odd number of words.
            half = -(-shape[0] // ranks)
            size = min(half, shape[0] - rank * half)
            wanted[slot.name] = Slice((rank * half, 0), (size, shape[1]))
        else:
            wanted[slot.name] = Slice.whole(shape)
    return wanted


async def _fetch(folder: Path) -> dict[str, Fetched]:
    os.environ.update(MONARCH_ENVIRONMENT)
    from monarch.actor import this_host

    from forge_core.weights import store

    volume = this_host().spawn_procs(per_host={"procs": 1}, name="volume")
    try:
        await store.start(volume, STORE, timeout_seconds=CALL_SECONDS)
        fetched = {
            name: await _fetch_one(folder / "published" / name, name != "fsdp") for name in LAYOUTS
        }
        await store.forget(STORE, timeout_seconds=CALL_SECONDS)
    finally:
        await asyncio.wait_for(volume.stop("the test is over"), CALL_SECONDS)
    return fetched


async def _fetch_one(folder: Path, is_shared: bool) -> Fetched:
    """Put every rank's own buckets, and get them as each kind of consumer does."""
    import torchstore

    from forge_core.weights import store

    manifest = _manifest(folder)
    of_ranks = _buckets(folder, is_shared)
    for buckets in of_ranks:
        await store.put_version(manifest, buckets, timeout_seconds=CALL_SECONDS)
    whole = await store.get_tensors(manifest, timeout_seconds=CALL_SECONDS)
    slices, num_buckets = {}, {}
    for ranks in (1, 2):
        for rank in range(ranks):
            wanted = _wanted(manifest, rank, ranks)
            slices[rank, ranks] = await store.get_tensors(
                manifest, wanted, timeout_seconds=CALL_SECONDS
            )
            touched = await store.get_version(manifest, wanted, timeout_seconds=CALL_SECONDS)
            num_buckets[rank, ranks] = len(touched)
    index, bucket = next(iter(of_ranks[-1].items()))
    # Whoever reads the version has it still, and would see what is written there.
    [other] = Pool().take([bucket.numel()])
    other.copy_(bucket)[0] ^= 1
    await store.put_version(manifest, {index: other}, timeout_seconds=CALL_SECONDS)
    refusals = []
    for wanted in (None, _wanted(manifest, 0, 1)):
        with pytest.raises(ValueError) as caught:
            await store.get_tensors(manifest, wanted, timeout_seconds=CALL_SECONDS)
        refusals.append(str(caught.value))
    await store.delete_version(manifest, timeout_seconds=CALL_SECONDS)
    left = [await torchstore.exists(key, store_name=STORE) for key in manifest.keys]
    return Fetched(
        manifest=manifest,
        whole=whole,
        slices=slices,
        num_buckets=num_buckets,
        refusals=refusals,
        is_left=any(left),
    )


@pytest.fixture(scope="module")
def fetched(folder: Path, told: list[dict[str, Any]]) -> dict[str, Fetched]:
    return asyncio.run(_fetch(folder))


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


@pytest.mark.parametrize("name", FIELDS)
def test_layouts_train_alike_with_autocast_and_with_activations_computed_again(
    told: list[dict[str, Any]], name: str
) -> None:
    exact = _of(told, "one", "loss")
    one, both = (_of(told, f"{name}-{layout}", "loss") for layout in ("1x1", "4x2"))
    # bfloat16 has eight bits of mantissa, and other sums in each layout.
    close = 1e-4 if name == "recomputed" else 2e-2
    assert both == pytest.approx(one, rel=0, abs=close)
    assert one == pytest.approx(exact, rel=0, abs=close)
    assert (one == exact) == (name == "recomputed")


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


def _published(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights of a layout, as its checkpoint has them."""
    found = load_file(folder / "store" / name / "model.safetensors")
    return {**found, "lm_head.weight": found["model.embed_tokens.weight"]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_tensors_come_from_every_layout(
    folder: Path, fetched: dict[str, Fetched], name: str
) -> None:
    wanted, found = _published(folder, name), fetched[name].whole
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert digest(found) == fetched[name].manifest.digest
    # Of each element one copy travels; what is tied, once.
    parameters = sum(tensor.nbytes for tensor in wanted.values())
    once = parameters - wanted["lm_head.weight"].nbytes
    alignment = 64 * len(fetched[name].manifest.slots)
    assert once <= fetched[name].manifest.total_bytes <= once + alignment


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("consumer", [(0, 1), (0, 2), (1, 2)])
def test_slices_come_from_every_layout(
    folder: Path, fetched: dict[str, Fetched], name: str, consumer: tuple[int, int]
) -> None:
    whole, found = _published(folder, name), fetched[name].slices[consumer]
    wanted = _wanted(fetched[name].manifest, *consumer)
    assert found.keys() == whole.keys()
    for key, each in wanted.items():
        assert torch.equal(
            found[key], whole[key][each.within(Slice.whole(tuple(whole[key].shape)))]
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gives_what_it_holds_and_damage_is_seen(
    fetched: dict[str, Fetched], name: str
) -> None:
    one = fetched[name]
    ranks, _ = LAYOUTS[name]
    assert len(one.manifest.keys) == ranks
    assert one.num_buckets[0, 1] == ranks
    assert all("other bytes of version 20" in refusal for refusal in one.refusals)
    assert not one.is_left
