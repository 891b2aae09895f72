"""A checkpoint: weights in Hugging Face layout, and what training needs beside them, without pickle.

Files of a checkpoint count only once the run's log names them, so a half-written one is never seen.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save

from storage.objects import ObjectStore
from storage.records import FileRef

TRAINER_FOLDER = "trainer/"
_INDEX = "model.safetensors.index.json"


def write_checkpoint(
    store: ObjectStore,
    key: str,
    model: Any,
    tokenizer: Any,
    weights: dict[str, torch.Tensor],
    optimizer: tuple[dict[str, torch.Tensor], dict[str, Any]],
) -> tuple[FileRef, ...]:
    """Write every file of a checkpoint under the folder `key`; returns what was written.

    `weights` are full CPU tensors by their Hugging Face names, tied ones under each of their names;
    `optimizer` is what `Learner.full_state` gives.
    """
    tensors, plain = optimizer
    files = [
        *_weight_files(weights),
        *_description_files(model, tokenizer),
        (f"{TRAINER_FOLDER}optimizer.safetensors", save(tensors)),
        (f"{TRAINER_FOLDER}optimizer.json", json.dumps(plain, sort_keys=True).encode()),
    ]
    return tuple(_put(store, f"{key}{name}", data) for name, data in files)


def _put(store: ObjectStore, key: str, data: bytes) -> FileRef:
    store.replace(key, data)
    return FileRef(key=key, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def _weight_files(weights: dict[str, torch.Tensor]) -> list[tuple[str, bytes]]:
    # A tied tensor is stored once, under its first name, as `from_pretrained` expects.
    distinct: dict[int, str] = {}
    for name, tensor in weights.items():
        distinct.setdefault(tensor.data_ptr(), name)
    kept = {name: weights[name] for name in distinct.values()}
    plan = split_torch_state_dict_into_shards(kept)
    files = [
        (filename, save({name: kept[name] for name in names}, metadata={"format": "pt"}))
        for filename, names in plan.filename_to_tensors.items()
    ]
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        files.append((_INDEX, json.dumps(index, sort_keys=True).encode()))
    return files


def _description_files(model: Any, tokenizer: Any) -> list[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return [
            (path.relative_to(folder).as_posix(), path.read_bytes())
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        ]
