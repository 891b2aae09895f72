"""A run of a store, to be read: for notebooks, scripts and whoever would look into what was trained on.

Example:
    run = Run("forge-store", "r1")
    run.steps().to_pandas().plot("step", "reward")
    good = run.episodes(["prompt", "response"], min_reward=1.0)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from storage.objects import ObjectStore, open_store
from storage.places import newest_places, read_compactions
from storage.runs import read_config
from storage.snapshots import Filters, Snapshot, take_snapshot
from storage.summary import run_summary
from storage.tombstones import refuse_deleted

_STEP_SCHEMA = [
    pa.field("step", pa.int64()),
    pa.field("policy_version", pa.int64()),
    pa.field("age_max", pa.int64()),
    pa.field("age_mean", pa.float64()),
    pa.field("groups", pa.int64()),
    pa.field("optimizer_updates", pa.int64()),
]

_GROUP_SCHEMA = pa.schema(
    [
        ("group_id", pa.string()),
        ("draw", pa.int64()),
        ("prompt_id", pa.string()),
        ("environment", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("steps", pa.list_(pa.int64())),
        ("episodes", pa.int64()),
        ("commit", pa.string()),
    ]
)


class Run:
    """One run, read-only. Each call reads what the run's log counts at that moment."""

    def __init__(self, store: str | ObjectStore, run_id: str) -> None:
        """Raises ValueError if the store has no such run, or it was deleted."""
        self.store = open_store(store) if isinstance(store, str) else store
        self.id = run_id
        self._check()

    def __repr__(self) -> str:
        return f"Run({self.store.uri!r}, {self.id!r})"

    def config(self) -> dict[str, Any]:
        """The config that the run was started with."""
        self._check()
        return read_config(self.store, self.id)

    def summary(self) -> dict[str, Any]:
        """What run.json holds, from the log."""
        self._check()
        return run_summary(self.store, self.id)

    def snapshot(self, **filters: Any) -> Snapshot:
        """The episodes that are committed now, pinned. Filters are those of `storage.snapshots.Filters`.

        Raises ValueError if there is no such filter or nothing can pass them.
        """
        return take_snapshot(self.store, [self.id], _filters(filters))

    def episodes(self, columns: Sequence[str] | None = None, **filters: Any) -> pa.Table:
        """Committed episodes, all in memory. Raises ValueError as `snapshot` does."""
        return self.snapshot(**filters).table(columns)

    def batches(
        self, columns: Sequence[str] | None = None, **filters: Any
    ) -> Iterator[pa.RecordBatch]:
        """The same a batch at a time, in memory that does not grow with the run."""
        for table in self.snapshot(**filters).tables(columns):
            yield from table.combine_chunks().to_batches()

    def files(self) -> list[str]:
        """Paths, or URIs, of the Parquet files that hold all committed episodes, each once.

        For whoever reads them without this package; they are there until `forgeflow gc` replaces or deletes them.
        """
        commits = self.snapshot().commits
        places = newest_places(read_compactions(self.store, self.id))
        parts = dict.fromkeys(
            places[commit.key].part if commit.key in places else commit.part for commit in commits
        )
        paths = {part.key: self.store.local_path(part.key) for part in parts}
        return [str(path or f"{self.store.uri}/{key}") for key, path in paths.items()]

    def steps(self) -> pa.Table:
        """A row for each step as last trained, with its metrics as further columns."""
        steps = [step for _, step in sorted(self._ledger().steps.items())]
        own = {field.name for field in _STEP_SCHEMA}
        names = sorted({name for step in steps for name in step.metrics} - own)
        rows = [
            {
                **{name: step.metrics.get(name) for name in names},
                "step": step.step,
                "policy_version": step.policy_version,
                "age_max": step.age_max,
                "age_mean": step.age_mean,
                "groups": len(step.group_ids),
                "optimizer_updates": step.optimizer_updates,
            }
            for step in steps
        ]
        metrics = [pa.field(name, pa.float64()) for name in names]
        return pa.Table.from_pylist(rows, pa.schema([*_STEP_SCHEMA, *metrics]))

    def groups(self) -> pa.Table:
        """A row for each group, in order of first mention, and what became of it."""
        rows = [
            {
                "group_id": group_id,
                "draw": group.draw and group.draw.draw,
                "prompt_id": group.draw and group.draw.prompt_id,
                "environment": group.draw and group.draw.environment,
                "state": group.state.value,
                "reason": group.reason,
                "steps": list(group.steps),
                "episodes": group.num_episodes,
                "commit": group.commit,
            }
            for group_id, group in self._ledger().groups.items()
        ]
        return pa.Table.from_pylist(rows, _GROUP_SCHEMA)

    def _ledger(self) -> Ledger:
        self._check()
        return Ledger.fold(
            read_entries(self.store, self.id), read_incarnations(self.store, self.id)
        )

    def _check(self) -> None:
        refuse_deleted(self.store, self.id)
        read_config(self.store, self.id)


def _filters(given: dict[str, Any]) -> Filters:
    unknown = sorted(given.keys() - Filters.model_fields.keys())
    if unknown:
        raise ValueError(
            f"episodes have no filter {', '.join(unknown)}: take some of {', '.join(Filters.model_fields)}"
        )
    try:
        return Filters(**given)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ValueError(f"filter {where}: {fault['msg']}".replace("filter : ", "")) from None
