"""The tiny model and checkpoints: ordinary Hugging Face folders, the same bytes for the same seed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge_core import checkpoint
from forge_core.checkpoint import (
    TRAINER_FOLDER,
    Snapshot,
    read_optimizer,
    read_weights,
    write_checkpoint,
)
from forge_core.config import TinyModelConfig
from forge_core.model import build_tiny_model, build_tokenizer, load_causal_lm
from forge_core.weights.packing import pack, unpack
from storage.objects import LocalStore

SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, context_length=128
)
PRINTABLE = "".join(map(chr, range(32, 127)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(SHAPE, 3, directory)
    return directory


@pytest.fixture(params=["built", "loaded"])
def tokenizer(request: pytest.FixtureRequest, directory: Path) -> Any:
    if request.param == "built":
        return build_tokenizer(SHAPE.context_length)
    return AutoTokenizer.from_pretrained(str(directory))


@pytest.mark.parametrize(
    "text",
    [
        PRINTABLE,
        "two\nlines\n\n",
        "é",
        "na\u00efve \u65e5\u672c 🦀!",
        "  two  spaces ",
        "<0x41>",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    num_bytes = sum(1 if char in PRINTABLE else len(char.encode()) for char in text)
    assert len(ids) == num_bytes


def test_a_printable_character_is_one_token_of_its_own(tokenizer: Any) -> None:
    ids = tokenizer(PRINTABLE).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == list(PRINTABLE)
    assert len(set(ids)) == 95
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == PRINTABLE


def test_a_seed_makes_the_same_bytes_and_another_seed_others(
    directory: Path, tmp_path: Path
) -> None:
    torch.manual_seed(
        99
    )  # What was drawn before has no say, and what is drawn after is undisturbed.
    state = torch.random.get_rng_state()
    for name, seed in (("again", 3), ("other", 4)):
        build_tiny_model(SHAPE, seed, tmp_path / name)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = (directory / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights
    names = {path.name for path in directory.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_the_model_that_is_loaded_is_the_one_that_was_written(directory: Path) -> None:
    model = load_causal_lm(str(directory))
    stored = load_file(directory / "model.safetensors")
    state = model.state_dict()
    assert set(state) - set(stored) == {"lm_head.weight"}
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    config: Any = model.config
    assert config.num_hidden_layers == SHAPE.num_layers
    assert config.max_position_embeddings == SHAPE.context_length
    assert config.eos_token_id == build_tokenizer(128).eos_token_id


def test_weights_that_are_pickled_are_not_read(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    torch.save(load_file(directory / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(str(tmp_path))


def test_a_checkpoint_is_a_folder_that_transformers_loads(directory: Path, tmp_path: Path) -> None:
    model: Any = load_causal_lm(str(directory))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    # Views into buckets, as a trainer has them.
    weights = unpack(*pack(model.state_dict(keep_vars=True).items(), 5))
    moments = {"model.norm.weight/exp_avg": torch.arange(32.0), "step": torch.tensor(2.0)}
    plain = {"param_groups": [{"lr": 0.1, "betas": [0.9, 0.95]}]}
    store = LocalStore(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    snapshot = Snapshot(
        run_id="r",
        step=5,
        weights_digest="d",
        weights=weights,
        optimizer_tensors=moments,
        optimizer_rest=plain,
    )
    key, files = write_checkpoint(store, "checkpoints/5/", model, tokenizer, snapshot)
    assert key == "checkpoints/5/"
    folder = tmp_path / "checkpoints" / "5"

    again = AutoModelForCausalLM.from_pretrained(str(folder))
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    text = f"{PRINTABLE}\né"
    loaded = AutoTokenizer.from_pretrained(str(folder))
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)

    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert set(state) - set(stored.keys()) == {"lm_head.weight"}
        assert stored.metadata() == {"format": "pt"}
    kept = load_file(folder / TRAINER_FOLDER / "optimizer.safetensors")
    assert kept.keys() == moments.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in moments.items())
    assert json.loads((folder / TRAINER_FOLDER / "optimizer.json").read_text()) == plain

    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path, data in found.items():
        # There is no third kind of file, a pickle under whatever name among them.
        json.loads(data) if path.suffix == ".json" else load_file(path)
    told = {tmp_path / file.key: (file.sha256, file.bytes) for file in files}
    assert told == {
        path: (hashlib.sha256(data).hexdigest(), len(data)) for path, data in found.items()
    }


def test_a_large_checkpoint_is_in_files_of_bounded_size(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_FILE_BYTES", 20_000)
    model: Any = load_causal_lm(str(directory))
    # All in one bucket, whose views share their storage.
    weights = unpack(*pack(model.state_dict(keep_vars=True).items(), 1))
    moments = {f"{name}/exp_avg": tensor.clone() for name, tensor in weights.items()}
    store = LocalStore(tmp_path)
    snapshot = Snapshot(
        run_id="r",
        step=5,
        weights_digest="d",
        weights=weights,
        optimizer_tensors=moments,
        optimizer_rest={},
    )
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    key, files = write_checkpoint(store, "c/", model, tokenizer, snapshot)
    # The embedding alone is larger than a file is to be; tied tensors have moments each, and one file of weights.
    for named, num_larger in (("model-", 1), ("trainer/optimizer-", 2)):
        sizes = sorted(f.bytes for f in files if f.key.startswith(f"c/{named}"))
        assert len(sizes) >= num_larger + 3
        assert sizes[-num_larger - 1] < 22_000 < sizes[-num_larger]
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "c")).state_dict()
    read = {k: v for part in read_weights(store, key, files) for k, v in part.items()}
    assert read.keys() == weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(read[name], weights[name]) for name in read)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert {k for part in read_optimizer(store, key, files) for k in part} == moments.keys()
