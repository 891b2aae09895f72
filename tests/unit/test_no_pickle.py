"""No pickle is ever read from a store: one that would betray itself lies wherever a reader looks."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_episodes
import made_run
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_episodes import file_of
from made_run import MadeRun
from transformers import AutoTokenizer
from typer.testing import CliRunner

from flows.cli import app
from flows.html_report.data import read_run
from flows.model_directory import ModelDirectory
from forge_core.checkpoint import read_optimizer, read_weights
from forge_core.config import TinyModelConfig
from forge_core.model import build_tiny_model, load_causal_lm
from storage import client, gc, layout, log
from storage.annotations import (
    ScoreSet,
    check_covers,
    complete_set,
    open_set,
    read_scores,
    write_scores,
)
from storage.compaction import compact, plan_compaction
from storage.episodes import SCHEMA
from storage.objects import LocalStore, ObjectNotFound
from storage.parts import read_commits, read_committed, read_file, read_part
from storage.places import read_compactions
from storage.records import Controller, PartRef
from storage.resume import find_checkpoint
from storage.summary import run_summary
from storage.verify import Report, verify

ROOT = Path(__file__).parents[2]
PACKAGES = ("flows", "tasks", "forge_core", "storage")


class _Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that no test may leave behind."""
    path = tmp_path / "pickle-was-loaded"
    yield path
    assert not path.exists(), "a pickle was loaded"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path / "store")


def _forms(marker: Path) -> dict[str, bytes]:
    """A pickle as it is, as torch saves it, and as numpy does."""
    bomb = _Bomb(marker)
    saved, array = io.BytesIO(), io.BytesIO()
    torch.save(bomb, saved)
    np.save(array, np.array([bomb], dtype=object), allow_pickle=True)
    return {
        "raw": pickle.dumps(bomb),
        "torch": saved.getvalue(),
        "numpy": array.getvalue(),
    }


def _extension_part(data: bytes) -> bytes:
    """A part that is one of episodes, but for a column whose type is a pickle, as old versions of pyarrow load it."""
    episodes = made_episodes.table([0, 1], [0, 0])
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": data,
    }
    column = SCHEMA.field("metadata").with_metadata(metadata)
    schema = SCHEMA.set(SCHEMA.get_field_index("metadata"), column)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(episodes.columns, schema=schema), sink)
    return bytes(sink.getvalue())


def test_the_pickles_would_be_noticed(tmp_path: Path) -> None:
    for name, load in {
        "raw": pickle.loads,
        "torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "numpy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
    }.items():
        marker = tmp_path / name
        load(_forms(marker)[name])
        assert marker.exists(), name
    schema = pq.read_schema(io.BytesIO(_extension_part(b"")))
    assert schema.field("metadata").metadata[b"ARROW:extension:name"] == b"arrow.py_extension_type"


# Everything that a store holds


def _whole_store(store: LocalStore) -> MadeRun:
    """A finished run, scored once more and compacted."""
    run = made_run.finished(store, end=False)
    run.evaluate("final", 2)
    run.end()
    commits = read_commits(store, "run")
    kept = ScoreSet(
        run_id="run",
        name="later",
        verifier="sums",
        scorer="sums",
        environment=None,
        source=None,
        controller=Controller.this_process(versions={}, git_commit=None),
        created_at=0.0,
    )
    open_set(store, kept)
    for commit in commits:
        ids = [layout.episode_id(g, s) for g in commit.group_ids for s in range(2)]
        values = [0.5] * len(ids)
        write_scores(store, commit, "later", ids, values, [{}] * len(ids), reward_mean=0.0)
    complete_set(store, "run", "later", commits)
    assert compact(store, plan_compaction(store, "run", commits, whole=True))
    return run


def _readers(store: LocalStore) -> dict[str, Callable[[], object]]:
    """All that reads a store."""
    run = client.Run
    return {
        "verify": lambda: verify(store, "run"),
        "log": lambda: log.read_entries(store, "run"),
        "summary": lambda: run_summary(store, "run"),
        "report": lambda: read_run(store, "run"),
        "committed": lambda: read_committed(store, "run"),
        "episodes": lambda: run(store, "run").episodes(),
        "steps": lambda: run(store, "run").steps(),
        "groups": lambda: run(store, "run").groups(),
        "config": lambda: run(store, "run").config(),
        "compactions": lambda: read_compactions(store, "run"),
        "scores": lambda: [read_scores(store, c, "later") for c in read_commits(store, "run")],
        "covers": lambda: check_covers(store, "run", "later", read_commits(store, "run")),
        "checkpoint": lambda: _read_checkpoint(store),
        "garbage": lambda: gc.find_garbage(store, gc.Limits(before=0.0)),
        "results": lambda: json.loads(store.read(layout.run_json_key("run"))),
    }


def _read_checkpoint(store: LocalStore) -> None:
    kept = find_checkpoint(store, "run", 2)
    for file in kept.files:
        read_file(store, file)
    list(read_weights(store, kept.key, kept.files))
    list(read_optimizer(store, kept.key, kept.files))


def _outcome(read: Callable[[], object]) -> str | None:
    """What a reader objects to; None if it found nothing."""
    try:
        found = read()
    except (ValueError, ObjectNotFound) as error:
        return str(error)
    if isinstance(found, Report) and found.problems:
        return " | ".join(problem.sentence for problem in found.problems)
    return None


def test_a_pickle_in_the_place_of_any_object_is_told_and_never_loaded(
    store: LocalStore, tmp_path: Path, marker: Path
) -> None:
    _whole_store(store)
    assert {_outcome(read) for read in _readers(store).values()} == {None}
    keys = store.keys("")
    kinds = {key.split("/")[2 if key.startswith("runs/") else 1].split(".")[0] for key in keys}
    assert kinds == {
        *("config", "incarnations", "log", "run", "source", "generated", "evaluations"),
        *("checkpoints", "data", "commits", "compactions", "compacted", "annotations"),
    }
    entries = store.keys(layout.log_folder("run"))
    seal = store.keys(layout.entry_prefix("run", 0))[-1]
    data = pickle.dumps(_Bomb(marker))
    told: set[str] = set()
    # Of the log three entries are enough, for all are read in one way.
    chosen = sorted(set(keys) - set(entries) | {entries[0], entries[3], seal})
    for key in chosen:
        sound = store.read(key)
        store.replace(key, data)
        words = " | ".join(filter(None, map(_outcome, _readers(store).values())))
        assert not marker.exists(), f"{key} was unpickled"
        if key in words:
            told.add(key)
        store.replace(key, sound)
    # Whether a set of scores is the one that is asked for matters to who continues it.
    assert set(chosen) - told <= {layout.score_set_key("run", "later")}


@pytest.mark.parametrize("form", ["raw", "torch", "numpy"])
def test_a_part_that_holds_a_pickle_is_refused_by_its_key(
    store: LocalStore, marker: Path, form: str
) -> None:
    """Even if it is what the log says: its size and SHA-256 are right."""
    run = made_run.finished(store)
    data = _forms(marker)[form]
    key = run.part(0).relative_to(store.root).as_posix()
    store.replace(key, data)
    file = file_of(key, data)
    with pytest.raises(ValueError, match=key):
        read_part(store, PartRef(key=key, sha256=file.sha256, bytes=file.bytes, rows=4))
    part = {**file.model_dump(mode="json"), "rows": 4}
    run.edit(run.commit_key(0), lambda commit: commit.update(part=part))
    for name in ("committed", "episodes"):
        assert key in (_outcome(_readers(store)[name]) or "")
    assert key in " | ".join(each.sentence for each in verify(store, "run").problems)


def test_a_type_that_is_a_pickle_is_not_made(store: LocalStore, marker: Path) -> None:
    store.replace("part", _extension_part(pickle.dumps(_Bomb(marker))))
    read = read_part(store, "part")
    assert read.schema.equals(SCHEMA)
    assert read["metadata"].to_pylist() == ["{}"] * 4


@pytest.mark.parametrize("form", ["raw", "torch", "numpy"])
def test_a_checkpoint_that_is_a_pickle_is_refused_by_its_key(
    store: LocalStore, marker: Path, form: str
) -> None:
    """Even if it is what the log says."""
    run = made_run.finished(store)
    data = _forms(marker)[form]
    folder = layout.checkpoint_folder("run", 2)
    for name, read in (
        ("model.safetensors", read_weights),
        ("trainer/optimizer.safetensors", read_optimizer),
    ):
        store.replace(f"{folder}{name}", data)
        with pytest.raises(ValueError, match=f"{folder}{name} is no safetensors file"):
            list(read(store, folder, (file_of(f"{folder}{name}", data),)))
    files = [
        file_of(f"{folder}{name}", store.read(f"{folder}{name}")).model_dump(mode="json")
        for name in ("model.safetensors", "checkpoint.json")
    ]
    run.edit_fact("checkpoint", 2, files=files)
    problems = " | ".join(each.sentence for each in verify(store, "run").problems)
    assert f"{folder}model.safetensors is no safetensors file" in problems


@pytest.mark.parametrize(
    "command",
    [["show", "run"], ["verify", "run"], ["episodes", "run"], ["runs"], ["report", "run"], ["gc"]],
)
@pytest.mark.parametrize(
    "place",
    ["config.json", "log/000000-00000002.json", "incarnations/000001.json", "commit", "part"],
)
def test_commands_tell_of_a_pickle_in_one_line(
    store: LocalStore, marker: Path, place: str, command: list[str]
) -> None:
    run = made_run.finished(store)
    key = {
        "commit": run.commit_key(1),
        "part": run.part(1).relative_to(store.root).as_posix(),
    }.get(place, f"runs/run/{place}")
    store.replace(key, _forms(marker)["raw"])
    done = CliRunner().invoke(app, [*command, "--store", store.uri])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    if done.exit_code == 2:
        assert key in done.stderr
        assert len(done.stderr.splitlines()) == 1
    elif done.exit_code == 1:
        assert key in done.stdout
    else:
        # Neither results nor the list of runs need any episodes, and garbage is no business of a damaged run.
        assert place in ("commit", "part") or command == ["gc"]


@pytest.mark.parametrize(
    "command",
    [["resume", "run"], ["replay", "run"], ["rescore", "run", "--verifier", "v", "--name", "n"]],
)
@pytest.mark.parametrize(
    "place", ["config.json", "log/000000-00000002.json", "incarnations/000001.json"]
)
def test_what_goes_on_from_a_run_refuses_a_pickle(
    store: LocalStore, marker: Path, place: str, command: list[str]
) -> None:
    made_run.finished(store)
    store.replace(f"runs/run/{place}", _forms(marker)["raw"])
    done = CliRunner().invoke(app, [*command, "--store", store.uri])
    assert done.exit_code == 2, done.exception
    assert f"runs/run/{place}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Models in folders, which a store's checkpoints are


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_model(TinyModelConfig(hidden_size=16, num_layers=1, num_heads=2), 0, folder)
    return folder


BESIDE = (
    *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("model.pkl", "adapter_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"),
    *("vocab.pkl", "tokenizer.pkl", "vocab.json", "vocab.bin", "tokenizer.model", "merges.txt"),
)
"""Files that loaders of Hugging Face know, or knew, and a checkpoint has not."""


def test_pickles_beside_a_model_are_not_loaded(model: Path, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for name in BESIDE:
        form = "torch" if name.endswith((".bin", ".pt", ".pth")) else "raw"
        (folder / name).write_bytes(_forms(marker)[form])
    ModelDirectory.open(str(folder))
    assert load_causal_lm(str(folder)).state_dict()
    assert AutoTokenizer.from_pretrained(str(folder)).eos_token_id is not None


def _load_all(folder: Path) -> list[Exception]:
    """What the loaders of a model object to."""
    objections: list[Exception] = []
    loaders: list[Callable[[], Any]] = [
        lambda: ModelDirectory.open(str(folder)).count_tokens(["1"]),
        lambda: load_causal_lm(str(folder)),
        lambda: AutoTokenizer.from_pretrained(str(folder)),
    ]
    for load in loaders:
        try:
            load()
        except Exception as error:  # Libraries raise what they like.
            objections.append(error)
    return objections


def test_pickles_in_the_place_of_a_models_files_are_not_loaded(
    model: Path, tmp_path: Path, marker: Path
) -> None:
    for path in sorted(model.iterdir()):
        for form in ("raw", "torch") if path.name == "model.safetensors" else ("raw",):
            folder = tmp_path / f"{path.name}-{form}"
            shutil.copytree(model, folder)
            (folder / path.name).write_bytes(_forms(marker)[form])
            objections = _load_all(folder)
            needed = path.name in ("config.json", "model.safetensors", "tokenizer.json")
            assert objections or not needed, f"nobody minds a pickle in the place of {path.name}"
            assert not marker.exists(), f"{path.name} was unpickled"


# The code


PICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"load", "loads", "Unpickler", "read_pickle", "to_pickle"}
JUSTIFIED: frozenset[str] = frozenset()
"""Uses that are to be, as `file: what`. The memory snapshots of a GPU, which torch writes as pickles itself, are kept
as bytes and never loaded, so that they are none."""


def _pickling(source: str) -> Iterator[tuple[int, str]]:
    """Lines of a module that load or write pickles, and what they do."""
    torch_names, numpy_names = {"torch"}, {"numpy", "np"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in PICKLING:
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            names = {alias.name for alias in node.names}
            if module in PICKLING or (module in {"torch", "pandas", "numpy"} and names & CALLS):
                yield node.lineno, f"from {node.module} import {', '.join(sorted(names))}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in torch_names | numpy_names and node.attr in CALLS | {"save"}:
                yield node.lineno, f"{node.value.id}.{node.attr}"
            elif node.attr in {"read_pickle", "to_pickle", "unsafe_load", "full_load"}:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                loose = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False}
                value = getattr(keyword.value, "value", ...)
                if keyword.arg in loose and value in (loose[keyword.arg], ...):
                    yield node.lineno, f"{keyword.arg}={value}"
            if isinstance(node.func, ast.Name) and node.func.id == "__import__":
                yield node.lineno, "__import__"


def test_no_code_of_ours_loads_or_writes_a_pickle() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {what}": line
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, what in _pickling(path.read_text())
    }
    assert found.keys() == JUSTIFIED, found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import cloudpickle as c",
        "from dill import loads",
        "import shelve, marshal",
        "import joblib.numpy_pickle",
        "import torch\ntorch.load(f)",
        "from torch import load",
        "import numpy as np\nnp.load(f)",
        "read(f, allow_pickle=True)",
        "read(f, allow_pickle=flag)",
        "read(f, weights_only=False)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
        "pandas.read_pickle(f)",
        "yaml.unsafe_load(f)",
        "__import__('pickle')",
    ],
)
def test_the_search_sees(source: str) -> None:
    assert list(_pickling(source))


@pytest.mark.parametrize(
    "source",
    ["import json\njson.loads(f)", "from safetensors.torch import load", "yaml.safe_load(f)",
     "np.save_data", "read(f, weights_only=True)"],
)  # fmt: skip
def test_the_search_does_not_see_what_is_not_there(source: str) -> None:
    assert not list(_pickling(source))
