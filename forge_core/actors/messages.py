"""What actors are asked and what they answer: small, immutable, safe to repeat."""

from __future__ import annotations

from dataclasses import dataclass, field

from forge_core.environments.base import Prompt
from forge_core.timeline import Interval
from forge_core.weights.manifest import Manifest
from storage.layout import RUN_SCORES
from storage.records import FileRef, PartRef


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnPrompt:
    """A prompt and the ids of what will come of it."""

    draw: int
    """Ordinal of the draw in the run; in an evaluation, of the prompt in the evaluation."""
    group_id: str
    """Id of its group."""
    prompt: Prompt
    """The prompt."""
    attempt: int = 1
    """How often the group is begun with this: what was cut off with its replica is begun again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Sample every prompt `num_samples` times and store the episodes as one part."""

    run_id: str
    """The run."""
    key_prefix: str
    """Where the part goes; the digest of its bytes is added."""
    prompts: tuple[DrawnPrompt, ...]
    """What this replica is to sample, in order."""
    num_samples: int
    """Samples per prompt."""
    policy_version: int
    """Version that the engine must hold; another is an error."""
    num_greedy: int = 0
    """How many of a prompt's samples, the last ones, are greedy."""
    attempt: int = 1
    """Attempt at this request, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A stored part of episodes that are not scored yet."""

    part: PartRef
    """The part."""
    group_ids: tuple[str, ...]
    """Groups in the part."""
    policy_version_min: int
    """Oldest version of any token."""
    policy_version_max: int
    """Newest version of any token."""
    prompt_tokens: int
    """Prompt tokens, summed over episodes."""
    response_tokens: int
    """Response tokens, summed over episodes."""
    seconds: float
    """Time in the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReply:
    """What came of a request's prompts."""

    stored: StoredPart | None
    """Their episodes; None if every prompt was too long."""
    too_long: tuple[str, ...]
    """Groups whose prompt leaves no room for a response; not sampled."""
    intervals: tuple[Interval, ...]
    """The replica's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvanceRequest:
    """Take new weights if there are any, begin new groups, and generate until a part is full or time is up."""

    run_id: str
    """The run."""
    seq: int
    """Number of the request, from 0; the one that was answered last is answered again without being done again."""
    key_prefix: str
    """Where a part goes; the digest of its bytes is added."""
    prompts: tuple[DrawnPrompt, ...]
    """Groups to begin."""
    num_samples: int
    """Samples per prompt."""
    manifest: Manifest | None
    """Weights to swap in first; None: those that it has."""
    probe: tuple[tuple[int, ...], ...]
    """Token ids to score with new weights."""
    part_groups: int
    """A part is written once so many groups are finished, or none is under way any more."""
    budget_seconds: float
    """Time after which it answers even so."""
    hold_seconds: float
    """Age of the oldest finished group at which a part is written however small."""
    attempt: int = 1
    """Attempt at this request, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Score the episodes of a part and commit them, or, for an evaluation, store them."""

    run_id: str
    """The run."""
    part: PartRef
    """Unscored episodes."""
    commit: str | None = None
    """Name of the commit; None stores an evaluation under `key_prefix` instead."""
    key_prefix: str = ""
    """Where an evaluation's part goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReply:
    """What the scores came to."""

    commit: str | None
    """Key of the commit record."""
    part: PartRef
    """The scored episodes."""
    group_ids: tuple[str, ...]
    """Groups in the part."""
    num_episodes: int
    """Episodes scored."""
    rewards: tuple[tuple[float, ...], ...]
    """Of an evaluation, the rewards of each prompt's samples in their order; none of a commit, whose part has them."""
    intervals: tuple[Interval, ...]
    """The verifier's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """Train one step on whole groups of committed episodes."""

    run_id: str
    """The run."""
    step: int
    """Number of the step, from 1; the trainer must have completed the one before, or this one already."""
    commits: tuple[str, ...]
    """Keys of the commit records that hold the groups."""
    group_ids: tuple[str, ...]
    """The batch, in order; empty trains on nothing."""
    advantages: tuple[tuple[str, float], ...] | None = None
    """By episode id, 0 for the others; None: those of the algorithm."""
    score_set: str = RUN_SCORES
    """Which scores of the episodes count."""
    weights: tuple[float, ...] | None = None
    """Of each group, what its advantages are multiplied by; None: 1."""
    is_collected: bool = False
    """Whether groups of other runs were sampled with this run's weights, so that they have an age."""
    reference_logprobs: FileRef | None = None
    """What the reference policy says of the batch's tokens, where there is one."""
    values: FileRef | None = None
    """What the critic says of them, where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReply:
    """What a step did, or why it was not done."""

    step: int
    """The step."""
    weights_digest: str
    """Digest of the weights after it."""
    optimizer_updates: int
    """Optimizer updates it made."""
    age_max: int | None
    """Largest age of a group; None if they are another run's."""
    age_mean: float | None
    """Mean age over groups; None if they are another run's."""
    metrics: dict[str, float]
    """Step metrics."""
    seconds: float
    """Time in the trainer."""
    intervals: tuple[Interval, ...]
    """Rank 0's time since it last told."""
    nonfinite: str | None = None
    """What of loss or gradient was not finite, in words; the step is not completed then, and nothing has changed."""
    batch_key: str | None = None
    """Where its batch is kept in the store in that case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartReply:
    """What supervised training did."""

    steps: int
    """Optimizer steps."""
    loss: float | None
    """Mean loss of the last step, in nats per token; None without steps."""
    validations: tuple[tuple[int, float], ...]
    """Steps that were made by then, and the loss on what is put aside, in nats per token."""
    best_step: int | None
    """Step whose weights these are; None without validation, which takes the last."""
    weights_digest: str
    """Digest of the weights after it."""
    seconds: float
    """Time in the trainer."""
    intervals: tuple[Interval, ...]
    """Rank 0's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReply:
    """The trainer's half of a publish: weights are in TorchStore."""

    manifest: Manifest
    """What was put."""
    probe_logprobs: tuple[tuple[float, ...], ...]
    """Per probe sequence: the trainer's logprob of every token but the first, at temperature 1."""
    probe_entropy: float
    """Mean entropy over the probe's tokens, in nats."""
    seconds: float
    """Time in the trainer."""
    intervals: tuple[Interval, ...]
    """Rank 0's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReply:
    """A generator's half of a publish: it serves the version."""

    policy_version: int
    """The version."""
    digest: str
    """Digest of the bytes it received."""
    probe_logprobs: tuple[tuple[float, ...], ...]
    """Per probe sequence: the engine's logprob of every token but the first, at temperature 1."""
    seconds: float
    """Time in the generator."""
    intervals: tuple[Interval, ...] = ()
    """The replica's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvanceReply:
    """Where a replica stands."""

    seq: int
    """The request that this answers."""
    stored: StoredPart | None
    """A part of finished groups, if one was due."""
    too_long: tuple[str, ...]
    """Groups whose prompt leaves no room for a response; not begun."""
    loaded: LoadReply | None
    """The new weights' arrival, if there were any."""
    num_under_way: int
    """Groups that were begun and are in no part yet."""
    seconds: float
    """Time in the engine, whether a part came of it or not."""
    intervals: tuple[Interval, ...]
    """The replica's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRequest:
    """Keep all state after a step."""

    run_id: str
    """The run."""
    step: int
    """The step, which the trainer must stand at."""
    key: str
    """Folder in the store, if it is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReply:
    """A written checkpoint, or one that is being written."""

    step: int
    """The step."""
    weights_digest: str
    """Digest of the weights in it."""
    key: str | None = None
    """Its folder; None while it is being written."""
    files: tuple[FileRef, ...] = field(default_factory=tuple)
    """Its files."""
    intervals: tuple[Interval, ...] = ()
    """Rank 0's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """Load a checkpoint and stand where it was taken."""

    key: str
    """Its folder in the store."""
    files: tuple[FileRef, ...]
    """Its files."""
    weights_digest: str
    """Digest of the weights in it."""
    step: int
    """Step that the trainer stands at afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRequest:
    """Say what weights of the past make of a step's tokens."""

    batch: TrainRequest
    """What the step is going to be trained on."""
    weights: RestoreRequest
    """Checkpoint that has the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateReply:
    """Figures of a step's tokens are stored."""

    file: FileRef
    """Where."""
    intervals: tuple[Interval, ...]
    """The actor's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticRestoreRequest:
    """Stand where a checkpoint was taken."""

    policy: RestoreRequest
    """The policy's part of it, with whose weights a critic begins."""
    files: tuple[FileRef, ...]
    """The critic's part; empty where it has not begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticReply:
    """What a critic's step did, or why it was not done."""

    metrics: dict[str, float]
    """By name."""
    nonfinite: str | None
    """What of its loss or gradient was not finite."""
    batch_key: str | None
    """Key of the batch, kept as a file, in that case."""
    intervals: tuple[Interval, ...]
    """The critic's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReply:
    """The checkpoint is loaded."""

    weights_digest: str
    """Digest of the weights that the trainer holds now."""
    intervals: tuple[Interval, ...]
    """Rank 0's time since it last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldMemory:
    """What a process holds of the memory that colocated meshes share."""

    bytes: int
    """Held now."""
    peak_bytes: int
    """Held at most since it was asked before."""
    total_bytes: int
    """How much there is."""
    is_of_device: bool
    """Whether this is what all processes together hold of a device, and not this one's alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnReply:
    """A process has fallen asleep, or is awake."""

    before: HeldMemory
    """What it held until then."""
    after: HeldMemory
    """What it holds now."""
    intervals: tuple[Interval, ...]
    """Its time since it last told."""
