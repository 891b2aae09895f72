"""What a run's log can say of its controllers and processes: how they began, failed, spent their time, and ended."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from storage.records import FileRef, Record

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


class Diverged(Record):
    """From here on the run cannot be reproduced to the last bit."""

    kind: Literal["diverged"] = "diverged"
    step: int | None
    """Step whose retraining gave other weights, if that is the cause."""
    reason: str
    """Cause, in words."""


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


class Replica(Record):
    """What a mesh of processes did in this incarnation so far; told now and then, and at the end."""

    kind: Literal["replica"] = "replica"
    mesh: str
    """Name of the mesh."""
    answered: NonNegativeInt
    """Calls answered."""
    errors: NonNegativeInt
    """Calls whose endpoint raised."""
    lost: NonNegativeInt
    """Calls under way when its processes failed."""
    restarts: NonNegativeInt
    """Times that it was started again."""
    under_way: NonNegativeInt
    """Calls not answered yet."""
    load: float
    """Its queue: response tokens that what it has under way may take; 0 where nobody counts them."""
    answered_per_second: float
    """Over the last minute."""
    produced: NonNegativeInt
    """Response tokens of a generator, episodes of the verifier, 0 of others."""
    produced_per_second: float
    """The same over the last minute."""
    seconds_p50: float | None
    """Median time to an answer; None without answers."""
    seconds_p95: float | None
    """95th percentile of the same."""
    seconds_p99: float | None
    """99th percentile of the same."""


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
