"""What an episode is: its columns, what must hold of them, and figures that follow from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SCHEMA_VERSION = 2

_VERSION_KEY = "forgeflow.schema_version"


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


_SCORE = pa.struct([("name", pa.string()), ("value", pa.float64())])
_SCORED_BY = pa.struct([("name", pa.string()), ("version", pa.string()), ("seconds", pa.float64())])
_TURN = pa.struct([("role", pa.string()), ("start", pa.int32()), ("end", pa.int32())])

SCHEMA = pa.schema(
    [
        # Who: ids as `storage.layout` makes them.
        _required("episode_id", pa.string()),
        _required("run_id", pa.string()),
        _required("group_id", pa.string()),
        _required("draw", pa.int64()),
        _required("sample", pa.int32()),
        # The task: prompt_id hashes environment, rendered prompt and answer.
        _required("environment", pa.string()),
        _required("prompt_id", pa.string()),
        _required("prompt", pa.string()),
        pa.field("answer", pa.string()),  # Reference answer, if the environment has one.
        _required("metadata", pa.string()),  # JSON: what else a verifier needs.
        # What was sampled. The four lists after the prompt's are as long as the response.
        _required("response", pa.string()),
        _required("prompt_token_ids", pa.list_(pa.int32())),
        _required("response_token_ids", pa.list_(pa.int32())),
        _required("logprobs", pa.list_(pa.float32())),  # Of the distribution sampled from, in nats.
        _required("mask", pa.list_(pa.bool_())),  # True: the policy wrote the token.
        _required("token_policy_versions", pa.list_(pa.int32())),  # Without meaning off the mask.
        _required("turns", pa.list_(_TURN)),  # Half-open ranges of response tokens.
        _required("finish_reason", pa.string()),
        # How it was scored.
        pa.field("reward", pa.float64()),  # Null until scored.
        pa.field("scores", pa.list_(_SCORE)),  # One per verifier; null until scored.
        # Who gave those scores, and what each cost; null until scored, and before version 2.
        pa.field("scored_by", pa.list_(_SCORED_BY)),
        # How it came about.
        _required("seed", pa.int64()),
        _required("attempts", pa.int32()),  # From 1; more if samples failed before.
        _required("generate_seconds", pa.float64()),
        _required("created_at", pa.timestamp("us", tz="UTC")),
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION)},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """A column that was added to the schema, and what episodes of before have in it.

    Columns are only ever added: with an entry here for each, all older parts stay readable.
    """

    version: int
    """Schema version that first had the column."""
    name: str
    """The column."""
    value: Any
    """Its value in older episodes; None: null."""


ADDED: tuple[Added, ...] = (Added(version=2, name="scored_by", value=None),)
"""All columns that version 1 did not have."""


def schema_of(version: int) -> pa.Schema:
    """The columns that an older schema version had."""
    later = {added.name for added in ADDED if added.version > version}
    return pa.schema([field for field in SCHEMA if field.name not in later])


def schema_version(key: str, schema: pa.Schema) -> int:
    """The schema version of the part `key`.

    Raises ValueError if it has none, is newer than this code, or has other columns than its version.
    """
    stated = (schema.metadata or {}).get(_VERSION_KEY.encode(), b"")
    if not stated.isdigit():
        raise ValueError(f"{key} is no part of episodes: its metadata names no schema version")
    version = int(stated)
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{key} is of schema version {version}, and this Forgeflow reads versions up to "
            f"{SCHEMA_VERSION}: read it with a Forgeflow as new as the one that wrote it"
        )
    try:
        check_schema(schema, version)
    except ValueError as error:
        raise ValueError(f"{key} is {error}") from None
    return version


def upgrade(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """These columns, those added that an older part did not have with the values meant for them."""
    values = {added.name: added.value for added in ADDED}
    arrays = [
        table[name]
        if name in table.column_names
        else pa.repeat(pa.scalar(values[name], SCHEMA.field(name).type), table.num_rows)
        for name in columns
    ]
    return pa.Table.from_arrays(arrays, schema=columns_schema(columns))


def columns_schema(columns: Sequence[str] | None) -> pa.Schema:
    """The schema of some columns, None: of all. Raises ValueError for one that there is not."""
    if columns is None:
        return SCHEMA
    unknown = [name for name in columns if name not in SCHEMA.names]
    if unknown:
        raise ValueError(
            f"episodes have no column {', '.join(unknown)}: take some of {', '.join(SCHEMA.names)}"
        )
    return pa.schema([SCHEMA.field(name) for name in columns], SCHEMA.metadata)


def check_schema(schema: pa.Schema, version: int = SCHEMA_VERSION) -> None:
    """Raise ValueError, naming the columns at fault, unless the columns are those of the version."""
    due = schema_of(version)
    if schema.equals(due):
        return
    missing = [name for name in due.names if name not in schema.names]
    surplus = [name for name in schema.names if name not in due.names]
    shared = [name for name in due.names if schema.names.count(name) == 1]
    other = [
        f"{name} is {schema.field(name)} instead of {due.field(name)}"
        for name in shared
        if not schema.field(name).equals(due.field(name))
    ]
    raise ValueError(
        f"not a table of episodes (schema version {version}): missing columns {missing}, "
        f"surplus columns {surplus}, {'; '.join(other) or 'order or types differ'}"
    )


def check_table(table: pa.Table) -> None:
    """Raise ValueError, naming the episodes at fault, unless the table's content makes sense.

    It has episodes, each once and without nulls where none may be; a response's lists are as long
    as the response; the policy wrote some of its tokens, and their logprobs are finite.
    """
    check_schema(table.schema)
    if table.num_rows == 0:
        raise ValueError("a table of episodes must hold at least one")
    for field in SCHEMA:
        if not field.nullable and table[field.name].null_count:
            _refuse(table, _mask(table[field.name].is_null()), f"has no {field.name}")
    if len(table["episode_id"].unique()) < table.num_rows:
        _, first, counts = np.unique(table["episode_id"], return_index=True, return_counts=True)
        _refuse(table, np.isin(np.arange(table.num_rows), first[counts > 1]), "is there twice")
    lengths = _lengths(table, "response_token_ids")
    for name in ("logprobs", "mask", "token_policy_versions"):
        aligned = _lengths(table, name) == lengths
        _refuse(table, ~aligned, f"has not one value of {name} per token of its response")
    written = _mask(_flat(table, "mask"))
    ends = np.cumsum(lengths)
    before, after = np.searchsorted(np.flatnonzero(written), [ends - lengths, ends])
    _refuse(table, before == after, "has no token that the policy wrote")
    finite = np.isfinite(np.asarray(_flat(table, "logprobs")))  # Of a null, too, it is False.
    at_fault = np.searchsorted(ends, np.flatnonzero(written & ~finite), side="right")
    faults = np.isin(np.arange(table.num_rows), at_fault)
    _refuse(table, faults, "has a logprob that is not finite")


def check_scored(table: pa.Table) -> None:
    """Raise ValueError, naming the episodes at fault, unless each has a finite reward."""
    finite = _mask(pc.is_finite(table["reward"]).fill_null(False))
    _refuse(table, ~finite, "has no finite reward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What facts and commits say about a table of episodes."""

    group_ids: tuple[str, ...]
    """Groups, in order of first appearance."""
    rows: int
    """Number of episodes."""
    policy_version_min: int
    """Oldest policy version of any token that the policy wrote."""
    policy_version_max: int
    """Newest policy version of any token that the policy wrote."""
    prompt_tokens: int
    """Number of prompt tokens, summed over episodes."""
    response_tokens: int
    """Number of response tokens, summed over episodes."""
    environments: tuple[str, ...]
    """Names of the environments, sorted."""

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """The figures of a table that `check_table` accepts."""
        oldest, newest = policy_version_bounds(table)
        return cls(
            group_ids=tuple(table["group_id"].unique().to_pylist()),
            rows=table.num_rows,
            policy_version_min=int(oldest.min()),
            policy_version_max=int(newest.max()),
            prompt_tokens=int(_lengths(table, "prompt_token_ids").sum()),
            response_tokens=int(_lengths(table, "response_token_ids").sum()),
            environments=tuple(sorted(table["environment"].unique().to_pylist())),
        )


def policy_version_bounds(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Oldest and newest policy version of each episode's tokens that the policy wrote; each has some."""
    written = _mask(_flat(table, "mask"))
    versions = np.asarray(_flat(table, "token_policy_versions"))
    lengths = _lengths(table, "response_token_ids")
    starts = np.cumsum(lengths) - lengths
    limits = np.iinfo(versions.dtype)
    # What is off the mask must win neither.
    oldest = np.minimum.reduceat(np.where(written, versions, limits.max), starts)
    return oldest, np.maximum.reduceat(np.where(written, versions, limits.min), starts)


def reward_mean(table: pa.Table) -> float:
    """Mean reward of the episodes, summed without loss of digits."""
    rewards: list[float] = table["reward"].to_pylist()
    return math.fsum(rewards) / len(rewards)


def _refuse(table: pa.Table, at_fault: np.ndarray, what: str) -> None:
    if at_fault.any():
        episodes = table["episode_id"].filter(pa.array(at_fault)).to_pylist()
        shown = ", ".join(map(str, episodes[:10])) + (", …" if len(episodes) > 10 else "")
        raise ValueError(
            f"{len(episodes)} of {table.num_rows} episodes are refused: each {what}: {shown}"
        )


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(pc.list_value_length(table[name]))


def _flat(table: pa.Table, name: str) -> pa.ChunkedArray:
    return pc.list_flatten(table[name])


def _mask(values: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(values).astype(bool)
