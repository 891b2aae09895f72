"""The reference policy: weights of the past that say how likely they find what the policy wrote.

One process holds it whole, where the trainer's ranks share the policy.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from monarch.actor import Actor, endpoint

from forge_core.actors.messages import EstimateReply, ReferenceRequest, RestoreRequest
from forge_core.algorithms.data import load_sequences
from forge_core.algorithms.estimates import estimates_file, response_figures
from forge_core.algorithms.forward import token_logprobs
from forge_core.config import RunConfig
from forge_core.sharding import load_weights
from forge_core.timeline import Interval, Timeline
from forge_core.weights.digest import digest as digest_of
from forge_core.weights.digest import is_sha256, sha256_digest
from storage import layout
from storage.objects import ObjectStore, open_store
from storage.records import FileRef


class Reference(Actor):
    """Scores stored episodes with the weights of a checkpoint."""

    def __init__(self, config: RunConfig, store_uri: str, spawned_at: float) -> None:
        torch.set_num_threads(config.trainer.threads)
        self._config = config
        self._store = open_store(store_uri)
        self._timeline = Timeline(started_at=spawned_at, waits={}, default_wait="wait_batch")
        self._device = torch.device(config.trainer.device)
        self._model: torch.nn.Module
        self._pad_id = 0
        self._held: str | None = None
        """Digest of the weights in the model, once they are a checkpoint's."""

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
            self._model = (
                load_causal_lm(model_dir, self._config.trainer.attention).to(self._device).eval()
            )
            self._held = None

    @endpoint
    async def estimate(self, request: ReferenceRequest) -> EstimateReply:
        """Logprobs of a batch's response tokens under the weights of a checkpoint, as a file. Safe to repeat.

        Raises ObjectNotFound, and ValueError if a file is damaged or does not fit the model.
        """
        if self._held != request.weights.weights_digest:
            with self._timeline.during("weights"):
                self._load_weights(request.weights)
        with self._timeline.during("score"):
            sequences = load_sequences(self._store, request.batch)
            figures = response_figures(
                sequences,
                lambda batch: (
                    token_logprobs(
                        self._model,
                        batch,
                        temperature=self._config.sampling.temperature,
                        chunk_tokens=self._config.trainer.logprob_chunk_tokens,
                        precision=self._config.trainer.precision,
                    ).logprobs_BT
                ),
                max_tokens=self._config.trainer.micro_batch_tokens,
                packed=self._config.trainer.packing,
                pad_id=self._pad_id,
                device=self._device,
            )
            key = f"{request.batch.step:08d}-reference"
            file = put_estimates(self._store, request.batch.run_id, key, figures)
        return EstimateReply(file=file, intervals=tuple(self._timeline.drain()))

    def _load_weights(self, request: RestoreRequest) -> None:
        # Deferred: it brings what only a checkpoint needs.
        from forge_core.checkpoint import read_weights

        self._held = None
        load_weights(self._model, read_weights(self._store, request.key, request.files))
        named: Any = self._model.state_dict(keep_vars=True).items()
        tensors = {name: tensor.detach().cpu() for name, tensor in named}
        told = request.weights_digest
        digest = sha256_digest(tensors) if is_sha256(told) else digest_of(tensors)
        if digest != request.weights_digest:
            raise ValueError(
                f"{request.key} holds other weights than the log says: their digest is {digest[:17]}… "
                f"and not {request.weights_digest[:17]}…"
            )
        self._held = digest

    @endpoint
    async def intervals(self) -> tuple[Interval, ...]:
        """The actor's time since it last told."""
        return tuple(self._timeline.drain())


def put_estimates(
    store: ObjectStore, run_id: str, name: str, figures: list[list[float]]
) -> FileRef:
    """Store figures under a name that ends with their digest, so that attempts cannot collide."""
    data = estimates_file(figures)
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"{layout.estimates_folder(run_id)}{name}-{sha256[:17]}.safetensors"
    store.put_if_absent(key, data)
    return FileRef(key=key, sha256=sha256, bytes=len(data))
