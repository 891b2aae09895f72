"""The trainer: one process per rank, the model shared by FSDP2, tensor parallelism or both.

Every endpoint that trains or gathers is called on all ranks at once; what it returns is the same on each but
for the intervals, of which rank 0's count.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from monarch.actor import Actor, current_rank, endpoint

from forge_core.actors.checkpoint_writer import CheckpointWriter
from forge_core.actors.held_memory import held_memory
from forge_core.actors.messages import (
    CheckpointReply,
    CheckpointRequest,
    HeldMemory,
    PublishReply,
    RestoreReply,
    RestoreRequest,
    TrainReply,
    TrainRequest,
    TurnReply,
    WarmStartReply,
)
from forge_core.actors.offload import Offload
from forge_core.algorithms import warm_start
from forge_core.algorithms.batch import Sequence, collate
from forge_core.algorithms.data import Batch, load_batch
from forge_core.algorithms.forward import check_forward, token_logprobs
from forge_core.algorithms.nonfinite import keep_batch
from forge_core.algorithms.step import Learner
from forge_core.config import RunConfig
from forge_core.environments import Environment, load_environment
from forge_core.profiling import Profiler
from forge_core.sharding import (
    Layout,
    join_group,
    load_weights,
    make_layout,
    reshard,
    shard_model,
    whole_tensors,
)
from forge_core.supervised.order import load_data
from forge_core.supervised.training import SupervisedTraining
from forge_core.timeline import Interval, Timeline
from forge_core.tools.making import make_toolbox
from forge_core.weights import store
from forge_core.weights.digest import is_sha256, sha256_digest
from forge_core.weights.manifest import Manifest
from forge_core.weights.segments import Pool
from forge_core.weights.shards import pack_shards
from storage.objects import open_store

T = TypeVar("T")


class Trainer(Actor):
    """Trains the policy on stored episodes and publishes its weights."""

    def __init__(
        self, config: RunConfig, store_uri: str, rendezvous: str, spawned_at: float
    ) -> None:
        store.install(config.hosts)
        torch.set_num_threads(config.trainer.threads)
        self._config = config
        self._store = open_store(store_uri)
        self._rank = int(current_rank().rank)
        self._rendezvous = rendezvous
        self._profiler = Profiler(
            config.profile,
            self._store,
            f"trainer-{self._rank}",
            sizes=lambda: self._learner.bytes_by_group(),
        )
        self._timeline = Timeline(started_at=spawned_at, waits={}, default_wait="wait_batch")
        self._device = torch.device("cpu")
        self._layout: Layout
        self._model: torch.nn.Module
        self._tokenizer: Any
        self._learner: Learner
        self._step = 0
        self._supervised: SupervisedTraining | None = None
        self._last_reply: TrainReply | None = None
        self._warm_started: WarmStartReply | None = None
        self._weights: tuple[Manifest, dict[int, torch.Tensor]] | None = None
        """Of the version that the trainer stands at, and this rank's buckets."""
        self._pool = Pool()
        self._writer = CheckpointWriter()
        self._scored: tuple[Any, tuple[tuple[tuple[float, ...], ...], float]] | None = None
        self._offload = Offload(Path(f"{rendezvous}-asleep-{self._rank}"))

    @endpoint
    async def build_model(self, directory: str) -> None:
        """Make the tiny model in `directory`; only rank 0 writes."""
        if self._rank == 0:
            from forge_core.model import build_tiny_model

            with self._timeline.during("startup"):
                build_tiny_model(self._config.model.tiny, self._config.seed, Path(directory))

    @endpoint
    async def load(self, model_dir: str) -> None:
        """Join the process group, load a Hugging Face directory and shard it."""
        # Deferred, as in the other endpoints: the controller imports this module too, and not transformers.
        from transformers import AutoTokenizer

        from forge_core.model import load_causal_lm

        with self._timeline.during("startup"):
            if not dist.is_initialized():  # a retried load finds the group standing
                self._device = join_group(self._config.trainer, self._rendezvous, self._rank)
            torch.manual_seed(self._config.seed)
            model = load_causal_lm(model_dir, self._config.trainer.attention)
            self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
            if self._tokenizer.eos_token_id is None:
                raise ValueError(
                    f"model.path {model_dir!r} has a tokenizer without an end-of-sequence token: add eos_token to "
                    "its tokenizer_config.json"
                )
            self._layout = make_layout(self._config.trainer, self._device)
            self._model = shard_model(model, self._config, self._layout)
            check_forward(self._model, self._config, self._device)
            self._learner = Learner(
                self._model, self._config, self._device, self._pad_id(), self._layout
            )

    def _agreed(self, work: Callable[[], T]) -> T:
        """What `work` gives; an error on every rank if any fails, so that none enters a collective alone."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failed = torch.tensor([int(error is not None)], dtype=torch.int32, device=self._device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed.item():
            raise error or OSError("another rank of the trainer could not read its batch")
        return cast(T, result)

    def _load_environment(self) -> Environment:
        return load_environment(self._config.environment, self._config.seed)

    def _pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return int(pad if pad is not None else self._tokenizer.eos_token_id)

    @endpoint
    async def warm_start(self) -> WarmStartReply:
        """Supervised training on reference answers, as the config says; it makes version 0.

        Asked again, it only answers.
        """
        if self._warm_started:
            return dataclasses.replace(self._warm_started, intervals=tuple(self._timeline.drain()))
        with self._timeline.during("warm_start"):
            started = time.monotonic()
            if self._supervised is None:
                self._supervised = self._supervised_training()
            supervised = self._supervised
            supervised.run()
            self._learner.begin_post_training()
            digest = self._pack(policy_version=0).digest
        self._warm_started = WarmStartReply(
            steps=supervised.steps,
            loss=supervised.loss,
            validations=tuple(supervised.validations),
            best_step=supervised.best_step,
            weights_digest=digest,
            seconds=time.monotonic() - started,
            intervals=tuple(self._timeline.drain()),
        )
        return self._warm_started

    def _supervised_training(self) -> SupervisedTraining:
        """On data of the user's, or on the environment's reference answers."""
        config = self._config.warm_start
        if config.steps and config.data is not None:
            context = getattr(self._model.config, "max_position_embeddings", None)
            data = self._agreed(
                lambda: load_data(
                    config, self._tokenizer, self._config.seed, context_length=context
                )
            )
            return SupervisedTraining(
                self._learner,
                config,
                lambda step: data.batch(step, config.batch_size),
                data.validation,
            )
        environment = self._agreed(self._load_environment)
        toolbox = make_toolbox(self._config, environment)

        def of_environment(step: int) -> list[Sequence]:
            return self._agreed(
                lambda: warm_start.sequences(
                    environment, self._tokenizer, step, config.batch_size, toolbox
                )
            )

        return SupervisedTraining(self._learner, config, of_environment)

    @endpoint
    async def train(self, request: TrainRequest) -> TrainReply:
        """Train one step. Asked for the step it has just completed, it answers again without training twice.

        With a loss or gradient that is not finite the step is not completed: nothing has changed, the batch is kept
        as a file, and the step may be asked for with another one. Raises ValueError for any other step than the next.
        """
        if self._last_reply and request.step == self._step:
            return dataclasses.replace(self._last_reply, intervals=tuple(self._timeline.drain()))
        if request.step != self._step + 1:
            raise ValueError(f"step {request.step} does not follow step {self._step}")
        with (
            self._timeline.during("train"),
            self._profiler.during(request.run_id, request.step),
        ):
            started = time.monotonic()
            batch = self._agreed(lambda: load_batch(self._store, request, self._config))
            read_seconds = time.monotonic() - started
            outcome = self._learner.train_step(request.step, batch.sequences)
            if outcome.nonfinite is None:
                self._pack(policy_version=request.step)
        assert self._weights is not None, "a step follows warm_start or restore"
        reply = TrainReply(
            step=request.step,
            weights_digest=self._weights[0].digest,
            optimizer_updates=outcome.optimizer_updates,
            age_max=batch.age_max,
            age_mean=batch.age_mean,
            metrics={
                **batch.metrics,
                **outcome.metrics,
                "train/read_seconds": read_seconds,
            },
            seconds=time.monotonic() - started,
            intervals=tuple(self._timeline.drain()),
            nonfinite=outcome.nonfinite,
        )
        if outcome.nonfinite is not None:
            return dataclasses.replace(reply, batch_key=self._keep_batch(request, batch, reply))
        self._step, self._last_reply = request.step, reply
        return reply

    def _keep_batch(self, request: TrainRequest, batch: Batch, reply: TrainReply) -> str:
        """Put a batch that could not be trained on into the store, for people; its key on rank 0, which writes."""
        if self._rank != 0:
            return ""
        told = {"cause": reply.nonfinite or "", "weights_digest": reply.weights_digest}
        return keep_batch(self._store, request, batch.sequences, told)

    def _pack(self, policy_version: int) -> Manifest:
        """Lay out what this rank holds of the weights; kept until the next step."""
        reshard(self._model)
        self._weights = pack_shards(
            self._model.state_dict(keep_vars=True), policy_version, self._layout, self._pool.take
        )
        return self._weights[0]

    @endpoint
    async def publish(
        self,
        probe: tuple[tuple[int, ...], ...],
        store_name: str,
        replaced: tuple[Manifest, ...] = (),
    ) -> PublishReply:
        """Put the current weights in the TorchStore of this name, forget versions there, and score the probe.

        Safe to repeat. Raises OSError if the trainer sleeps and has not scored this probe with these weights before.
        """
        assert self._weights is not None, "publish follows warm_start or train"
        timeout = self._config.timeouts.call_seconds
        started = time.monotonic()
        with self._timeline.during("weights"):
            manifest, buckets = self._weights
            manifest = dataclasses.replace(manifest, store=store_name)
            # The collective part comes first: what one rank alone may fail at must not leave the others in it.
            logprobs, entropy = self._score_once(manifest, probe)
            await store.put_version(manifest, buckets, timeout_seconds=timeout)
            if self._rank == 0:
                for before in replaced:
                    # The store may have been replaced by an empty one since.
                    if before.keys != manifest.keys and before.store == store_name:
                        await store.delete_version(before, timeout_seconds=timeout)
        return PublishReply(
            manifest=manifest,
            probe_logprobs=logprobs,
            probe_entropy=entropy,
            seconds=time.monotonic() - started,
            intervals=tuple(self._timeline.drain()),
        )

    def _score_once(
        self, manifest: Manifest, probe: tuple[tuple[int, ...], ...]
    ) -> tuple[tuple[tuple[float, ...], ...], float]:
        """The probe's logprobs and entropy, from before if they are the same."""
        of_what = (manifest.digest, probe)
        if self._scored is None or self._scored[0] != of_what:
            if self._offload.is_away:
                raise OSError(
                    f"the trainer sleeps and cannot score version {manifest.policy_version}"
                )
            self._scored = (of_what, self._score(probe))
        return self._scored[1]

    @torch.no_grad()
    def _score(
        self, token_ids: tuple[tuple[int, ...], ...]
    ) -> tuple[tuple[tuple[float, ...], ...], float]:
        sequences = [
            Sequence(token_ids=list(ids), num_prompt_tokens=1, mask=[True] * (len(ids) - 1))
            for ids in token_ids
        ]
        settings = self._config.trainer
        batch = collate(sequences, self._pad_id(), self._device, packed=settings.packing)
        scored = token_logprobs(
            self._model,
            batch,
            temperature=1.0,
            chunk_tokens=settings.logprob_chunk_tokens,
            precision=settings.precision,
        )
        logprobs = tuple(
            tuple(row[: len(ids) - 1].tolist())
            for row, ids in zip(scored.logprobs_BT, token_ids, strict=True)
        )
        entropy = scored.entropy_BT[batch.mask_BT].mean()
        return logprobs, float(entropy)

    @endpoint
    async def encode_probe(self, num_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Held-out prompts with their answers as token ids, at least `num_tokens` predicted tokens in all."""
        with self._timeline.during("startup"):
            environment = self._load_environment()
            toolbox = make_toolbox(self._config, environment)
            return warm_start.probe(environment, self._tokenizer, num_tokens, toolbox)

    @endpoint
    async def begin_checkpoint(self, request: CheckpointRequest) -> CheckpointReply:
        """Copy all state and write it in the background: weights in Hugging Face layout, the optimizer's state beside.

        There is no random state to keep: seeds of samples follow from ids, and training draws nothing. Asked again for
        the same step, it only answers. Raises ValueError if the trainer stands elsewhere.
        """
        # Deferred: it brings what only a checkpoint needs.
        from forge_core.checkpoint import Snapshot, write_checkpoint

        assert self._weights is not None, "a checkpoint follows warm_start, restore or train"
        if request.step != self._step:
            raise ValueError(
                f"a checkpoint of step {request.step} is asked for at step {self._step}"
            )
        manifest = self._weights[0]
        if not self._writer.has(request.step):
            with self._timeline.during("checkpoint"):
                tensors, rest = self._learner.full_state()
                weights = whole_tensors(self._model)
                snapshot = Snapshot(
                    run_id=request.run_id,
                    step=request.step,
                    weights_digest=manifest.digest,
                    weights=weights,
                    optimizer_tensors=tensors,
                    optimizer_rest=rest,
                )
            write = functools.partial(
                write_checkpoint, self._store, request.key, self._model, self._tokenizer, snapshot
            )
            # Only rank 0 writes: tensors are gathered whole.
            self._writer.begin(request.step, write if self._rank == 0 else lambda: ("", ()))
        return CheckpointReply(
            step=request.step,
            weights_digest=manifest.digest,
            intervals=tuple(self._timeline.drain()),
        )

    @endpoint
    async def finish_checkpoint(
        self, step: int, weights_digest: str, wait: bool
    ) -> CheckpointReply:
        """Tell what became of the checkpoint that was begun, having waited or not. Raises what writing raised."""
        written = await self._writer.finished(wait=wait)
        key, files = written if written is not None else (None, ())
        return CheckpointReply(
            step=step,
            weights_digest=weights_digest,
            key=key,
            files=files,
            intervals=tuple(self._timeline.drain()),
        )

    @endpoint
    async def write_checkpoint_again(self, step: int) -> None:
        """Write once more what was taken of a step and could not be written. Raises ValueError if it was not taken."""
        if not self._writer.has(step):
            raise ValueError(f"no checkpoint of step {step} was begun")
        self._writer.again()

    @endpoint
    async def restore(self, request: RestoreRequest) -> RestoreReply:
        """Load a checkpoint of any number of ranks, and stand where it was taken; safe to repeat.

        Raises ObjectNotFound, and ValueError if a file is damaged or does not fit the model.
        """
        from forge_core.checkpoint import read_optimizer, read_weights

        with self._timeline.during("startup"):
            # Each rank reads alone; only when all have it is there a collective.
            self._agreed(
                lambda: load_weights(
                    self._model, read_weights(self._store, request.key, request.files)
                )
            )
            self._agreed(
                lambda: self._learner.load_state(
                    read_optimizer(self._store, request.key, request.files)
                )
            )
            manifest = self._pack(policy_version=request.step)
            if is_sha256(request.weights_digest):
                manifest = self._have_old_digest(manifest)
        if manifest.digest != request.weights_digest:
            raise ValueError(
                f"{request.key} holds other weights than the log says: their digest is {manifest.digest[:17]}… "
                f"and not {request.weights_digest[:17]}…"
            )
        self._step, self._last_reply = request.step, None
        return RestoreReply(weights_digest=manifest.digest, intervals=tuple(self._timeline.drain()))

    def _have_old_digest(self, manifest: Manifest) -> Manifest:
        """A checkpoint's version goes by the name that its log gives it, however old."""
        assert self._weights is not None
        manifest = dataclasses.replace(manifest, digest=sha256_digest(whole_tensors(self._model)))
        self._weights = (manifest, self._weights[1])
        return manifest

    @endpoint
    async def sleep(self) -> TurnReply:
        """Give the device up to the generators. Safe to repeat, and before anything is loaded."""
        before = held_memory(self._device)
        with self._timeline.during("weights"):
            if hasattr(self, "_learner") and not self._offload.is_away:
                if self._weights is not None and self._scored is not None:
                    # A weight store that is filled anew meanwhile wants to know how they score.
                    self._score_once(self._weights[0], self._scored[0][1])
                self._offload.put_away(self._learner.held_tensors())
        return self._turned(before)

    @endpoint
    async def wake(self) -> TurnReply:
        """Take the device again, with everything as it was. Safe to repeat."""
        before = held_memory(self._device)
        with self._timeline.during("weights"):
            self._offload.bring_back()
        return self._turned(before)

    def _turned(self, before: HeldMemory) -> TurnReply:
        return TurnReply(
            before=before,
            after=held_memory(self._device),
            intervals=tuple(self._timeline.drain()),
        )

    @endpoint
    async def intervals(self) -> tuple[Interval, ...]:
        """The rank's time since it last told."""
        return tuple(self._timeline.drain())
