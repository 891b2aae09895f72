"""The critic: a model of values that learns beside the policy.

    estimate(s) ──▶ values of the batch of step s ──▶ train(s), before the policy trains ──▶ estimate(s + 1)
                                                        └─ undo(s): the policy gave the batch up

One process holds it whole, where the trainer's ranks share the policy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from monarch.actor import Actor, endpoint

from forge_core.actors.messages import (
    CheckpointRequest,
    CriticReply,
    CriticRestoreRequest,
    EstimateReply,
    TrainRequest,
)
from forge_core.actors.reference import put_estimates
from forge_core.algorithms.critic import CriticLearner
from forge_core.algorithms.data import load_batch, load_sequences
from forge_core.algorithms.estimates import response_figures
from forge_core.algorithms.nonfinite import keep_batch
from forge_core.config import RunConfig
from forge_core.recomputation import recompute_activations
from forge_core.sharding import load_weights
from forge_core.timeline import Interval, Timeline
from storage.objects import open_store
from storage.records import FileRef


class Critic(Actor):
    """Estimates the values of stored episodes' tokens and learns from what came of them."""

    def __init__(self, config: RunConfig, store_uri: str, spawned_at: float) -> None:
        torch.set_num_threads(config.trainer.threads)
        self._config = config
        self._store = open_store(store_uri)
        self._timeline = Timeline(started_at=spawned_at, waits={}, default_wait="wait_batch")
        self._device = torch.device(config.trainer.device)
        self._language_model: torch.nn.Module
        self._pad_id = 0
        self._learner: CriticLearner | None = None
        self._step = 0
        self._replies: dict[int, CriticReply] = {}

    @endpoint
    async def load(self, model_dir: str) -> None:
        """Make the model of a Hugging Face directory; its weights come from a checkpoint."""
        # Deferred: the controller imports this module too, and not transformers.
        from transformers import AutoTokenizer

        from forge_core.model import load_causal_lm

        with self._timeline.during("startup"):
            tokenizer = AutoTokenizer.from_pretrained(model_dir)
            pad = tokenizer.pad_token_id
            self._pad_id = int(pad if pad is not None else tokenizer.eos_token_id)
            self._language_model = load_causal_lm(model_dir, self._config.trainer.attention)
            if self._config.trainer.activation_checkpointing:
                recompute_activations(self._language_model)
            self._learner = None

    @endpoint
    async def restore(self, request: CriticRestoreRequest) -> tuple[Interval, ...]:
        """Stand where a checkpoint was taken. Safe to repeat; a critic that has learned further is set back.

        Where the checkpoint has no critic, it begins with the policy's weights of that step and values of 0. Raises
        ObjectNotFound, and ValueError if a file is damaged or does not fit the model.
        """
        # Deferred: it brings what only a checkpoint needs.
        from forge_core.checkpoint import read_tensors, read_weights

        policy = request.policy
        with self._timeline.during("startup"):
            if not request.files:
                pieces = read_weights(self._store, policy.key, policy.files)
                load_weights(self._language_model, pieces)
            learner = CriticLearner(self._language_model, self._config, self._device, self._pad_id)
            if request.files:
                learner.load_state(read_tensors(self._store, request.files))
        self._learner, self._step = learner, policy.step
        return tuple(self._timeline.drain())

    @endpoint
    async def estimate(self, request: TrainRequest) -> EstimateReply:
        """Values of a batch's response tokens, as a file. Raises ValueError for any other step than the next."""
        learner = self._at(request.step - 1)
        with self._timeline.during("score"):
            figures = response_figures(
                load_sequences(self._store, request),
                learner.model,
                max_tokens=self._config.trainer.micro_batch_tokens,
                packed=self._config.trainer.packing,
                pad_id=self._pad_id,
                device=self._device,
            )
            key = f"{request.step:08d}-values"
            file = put_estimates(self._store, request.run_id, key, figures)
        return EstimateReply(file=file, intervals=tuple(self._timeline.drain()))

    @endpoint
    async def train(self, request: TrainRequest) -> CriticReply:
        """Learn one step. Of a step that it has behind it, it answers again without learning twice.

        With a loss or gradient that is not finite the step is not completed and nothing has changed. Raises ValueError
        for any other step than the next.
        """
        if request.step <= self._step and request.step in self._replies:
            return dataclasses.replace(self._replies[request.step], intervals=())
        learner = self._at(request.step - 1)
        with self._timeline.during("train"):
            batch = load_batch(self._store, request, self._config)
            outcome = learner.train_step(batch.sequences)
        key = None
        if outcome.nonfinite is not None:
            key = keep_batch(self._store, request, batch.sequences, {"cause": outcome.nonfinite})
        reply = CriticReply(
            metrics=outcome.metrics,
            nonfinite=outcome.nonfinite,
            batch_key=key,
            intervals=tuple(self._timeline.drain()),
        )
        if outcome.nonfinite is None:
            self._step, self._replies[request.step] = request.step, reply
        return reply

    @endpoint
    async def undo(self, step: int) -> None:
        """Unlearn a step that was the last, if it was learned."""
        if self._learner is not None and self._step == step:
            self._learner.undo()
            self._step = step - 1
            self._replies.pop(step, None)

    @endpoint
    async def checkpoint(self, request: CheckpointRequest) -> tuple[FileRef, ...]:
        """Store all state after a step. Raises ValueError if the critic stands elsewhere."""
        from forge_core.checkpoint import write_tensors

        learner = self._at(request.step)
        with self._timeline.during("checkpoint"):
            return write_tensors(self._store, f"{request.key}critic/", learner.full_state())

    @endpoint
    async def intervals(self) -> tuple[Interval, ...]:
        """The actor's time since it last told."""
        return tuple(self._timeline.drain())

    def _at(self, step: int) -> Any:
        """What learns, which must stand at a step."""
        if self._learner is None or self._step != step:
            raise ValueError(f"the critic stands at step {self._step}, not at {step}")
        return self._learner
