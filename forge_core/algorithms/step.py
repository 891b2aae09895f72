"""One optimizer's view of training: a supervised step and a post-training step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from forge_core.algorithms import optimizer_state
from forge_core.algorithms.batch import (
    MicroBatch,
    Sequence,
    collate,
    share,
    split,
)
from forge_core.algorithms.custom_loss import CustomLoss
from forge_core.algorithms.forward import TokenLogprobs, token_logprobs
from forge_core.algorithms.gradient import clip
from forge_core.algorithms.losses import LOSSES
from forge_core.algorithms.metrics import Largest, Mean, Metrics, StepMetrics
from forge_core.algorithms.primitives import drift
from forge_core.algorithms.ratios import Ratios
from forge_core.algorithms.rollback import Rollback
from forge_core.algorithms.schedule import learning_rate
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import RunConfig
from forge_core.sharding import Layout, reshard

Logprobs = dict[tuple[int, int], torch.Tensor]
"""By minibatch and micro-batch of this rank, shape (B, T)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a post-training step did."""

    optimizer_updates: int
    """Optimizer updates made."""
    metrics: dict[str, float]
    """Means over the step's tokens, and norms."""
    nonfinite: str | None = None
    """What of the loss or its gradient was not finite, in words; nothing has changed then."""


class NotFinite(RuntimeError):
    """A minibatch whose loss or gradient is not finite; no update was made of it."""


class Learner:
    """A sharded model with its optimizer. All methods are collective: every rank calls them alike."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: RunConfig,
        device: torch.device,
        pad_id: int,
        layout: Layout,
    ) -> None:
        self._model = model
        self._config = config
        self._device = device
        self._pad_id = pad_id
        self._layout = layout
        # Of those that share the batch: tensor parallel neighbours have the same episodes.
        self._rank = layout.data.get_local_rank()
        self._ranks = layout.data.size()
        self._optimizer = self._new_optimizer(config.warm_start.learning_rate)
        self._custom_loss = CustomLoss(config.loss) if config.loss is not None else None

    def _new_optimizer(self, learning_rate: float) -> torch.optim.AdamW:
        settings = self._config.optimizer
        return torch.optim.AdamW(
            self._model.parameters(),
            lr=learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def begin_post_training(self) -> None:
        """Forget the supervised optimizer's moments: they are of another objective."""
        self._optimizer = self._new_optimizer(self._config.optimizer.learning_rate)

    def supervised_step(self, step: int, sequences: list[Sequence]) -> float:
        """One update towards the masked tokens; the loss before it, in nats per token."""
        settings = self._config.warm_start
        warmup = max(1, settings.steps // 10)
        self._set_learning_rate(settings.learning_rate * min(1.0, (step + 1) / warmup))
        num_tokens = _count(sequences)
        total = 0.0
        for batch in self._micro_batches(sequences):
            scored = self._token_logprobs(batch, temperature=1.0)
            loss = -(scored.logprobs_BT * batch.mask_BT).sum() / num_tokens
            (loss * self._ranks).backward()
            total += float(loss.detach())
        (total,) = self._over_ranks([total])
        self._update(total)
        return total

    @torch.no_grad()
    def supervised_loss(self, sequences: list[Sequence]) -> float:
        """Mean loss of the masked tokens, in nats per token."""
        total = 0.0
        for batch in self._micro_batches(sequences):
            scored = self._token_logprobs(batch, temperature=1.0)
            total -= float(torch.where(batch.mask_BT, scored.logprobs_BT, 0.0).sum())
        reshard(self._model)
        (total,) = self._over_ranks([total])
        return total / _count(sequences)

    def keep(self) -> Rollback:
        """What model and optimizer are now, to go back to."""
        return Rollback(self._model, self._optimizer)

    def train_step(self, step: int, sequences: list[Sequence]) -> Outcome:
        """All epochs and minibatches of a step (from 1) on a batch.

        An empty batch changes nothing, nor does one with a loss or gradient that is not finite, whatever updates were
        made before it was met.
        """
        if not sequences:
            return Outcome(optimizer_updates=0, metrics={})
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        self._set_learning_rate(rate)
        algorithm = self._config.algorithm
        minibatches = [sequences[i :: algorithm.minibatches] for i in range(algorithm.minibatches)]
        minibatches = [minibatch for minibatch in minibatches if minibatch]
        updates = algorithm.epochs * len(minibatches)
        metrics, ratios = StepMetrics(), Ratios(self._device)
        gradient_norms: list[float] = []
        # Before a single update nothing can have changed.
        before = Rollback(self._model, self._optimizer) if updates > 1 else None
        proximal = self._proximal(minibatches)
        try:
            for index, minibatch in list(enumerate(minibatches)) * algorithm.epochs:
                loss = self._accumulate(
                    minibatch, index, proximal, metrics, ratios, is_first=not gradient_norms
                )
                gradient_norms.append(self._update(loss))
        except NotFinite as error:
            if before is not None:
                before.undo()
            where = f"update {len(gradient_norms) + 1} of {updates}"
            return Outcome(optimizer_updates=0, metrics={}, nonfinite=f"{error} at {where}")
        return Outcome(
            optimizer_updates=len(gradient_norms),
            metrics={
                **metrics.reduced(self._over_ranks),
                **ratios.metrics(),
                "grad_norm": max(gradient_norms),
                "learning_rate": rate,
            },
        )

    def _proximal(self, minibatches: list[list[Sequence]]) -> Logprobs:
        """Logprobs under the weights as they are, by minibatch and micro-batch; empty unless they anchor the ratio.

        Those of the first minibatch are left out: its own forward pass, before the first update, has them.
        """
        kept: Logprobs = {}
        if self._config.algorithm.correction.anchor != "proximal" or len(minibatches) == 1:
            return kept
        with torch.no_grad():
            for index, minibatch in enumerate(minibatches[1:], start=1):
                for place, batch in enumerate(self._micro_batches(minibatch)):
                    scored = self._token_logprobs(batch)
                    kept[index, place] = scored.logprobs_BT
        reshard(self._model)
        return kept

    def _accumulate(
        self,
        minibatch: list[Sequence],
        index: int,
        proximal: Logprobs,
        metrics: StepMetrics,
        ratios: Ratios,
        *,
        is_first: bool,
    ) -> float:
        """The gradient of a minibatch, by micro-batches; its loss. Before the first update the policy is proximal."""
        num_tokens, num_sequences = _count(minibatch), _count_sequences(minibatch)
        has_anchor = self._config.algorithm.correction.anchor == "proximal"
        fault: ValueError | None = None
        loss = 0.0
        for place, batch in enumerate(self._micro_batches(minibatch)):
            scored = self._token_logprobs(batch)
            if has_anchor:
                proximal.setdefault((index, place), scored.logprobs_BT.detach())
            tokens = Tokens(
                logprobs_BT=scored.logprobs_BT,
                sampled_logprobs_BT=batch.sampled_logprobs_BT,
                proximal_logprobs_BT=proximal.get((index, place)),
                reference_logprobs_BT=self._reference(batch),
                advantages_BT=batch.figures_BT.get(
                    "advantages", batch.advantages_B[:, None].expand_as(scored.logprobs_BT)
                ),
                entropy_BT=scored.entropy_BT,
                mask_BT=batch.mask_BT,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                max_tokens=self._config.sampling.max_tokens,
            )
            try:
                part = self._loss(tokens, batch)
            except ValueError as error:
                # The other ranks are in the same collectives: it is raised once all are through them.
                fault = fault or error
                part = LossShare(loss=scored.logprobs_BT.sum() * 0.0, metrics={})
            # FSDP averages gradients over ranks; shares of one sum have to be added.
            (part.loss * self._ranks).backward()
            loss += float(part.loss.detach())
            ratios.add(tokens.logprobs_BT, tokens.sampled_logprobs_BT, tokens.mask_BT)
            metrics.add({**part.metrics, **_told(tokens, part)})
            if is_first:
                metrics.add(_largest_gap(tokens))
        loss, num_faults = self._over_ranks([loss, float(fault is not None)])
        if num_faults:
            self._optimizer.zero_grad()
            raise fault or ValueError("the loss failed on another rank of the trainer")
        return loss

    def _token_logprobs(
        self, batch: MicroBatch, *, temperature: float | None = None
    ) -> TokenLogprobs:
        """At the temperature of sampling unless another is given."""
        return token_logprobs(
            self._model,
            batch,
            temperature=temperature or self._config.sampling.temperature,
            entropy_has_gradient=self._config.algorithm.entropy_coefficient > 0,
            chunk_tokens=self._config.trainer.logprob_chunk_tokens,
            precision=self._config.trainer.precision,
        )

    def _reference(self, batch: MicroBatch) -> torch.Tensor | None:
        """Reference logprobs; of padding, where nothing counts, zeros."""
        if self._config.algorithm.kl.coefficient == 0.0:
            return None
        return batch.figures_BT.get("reference_logprobs", batch.sampled_logprobs_BT)

    def _loss(self, tokens: Tokens, batch: MicroBatch) -> LossShare:
        if self._custom_loss is not None:
            return self._custom_loss(tokens, batch.advantages_B)
        algorithm = self._config.algorithm
        return LOSSES[algorithm.loss](tokens, algorithm)

    def _micro_batches(self, sequences: list[Sequence]) -> Iterable[Any]:
        limit, packed = self._config.trainer.micro_batch_tokens, self._config.trainer.packing
        shares = [share(sequences, rank, self._ranks) for rank in range(self._ranks)]
        pieces = max(len(split(s, limit, packed=packed)) for s in shares)
        for run in split(shares[self._rank], limit, pieces, packed=packed):
            yield collate(run, self._pad_id, self._device, packed=packed)

    def _update(self, loss: float) -> float:
        """Update with the gradient of a loss; the gradient's norm. Raises NotFinite, on all ranks alike."""
        norm = clip(self._model, self._config.optimizer.max_gradient_norm, self._layout)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._optimizer.zero_grad()
            of = f" of {self._config.loss!r}" if self._config.loss else ""
            raise NotFinite(f"the loss{of} is {loss:g} and its gradient's norm {norm:g}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def _over_ranks(self, values: list[float], op: Any = dist.ReduceOp.SUM) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=op, group=self._layout.data.get_group())
        return [float(value) for value in tensor]

    def full_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The optimizer's state, gathered: CPU tensors by `parameter/entry`, and the plain rest.

        Empty before the optimizer's first step.
        """
        return optimizer_state.full_state(self._model, self._optimizer)

    def load_state(self, pieces: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Begin post-training with what `full_state` gave, of any number of ranks; nothing to load is a fresh start.

        Raises ValueError for state of a parameter that the model has not got, or of another shape.
        """
        reshard(self._model)
        self.begin_post_training()
        optimizer_state.load_state(self._model, self._optimizer, pieces)

    def held_tensors(self) -> list[torch.Tensor]:
        """Everything that a step starts from: parameters, buffers, and the optimizer's state."""
        reshard(self._model)
        parameters = list(self._model.parameters())
        states = [self._optimizer.state.get(parameter, {}) for parameter in parameters]
        kept = [value for state in states for value in state.values() if value.ndim]
        return [*parameters, *self._model.buffers(), *kept]

    def bytes_by_group(self) -> dict[str, int]:
        """Bytes that this rank holds of parameters, their gradients, and the optimizer's state."""
        return optimizer_state.bytes_by_group(self._model, self._optimizer)


def _told(tokens: Tokens, part: LossShare) -> Metrics:
    """What a micro-batch tells whatever the loss."""
    num_tokens = float(tokens.mask_BT.sum())
    entropy_BT = torch.where(tokens.mask_BT, tokens.entropy_BT.detach(), 0.0)
    return {
        **drift(tokens.logprobs_BT, tokens.sampled_logprobs_BT, tokens.mask_BT),
        "entropy": Mean(float(entropy_BT.sum()), num_tokens),
        # A mean over minibatches, by their tokens: each micro-batch has a share of its minibatch's loss.
        "loss": Mean(float(part.loss.detach()) * tokens.num_tokens, num_tokens),
    }


def _largest_gap(tokens: Tokens) -> Metrics:
    """Before the first update, on-policy, what the recorded logprobs differ by from those of the same weights."""
    apart_BT = (tokens.logprobs_BT.detach() - tokens.sampled_logprobs_BT).abs()
    gap = float(torch.where(tokens.mask_BT, apart_BT, 0.0).max())
    return {"sampling/sampling_logp_difference/max": Largest(gap)}


def _count(sequences: list[Sequence]) -> int:
    return max(1, sum(sum(sequence.mask) for sequence in sequences))


def _count_sequences(sequences: list[Sequence]) -> int:
    return max(1, sum(any(sequence.mask) for sequence in sequences))
