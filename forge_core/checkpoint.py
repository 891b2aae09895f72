"""A checkpoint: weights in Hugging Face layout, and what training needs beside them, without pickle.

```
checkpoints/<step>/model.safetensors …       weights, in shards where they are large
checkpoints/<step>/config.json …             model and tokenizer, as `from_pretrained` reads them
checkpoints/<step>/trainer/optimizer.safetensors …   the optimizer's moments, by `parameter/entry`
checkpoints/<step>/trainer/optimizer.json            its plain rest
checkpoints/<step>/checkpoint.json           written last: what it is, and every file with its digest
```

Tensors are whole, not a rank's shards, so any number of ranks can load them. A checkpoint counts once the run's log
names it, so a half-written one is never seen.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load, save

from forge_core.placement.memory import CHECKPOINT_FILE_BYTES
from storage.objects import ObjectStore
from storage.parts import read_file
from storage.records import FileRef

TRAINER_FOLDER = "trainer/"
MANIFEST = "checkpoint.json"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model{suffix}.safetensors"
_OPTIMIZER = "optimizer{suffix}.safetensors"
_MOST_FOLDERS = 100

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All state of a trainer after a step. Nothing in it changes while training goes on."""

    run_id: str
    """The run."""
    step: int
    """The step."""
    weights_digest: str
    """Digest of the weights."""
    weights: Tensors
    """Full CPU tensors by their Hugging Face names, tied ones under each of their names."""
    optimizer_tensors: Tensors
    """Full CPU tensors of the optimizer's state, by `parameter/entry`."""
    optimizer_rest: Mapping[str, Any]
    """What else the optimizer has, as JSON can hold it."""


def write_checkpoint(
    store: ObjectStore, key: str, model: Any, tokenizer: Any, snapshot: Snapshot
) -> tuple[str, tuple[FileRef, ...]]:
    """Write every file of a checkpoint under the folder `key`; the folder, and what was written.

    Files are never written over: where another controller of the run has left other bytes, the next free folder
    `<key>.1/`, `<key>.2/`, … is taken. Raises OSError if the store fails.
    """
    for attempt in range(_MOST_FOLDERS):
        folder = key if attempt == 0 else f"{key.removesuffix('/')}.{attempt}/"
        files: list[FileRef] = []
        for name, make in _files(model, tokenizer, snapshot):
            if (file := _put(store, f"{folder}{name}", make())) is None:
                break
            files.append(file)
        else:
            manifest = _manifest(snapshot, files)
            if (file := _put(store, f"{folder}{MANIFEST}", manifest)) is not None:
                return folder, (*files, file)
    raise OSError(f"{_MOST_FOLDERS} folders like {key} hold other checkpoints")


def _put(store: ObjectStore, key: str, data: bytes) -> FileRef | None:
    """The file, or None if the key holds other bytes."""
    if not store.put_if_absent(key, data) and store.read(key) != data:
        return None
    return FileRef(key=key, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def _files(
    model: Any, tokenizer: Any, snapshot: Snapshot
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names, and how to make each file's bytes: one at a time, for all at once would double the memory."""
    kept = {name: snapshot.weights[name] for name in _stored_names(snapshot.weights).values()}
    plan = _split(kept, _WEIGHTS)
    yield from _shards("", kept, plan)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        yield _INDEX, lambda: json.dumps(index, sort_keys=True).encode()
    for name, data in _description_files(model, tokenizer):
        yield name, lambda data=data: data  # type: ignore[misc]
    state = dict(snapshot.optimizer_tensors)
    yield from _shards(TRAINER_FOLDER, state, _split(state, _OPTIMIZER))
    rest = json.dumps(snapshot.optimizer_rest, sort_keys=True).encode()
    yield f"{TRAINER_FOLDER}optimizer.json", lambda: rest


def _split(tensors: Tensors, pattern: str) -> Any:
    """Which tensors go into which file. Planned without storages, for views of one bucket would be kept together."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    return split_torch_state_dict_into_shards(
        shapes, filename_pattern=pattern, max_shard_size=CHECKPOINT_FILE_BYTES
    )


def _shards(folder: str, tensors: Tensors, plan: Any) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for filename, names in plan.filename_to_tensors.items():
        yield (
            f"{folder}{filename}",
            lambda names=names: save({n: tensors[n] for n in names}, metadata={"format": "pt"}),  # type: ignore[misc]
        )


def _stored_names(weights: Tensors) -> dict[str, str]:
    """By name of a tensor, the name that it is stored under: tied ones once, as `from_pretrained` expects."""
    first: dict[int, str] = {}
    return {name: first.setdefault(tensor.data_ptr(), name) for name, tensor in weights.items()}


def _manifest(snapshot: Snapshot, files: list[FileRef]) -> bytes:
    tied = {
        name: stored for name, stored in _stored_names(snapshot.weights).items() if name != stored
    }
    told = {
        "run_id": snapshot.run_id,
        "step": snapshot.step,
        "weights_digest": snapshot.weights_digest,
        "tied": tied,
        "files": [file.model_dump(mode="json") for file in files],
    }
    return json.dumps(told, sort_keys=True, indent=1).encode()


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


def read_weights(
    store: ObjectStore, key: str, files: tuple[FileRef, ...]
) -> Iterator[dict[str, torch.Tensor]]:
    """The weights in a checkpoint's folder, file by file, each held against its digest.

    Raises ObjectNotFound, and ValueError if a file is damaged or no safetensors file.
    """
    return _read_tensors(store, [f for f in files if "/" not in f.key.removeprefix(key)])


def read_optimizer(
    store: ObjectStore, key: str, files: tuple[FileRef, ...]
) -> Iterator[dict[str, torch.Tensor]]:
    """The optimizer's state by `parameter/entry`, file by file. Raises as `read_weights` does."""
    return _read_tensors(store, [f for f in files if f.key.startswith(f"{key}{TRAINER_FOLDER}")])


def write_tensors(store: ObjectStore, folder: str, tensors: Tensors) -> tuple[FileRef, ...]:
    """Store tensors in files of a bounded size, whose names end with their digests so that attempts cannot collide."""
    files = []
    for name, make in _shards("", tensors, _split(tensors, "state{suffix}.safetensors")):
        data = make()
        digest = hashlib.sha256(data).hexdigest()
        key = f"{folder}{name.removesuffix('.safetensors')}-{digest[:12]}.safetensors"
        store.put_if_absent(key, data)
        files.append(FileRef(key=key, sha256=digest, bytes=len(data)))
    return tuple(files)


def read_tensors(
    store: ObjectStore, files: tuple[FileRef, ...]
) -> Iterator[dict[str, torch.Tensor]]:
    """What `write_tensors` stored, file by file. Raises as `read_weights` does."""
    return _read_tensors(store, list(files))


def _read_tensors(store: ObjectStore, files: list[FileRef]) -> Iterator[dict[str, torch.Tensor]]:
    for file in files:
        if file.key.endswith(".safetensors"):
            data = read_file(store, file)
            try:
                yield load(data)
            except Exception as error:  # SafetensorError derives from Exception alone
                raise ValueError(f"{file.key} is no safetensors file: {error}") from error
