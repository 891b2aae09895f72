"""Ranks of a trainer without their mesh, which make checkpoints one after the other.

    python restoring.py FOLDER RUN...

A run is `RANKSxTENSOR_PARALLEL:JOB,JOB,...`; runs follow each other, each on new processes. Behind the layout may stand
fields of the trainer, `2x2;precision=bf16_autocast:JOB`. A job is `KEY=FROM+LAST`: a new model is brought to where
checkpoint FROM was taken (`nothing`: to its beginning), is trained to the step LAST, and its checkpoint is written as
KEY. Rank 0 prints a line of JSON for each step.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch

# Before torch.distributed looks for a network device.
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import save_file
from transformers import AutoTokenizer

from forge_core.algorithms.batch import Sequence
from forge_core.algorithms.step import Learner
from forge_core.checkpoint import MANIFEST, Snapshot, read_optimizer, read_weights, write_checkpoint
from forge_core.config import RunConfig
from forge_core.model import load_causal_lm
from forge_core.sharding import (
    Layout,
    join_group,
    load_weights,
    make_layout,
    reshard,
    shard_model,
    whole_tensors,
)
from forge_core.weights.segments import Pool
from forge_core.weights.shards import pack_shards
from storage.objects import LocalStore
from storage.records import FileRef


def sequences(step: int) -> list[Sequence]:
    """Eight of a step, with advantages of both signs."""
    chance = torch.Generator().manual_seed(step)
    return [
        Sequence(
            token_ids=torch.randint(2, 350, (6 + row,), generator=chance).tolist(),
            num_prompt_tokens=3,
            mask=[True] * (3 + row),
            sampled_logprobs=[-5.0] * (3 + row),
            advantage=(-1.0) ** row,
        )
        for row in range(8)
    ]


def work(
    folder: Path, rendezvous: str, rank: int, trainer: dict[str, Any], jobs: list[str]
) -> None:
    """Be one rank of a run."""
    torch.set_num_threads(1)
    config = RunConfig.model_validate(
        {
            "steps": 25,
            "trainer": trainer,
            # Low enough that gradients are clipped.
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "max_gradient_norm": 0.1},
        }
    )
    device = join_group(config.trainer, rendezvous, rank)
    layout = make_layout(config.trainer, device)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    store = LocalStore(folder / "store")
    for job in jobs:
        key, _, wanted = job.partition("=")
        origin, _, last = wanted.partition("+")
        model = shard_model(load_causal_lm(str(folder / "model")), config, layout)
        learner = Learner(model, config, device, pad_id=0, layout=layout)
        learner.begin_post_training()
        step = 0
        if origin != "nothing":
            step, files = read_files(store, origin)
            load_weights(model, read_weights(store, f"{origin}/", files))
            learner.load_state(read_optimizer(store, f"{origin}/", files))
        while step < int(last):
            step += 1
            outcome = learner.train_step(step, sequences(step))
            if rank == 0:
                told = {name: outcome.metrics[name] for name in ("loss", "grad_norm", "entropy")}
                print(json.dumps({"key": key, "step": step, **told}), flush=True)
        weights = whole_tensors(model)
        tensors, plain = learner.full_state()
        if rank == 0:
            snapshot = Snapshot(
                run_id="r",
                step=step,
                weights_digest="d",
                weights=weights,
                optimizer_tensors=tensors,
                optimizer_rest=plain,
            )
            write_checkpoint(store, f"{key}/", model, tokenizer, snapshot)
        write_version(folder / "published" / key, model, step, layout)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def write_version(folder: Path, model: torch.nn.Module, step: int, layout: Layout) -> None:
    """The buckets that this rank would put into TorchStore; rank 0 also writes the manifest."""
    reshard(model)
    manifest, buckets = pack_shards(model.state_dict(keep_vars=True), step, layout, Pool().take)
    folder.mkdir(parents=True, exist_ok=True)
    rank = torch.distributed.get_rank()
    save_file(
        {str(index): bucket for index, bucket in buckets.items()}, folder / f"{rank}.safetensors"
    )
    if rank == 0:
        (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))


def read_files(store: LocalStore, key: str) -> tuple[int, tuple[FileRef, ...]]:
    """Step and files of a checkpoint, as it tells itself."""
    told = json.loads(store.read(f"{key}/{MANIFEST}"))
    return told["step"], tuple(FileRef(**file) for file in told["files"])


def _value(told: str) -> Any:
    """Of a field: JSON, or else a word."""
    try:
        return json.loads(told)
    except ValueError:
        return told


def main(folder: Path, *runs: str) -> None:
    """Do runs one after the other."""
    # Forked, so that what takes seconds is imported once; nothing here has started a thread yet.
    processes = multiprocessing.get_context("fork")
    for number, run in enumerate(runs):
        told, _, jobs = run.partition(":")
        layout, *fields = told.split(";")
        ranks, _, share = layout.partition("x")
        trainer = {"ranks": int(ranks), "tensor_parallel": int(share)}
        trainer |= {name: _value(told) for name, _, told in (f.partition("=") for f in fields)}
        meet = str(folder / f"meet-{os.getpid()}-{number}")
        started = [
            processes.Process(target=work, args=(folder, meet, rank, trainer, jobs.split(",")))
            for rank in range(int(ranks))
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        codes = [process.exitcode for process in started]
        if any(codes):
            sys.exit(f"{run} ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
