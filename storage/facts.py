"""What a run's log can say. An entry is a few facts that become true together.

Numbers are finite: a metric that is not is left out by the writer, since a fact with one is refused
(ValueError).
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from storage.records import FileRef, PartRef, Record

SCHEMA_VERSION: Literal[2] = 2
"""Version of entries that are written."""

IntervalKind = Literal[
    "startup",
    "warm_start",
    "generate",
    "score",
    "train",
    "evaluate",
    "weights",
    "checkpoint",
    "wait_batch",
    "wait_weights",
    "wait_slot",
]
Status = Literal["finished", "paused", "failed", "cancelled"]
"""How an incarnation ended; paused: it did all that there was to do, and steps are left."""


class Source(Record):
    """A file of the user's code that a run relies on."""

    field: str
    """Key of the config that names it, or `loop`."""
    reference: str
    """How it was named."""
    file: FileRef
    """The file as it was."""


class Started(Record):
    """The first fact of an incarnation."""

    kind: Literal["started"] = "started"
    run_id: str
    """The run."""
    meshes: tuple[str, ...]
    """Names of the meshes that will log intervals."""
    sources: tuple[Source, ...] = ()
    """Code of the user's."""
    config_sha256: str | None = None
    """Hex SHA-256 of the stored config; None in logs of version 1."""


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


class Draw(Record):
    """One prompt drawn from an environment; its samples will be one group."""

    draw: NonNegativeInt
    """Ordinal of the draw in the run, from 0."""
    group_id: str
    """Id of the group."""
    prompt_id: str
    """Hash of environment, rendered prompt and reference answer."""
    environment: str
    """Name of the environment."""
    index: NonNegativeInt
    """Index of the task in the environment."""


class Admitted(Record):
    """Draws that were let into the pipeline."""

    kind: Literal["admitted"] = "admitted"
    round: NonNegativeInt
    """Round of generation."""
    draws: tuple[Draw, ...]
    """The draws, in order."""


class Replayed(Record):
    """Groups of another run that were let into this one, with their episodes as that run committed them.

    They keep their ids. They have no age, for their tokens' versions are the other run's; unless that run collected
    them for this one, with this one's weights.
    """

    kind: Literal["replayed"] = "replayed"
    run_id: str
    """The other run."""
    commit: str
    """Key in the store of the commit record that holds them."""
    draws: tuple[Draw, ...]
    """The groups, by the draws that the other run admitted, in order."""
    group_size: PositiveInt
    """Episodes of each group."""
    score_set: str
    """Which scores count: 'run' are those of the other run's own verifiers, others are annotations by their name."""


class Generated(Record):
    """A part of episodes that are not scored yet."""

    kind: Literal["generated"] = "generated"
    round: NonNegativeInt
    """Round of generation."""
    replica: NonNegativeInt
    """Generator replica that wrote them."""
    part: PartRef
    """The episodes."""
    group_ids: tuple[str, ...]
    """Groups in the part, in order of first appearance."""
    policy_version_min: int
    """Oldest policy version of any token that the policy wrote."""
    policy_version_max: int
    """Newest policy version of any token that the policy wrote."""
    prompt_tokens: NonNegativeInt
    """Number of prompt tokens, summed over episodes."""
    response_tokens: NonNegativeInt
    """Number of response tokens, summed over episodes."""


class Committed(Record):
    """Scored episodes that may be trained on."""

    kind: Literal["committed"] = "committed"
    round: NonNegativeInt
    """Round of generation."""
    commit: str
    """Key in the store of the commit record."""
    group_ids: tuple[str, ...]
    """Groups in the commit, in order of first appearance."""
    episodes: NonNegativeInt
    """Number of episodes."""
    score_set: str
    """Which scores count; 'run' are those of the run's own verifiers."""
    sha256: str | None = None
    """Hex SHA-256 of the commit record; None in logs of version 1."""


class HandedOver(Record):
    """Committed groups that another run will train on, and this one never."""

    kind: Literal["handed_over"] = "handed_over"
    group_ids: tuple[str, ...]
    """The groups."""
    to_run: str
    """The other run."""


class Dropped(Record):
    """Groups that will never be trained on."""

    kind: Literal["dropped"] = "dropped"
    group_ids: tuple[str, ...]
    """The groups."""
    reason: str
    """One of stale, no_signal, nonfinite, failed, end_of_run, prompt_too_long, or another word."""
    step: int | None
    """Step for which they were considered, if any."""


class Batched(Record):
    """The groups that a step is about to train on."""

    kind: Literal["batched"] = "batched"
    step: PositiveInt
    """The step, from 1."""
    group_ids: tuple[str, ...]
    """The groups, in order."""
    advantages: dict[str, float] | None = None
    """By episode id, 0 for the others, where a loop of the user's has chosen them."""


class Step(Record):
    """A completed step: one batch with all its epochs and minibatches.

    The same step again, with the same groups, is a retraining after the loss of provisional steps;
    the later one stands.
    """

    kind: Literal["step"] = "step"
    step: PositiveInt
    """Number of the step, from 1."""
    group_ids: tuple[str, ...]
    """The groups that were trained on, in order."""
    score_set: str
    """Scores that were used."""
    weights_digest: str
    """Digest of the weights after the step."""
    policy_version: PositiveInt
    """Version of the weights after the step; equal to `step`."""
    optimizer_updates: NonNegativeInt
    """Number of optimizer updates in this step."""
    age_max: int | None
    """Largest age of a group, in versions; None if its groups are of other runs."""
    age_mean: float | None
    """Mean age over the step's groups, in versions; None if they are of other runs."""
    metrics: dict[str, float]
    """Further measurements by name."""
    checkpoint: str | None
    """Folder of the checkpoint that holds the state after the step, if one was written."""


class Diverged(Record):
    """From here on the run cannot be reproduced to the last bit."""

    kind: Literal["diverged"] = "diverged"
    step: int | None
    """Step whose retraining gave other weights, if that is the cause."""
    reason: str
    """Cause, in words."""


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


class WarmStarted(Record):
    """Supervised training before the first step; its weights are policy version 0."""

    kind: Literal["warm_started"] = "warm_started"
    steps: NonNegativeInt
    """Number of supervised steps."""
    loss: float | None
    """Last loss, in nats per token."""
    weights_digest: str
    """Digest of the weights after it."""
    seconds: float
    """Time it took, in seconds."""


class Evaluated(Record):
    """Scores on held-out prompts.

    In the parts, sample 0 of a prompt is drawn as in training, sample 1 is greedy.
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


class Pruned(Record):
    """Checkpoints that the run needs no more; their files may be gone from now on."""

    kind: Literal["pruned"] = "pruned"
    steps: tuple[NonNegativeInt, ...]
    """Steps of the checkpoints."""


class Retry(Record):
    """An attempt that was lost and is made again."""

    kind: Literal["retry"] = "retry"
    stage: str
    """What is made again."""
    attempt: PositiveInt
    """Number of the attempt that was lost, from 1."""
    cause: str
    """Why it was lost, in words."""
    seconds: float
    """Time that the lost attempt cost, in seconds."""


class Failed(Record):
    """Processes of a mesh died or hung; told when new ones have taken their place, or will not any more."""

    kind: Literal["failed"] = "failed"
    mesh: str
    """Name of the mesh."""
    cause: str
    """What became of the processes, in words."""
    failures: PositiveInt
    """How often this mesh has failed in this incarnation, with this."""
    failed_at: float
    """Unix seconds at which it was noticed."""
    started_at: float | None
    """Unix seconds at which the clock of the new processes begins; None if the run ended before they served."""
    seconds: float
    """From the noticing until the mesh served again, or until the run ended, in seconds."""


class Interval(Record):
    """What a mesh did for a while."""

    kind: IntervalKind
    """What it did."""
    start: float
    """Unix seconds on the mesh's clock."""
    end: float
    """Unix seconds on the mesh's clock."""


class Intervals(Record):
    """Where a mesh's time went; the intervals of one mesh never overlap."""

    kind: Literal["intervals"] = "intervals"
    mesh: str
    """Name of the mesh."""
    intervals: tuple[Interval, ...]
    """The intervals."""


class Sealed(Record):
    """A successor ended this incarnation's log here. It is no sign of the incarnation's life."""

    kind: Literal["sealed"] = "sealed"
    host: str
    """Host of the successor."""
    pid: int
    """Process id of the successor."""


class End(Record):
    """The last fact of an incarnation that ended in order."""

    kind: Literal["end"] = "end"
    status: Status
    """How it ended."""
    reason: str | None
    """Why, in words, unless it finished."""


Fact = (
    Started
    | Forked
    | Restored
    | Admitted
    | Replayed
    | Generated
    | Committed
    | HandedOver
    | Dropped
    | Batched
    | Step
    | Diverged
    | Published
    | WarmStarted
    | Evaluated
    | Checkpoint
    | Pruned
    | Retry
    | Failed
    | Intervals
    | End
    | Sealed
)


class Entry(Record):
    """Facts that were written at once, and where in the log they stand."""

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    """Version of the form of entry and facts; 1 knew neither forks, replays nor resumed runs."""
    incarnation: NonNegativeInt
    """Incarnation that wrote it."""
    seq: NonNegativeInt
    """Its number within the incarnation, from 0 without gaps."""
    at: float
    """Unix seconds."""
    facts: tuple[Annotated[Fact, Field(discriminator="kind")], ...] = Field(min_length=1)
    """What became true, in order."""
