"""What a run's log can say. An entry is a few facts that become true together.

The facts of groups, from their draws to the steps that train on them, are here; `process_facts` and `weight_facts`
have the others.

Numbers are finite: a metric that is not is left out by the writer, since a fact with one is refused
(ValueError).
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from storage.process_facts import Diverged as Diverged
from storage.process_facts import End as End
from storage.process_facts import Failed as Failed
from storage.process_facts import Interval as Interval
from storage.process_facts import IntervalKind as IntervalKind
from storage.process_facts import Intervals as Intervals
from storage.process_facts import Replica as Replica
from storage.process_facts import Retry as Retry
from storage.process_facts import Sealed as Sealed
from storage.process_facts import Source as Source
from storage.process_facts import Started as Started
from storage.process_facts import Status as Status
from storage.records import FileRef, PartRef, Record
from storage.weight_facts import Checkpoint as Checkpoint
from storage.weight_facts import Evaluated as Evaluated
from storage.weight_facts import Forked as Forked
from storage.weight_facts import Parity as Parity
from storage.weight_facts import PassAt as PassAt
from storage.weight_facts import Pruned as Pruned
from storage.weight_facts import Published as Published
from storage.weight_facts import Restored as Restored
from storage.weight_facts import Validation as Validation
from storage.weight_facts import WarmStarted as WarmStarted

SCHEMA_VERSION: Literal[2] = 2
"""Version of entries that are written."""


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
    level: NonNegativeInt = 0
    """Level of its environment's curriculum, from 0."""


class Admitted(Record):
    """Draws that were let into the pipeline."""

    kind: Literal["admitted"] = "admitted"
    round: NonNegativeInt
    """Round of generation."""
    draws: tuple[Draw, ...]
    """The draws, in order."""
    step: PositiveInt | None = None
    """Step that they fill up, where they are beyond those that were planned for it."""


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
    bytes: NonNegativeInt | None = None
    """Size of the part in bytes; None in logs of before it was told."""


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
    cause: str | None = None
    """Why, in words, where a loss or gradient was not finite: the groups were batched, and their step was not done."""
    batch: str | None = None
    """Key in the store of their batch as it was, in that case."""


class Use(Record):
    """How a group came into a batch."""

    source: str
    """Source of the buffer that it was drawn from; `fresh` for a group of the step itself."""
    weight: float
    """Importance weight of how it was drawn, above 0 and at most 1."""


class Kept(Record):
    """A group that the buffer was given."""

    group_id: str
    """The group."""
    policy_version: int
    """A version that none of its tokens is older than."""
    reward: float
    """Mean reward of its samples."""
    priority: float
    """How much there is to learn of it, above 0."""


class Batched(Record):
    """The groups that a step is about to train on."""

    kind: Literal["batched"] = "batched"
    step: PositiveInt
    """The step, from 1."""
    group_ids: tuple[str, ...]
    """The groups, in order."""
    advantages: dict[str, float] | None = None
    """By episode id, 0 for the others, where a loop of the user's has chosen them."""
    uses: tuple[Use, ...] | None = None
    """Of each group, where the run has a buffer."""
    kept: tuple[Kept, ...] | None = None
    """The step's own groups with a signal, which were given to the buffer, in order, where the run has one."""


class Released(Record):
    """Groups that left the buffer: they are in no later batch."""

    kind: Literal["released"] = "released"
    step: PositiveInt
    """Step whose batch was chosen then; it may be in that one."""
    group_ids: tuple[str, ...]
    """The groups. What was in no batch is dropped for the reason."""
    reason: str
    """One of unwanted, evicted, passed_over, stale, used_up, end_of_run, or another word."""


class Estimated(Record):
    """What a model beside the trainer says of each token of a step's batch, before the step."""

    kind: Literal["estimated"] = "estimated"
    step: PositiveInt
    """Step that trains with it."""
    what: Literal["reference_logprobs", "values"]
    """Logprobs under the reference policy, or a critic's values."""
    weights_step: NonNegativeInt
    """Step after which the reference's weights were the policy's, or that the critic had learned up to."""
    file: FileRef
    """The figures, of all response tokens in the order of the batch."""


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
    | Released
    | Estimated
    | Step
    | Diverged
    | Published
    | WarmStarted
    | Evaluated
    | Checkpoint
    | Pruned
    | Retry
    | Failed
    | Replica
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
