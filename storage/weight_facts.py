"""What a run's log can say of weights: where they came from, who got them, and how good they are."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from storage.records import FileRef, PartRef, Record


class Forked(Record):
    """The run goes on from a checkpoint of another run instead of a warm start; its steps are counted on from there."""

    kind: Literal["forked"] = "forked"
    parent_run_id: str
    """The other run."""
    parent_step: NonNegativeInt
    """Step of the other run whose checkpoint it is."""
    step: NonNegativeInt
    """Step after which this run's own begin: the same in a fork, 0 in a replay."""
    checkpoint: str
    """Folder of that checkpoint."""
    weights_digest: str
    """Digest of the weights in it."""


class Restored(Record):
    """A new incarnation's trainer has loaded a checkpoint; steps after it are trained again before anything new."""

    kind: Literal["restored"] = "restored"
    step: NonNegativeInt
    """Step of the checkpoint."""
    weights_digest: str
    """Digest of the weights that were loaded."""


class Parity(Record):
    """How far the trainer's logprobs are from the generator's, for the same weights and tokens."""

    mean: float
    """Mean absolute difference, in nats."""
    max: float
    """Largest absolute difference, in nats."""
    tokens: NonNegativeInt
    """Number of tokens compared."""
    entropy: float
    """Mean entropy of the policy on them, in nats."""


class Published(Record):
    """Weights that the generators now can serve."""

    kind: Literal["published"] = "published"
    policy_version: NonNegativeInt
    """Version of the weights."""
    weights_digest: str
    """Digest of the weights."""
    parity: Parity | None
    """Measured agreement of trainer and generator; None where it was not measured."""
    bytes: NonNegativeInt
    """Size of the weights in bytes."""
    seconds: float
    """Time the publish took, in seconds."""


class Validation(Record):
    """A loss on supervised examples that are put aside."""

    step: NonNegativeInt
    """Supervised steps that were made before."""
    loss: float
    """Mean loss, in nats per token."""


class WarmStarted(Record):
    """Supervised training before the first step; its weights are policy version 0."""

    kind: Literal["warm_started"] = "warm_started"
    steps: NonNegativeInt
    """Number of supervised steps."""
    loss: float | None
    """Last loss, in nats per token."""
    validations: tuple[Validation, ...] = ()
    """In order; none where nothing is put aside."""
    best_step: int | None = None
    """Supervised steps after which the weights were taken; None where nothing is put aside: after the last."""
    weights_digest: str
    """Digest of the weights after it."""
    seconds: float
    """Time it took, in seconds."""


class PassAt(Record):
    """pass@k on held-out prompts."""

    k: PositiveInt
    """Number of samples."""
    probability: float
    """That of k samples of a prompt one is right, mean over prompts."""


class Evaluated(Record):
    """Scores on held-out prompts.

    In the parts, the first `num_samples` of a prompt are drawn as in training, and the one after them is greedy.
    """

    kind: Literal["evaluated"] = "evaluated"
    name: str
    """'initial', 'final' or 'step-000050'."""
    policy_version: NonNegativeInt
    """Version of the weights."""
    sampled: float
    """Mean reward of the samples that were drawn as in training."""
    greedy: float
    """Mean reward of the greedy samples."""
    num_prompts: NonNegativeInt
    """Number of held-out prompts."""
    num_samples: PositiveInt = 1
    """Samples of a prompt that were drawn as in training."""
    pass_at: tuple[PassAt, ...] = ()
    """For k of 1, 2, 4 and so on; empty before this was told."""
    parts: tuple[PartRef, ...]
    """The scored episodes."""


class Checkpoint(Record):
    """All state after a step, from which training can go on."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: NonNegativeInt
    """Number of the last step that it contains; 0 before the first."""
    key: str
    """Folder in the store."""
    weights_digest: str
    """Digest of the weights."""
    files: tuple[FileRef, ...]
    """Everything in the folder."""
    critic: tuple[FileRef, ...] = ()
    """The critic's state after the same step, beside it, where there is a critic."""


class Pruned(Record):
    """Checkpoints that the run needs no more; their files may be gone from now on."""

    kind: Literal["pruned"] = "pruned"
    steps: tuple[NonNegativeInt, ...]
    """Steps of the checkpoints."""
