"""Groups that are trained on again: what a step's batch is, where the run has a buffer.

    committed groups with a signal ──kept──▶ ReplayBuffer ──uses──▶ batch
                                                  └──released, with the reason

The log has what the buffer was given, what was drawn and who left; so a run that goes on has its buffer again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from forge_core.buffers.fifo import Fifo
from forge_core.buffers.mixture import Choice, Pick, ReplayBuffer
from forge_core.buffers.prioritised import Prioritised
from forge_core.buffers.reservoir import Reservoir
from forge_core.buffers.source import Item, Source
from forge_core.config import BufferConfig, RunConfig, SourceConfig
from storage import facts
from storage.ledger import Ledger
from tasks.run import ActiveRun


def make_buffer(config: RunConfig) -> ReplayBuffer:
    """The empty buffer of a run."""
    buffer = config.buffer
    return ReplayBuffer(
        {name: _source(name, held, config) for name, held in buffer.held.items()},
        buffer.shares(config.groups_per_step),
        max_uses=buffer.max_uses,
        has_fresh=buffer.fresh_fraction > 0.0,
        seed=config.seed,
    )


def _source(name: str, held: BufferConfig | SourceConfig, config: RunConfig) -> Source:
    age = held.max_age if held.unbounded or held.max_age is not None else config.max_policy_age
    if held.policy == "fifo":
        return Fifo(capacity=held.capacity, max_age=age, min_reward=held.min_reward)
    if held.policy == "reservoir":
        return Reservoir(
            capacity=held.capacity,
            max_age=age,
            min_reward=held.min_reward,
            seed=config.seed,
            name=name,
        )
    return Prioritised(
        capacity=held.capacity,
        max_age=age,
        min_reward=held.min_reward,
        alpha=held.alpha,
        beta=held.beta,
        use_discount=held.use_discount,
    )


def rebuild(config: RunConfig, ledger: Ledger) -> ReplayBuffer:
    """The buffer as it stood when the log's last batch was chosen.

    Raises ValueError if the log has a batch that the buffer could not have given, or others left than it says.
    """
    buffer = make_buffer(config)
    for step, fact in sorted(ledger.buffered.items()):
        picks = [
            Pick(group_id=group_id, source=use.source, weight=use.weight)
            for group_id, use in zip(fact.group_ids, fact.uses or (), strict=True)
        ]
        items = [_item(kept) for kept in fact.kept or ()]
        choice = buffer.recall(step, items, picks, is_last=step == config.steps)
        left = {str(reason): groups for reason, groups in choice.left.items()}
        if left != ledger.released.get(step, {}):
            raise ValueError(
                f"at step {step} other groups leave the buffer than the log says: another version of the code wrote it"
            )
    return buffer


def _item(kept: facts.Kept) -> Item:
    return Item(
        group_id=kept.group_id,
        policy_version=kept.policy_version,
        reward=kept.reward,
        priority=kept.priority,
    )


def drawn_batch(
    run: ActiveRun, step: int, group_ids: Sequence[str], rewards: Mapping[str, Sequence[float]]
) -> list[facts.Fact]:
    """Give the buffer a step's groups, which have a signal, and draw its batch: the facts, to be logged at once.

    If they are not, the buffer is to be forgotten: `run.buffer = None`.
    """
    if run.buffer is None:
        run.buffer = rebuild(run.config, run.ledger)
    kept = [_kept(run.ledger, group_id, rewards[group_id]) for group_id in group_ids]
    choice = run.buffer.choose(
        step, [_item(each) for each in kept], is_last=step == run.config.steps
    )
    return [_batched(step, kept, choice), *_released(step, choice)]


def _kept(ledger: Ledger, group_id: str, rewards: Sequence[float]) -> facts.Kept:
    version = ledger.groups[group_id].policy_version
    assert version is not None, "it was generated"
    return facts.Kept(
        group_id=group_id,
        policy_version=version,
        reward=float(np.mean(rewards)),
        # Where all rewards are equal there is no signal, and the group not here: but a tiny spread may round to 0.
        priority=max(float(np.std(rewards)), 1e-300),
    )


def _batched(step: int, kept: list[facts.Kept], choice: Choice) -> facts.Batched:
    return facts.Batched(
        step=step,
        group_ids=tuple(pick.group_id for pick in choice.picks),
        uses=tuple(facts.Use(source=pick.source, weight=pick.weight) for pick in choice.picks),
        kept=tuple(kept),
    )


def _released(step: int, choice: Choice) -> list[facts.Released]:
    return [
        facts.Released(step=step, group_ids=groups, reason=str(reason))
        for reason, groups in choice.left.items()
    ]


def drawn_weights(ledger: Ledger, step: int) -> tuple[float, ...] | None:
    """Importance weights of a step's groups; None without a buffer."""
    fact = ledger.buffered.get(step)
    return None if fact is None else tuple(use.weight for use in fact.uses or ())


def reuse_metrics(ledger: Ledger, step: int) -> dict[str, float]:
    """What of a step's batch was used before, and how it is weighed; nothing without a buffer."""
    fact = ledger.buffered.get(step)
    if fact is None or not fact.group_ids:
        return {}
    used = [
        any(earlier < step for earlier in ledger.groups[group_id].batched)
        for group_id in fact.group_ids
    ]
    return {
        "buffer/groups": float(len(fact.group_ids)),
        "buffer/frac_reused": sum(used) / len(used),
        "buffer/weight_mean": float(np.mean([use.weight for use in fact.uses or ()])),
    }
