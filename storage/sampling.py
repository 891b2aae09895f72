"""Seeded random samples of a snapshot, by row: equal draws for equal seeds and snapshots.

Rows are drawn by number before any part is opened; then only the row groups that hold them are
decoded, and of these only the columns that are asked for.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from storage.episodes import columns_schema
from storage.parts import CommitReader
from storage.snapshots import Snapshot


class Sampler:
    """Draws samples of a snapshot. Parts that were opened last are kept for the next draw.

    Which rows of a commit are wanted, where its record cannot tell, is found out once.

    Example:
        sampler = Sampler(snapshot)
        batch = sampler.sample(256, seed=(17, step), columns=["response_token_ids", "reward"])
    """

    def __init__(self, snapshot: Snapshot, *, reader: CommitReader | None = None) -> None:
        self._snapshot = snapshot
        self._reader = reader or CommitReader(snapshot.store)
        self._wanted: dict[int, np.ndarray] = {}
        counts = [commit.rows for commit in snapshot.commits]
        filters = snapshot.record.filters
        partial = [n for n, commit in enumerate(snapshot.commits) if not filters.include(commit)]
        commits = [snapshot.commits[number] for number in partial]
        for number, commit in zip(partial, self._reader.ahead(commits), strict=True):
            slices = self._reader.slices(commit, filters.columns)
            rows = np.concatenate([filters.rows(table) for table in slices])
            self._wanted[number] = np.flatnonzero(rows)
            counts[number] = len(self._wanted[number])
        self._ends = np.cumsum(counts, dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Number of episodes that can be drawn."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(
        self,
        count: int,
        *,
        seed: int | Sequence[int],
        columns: Sequence[str] | None = None,
        replace: bool = False,
    ) -> pa.Table:
        """`count` random episodes, in random order, each at most once unless `replace`.

        Raises ValueError if there are fewer, and otherwise as `read_part` does.
        """
        if count > self.num_rows and not (replace and self.num_rows):
            raise ValueError(f"{count} episodes are to be drawn of {self.num_rows}: draw fewer")
        generator = np.random.default_rng(seed)
        return self.rows(generator.choice(self.num_rows, count, replace=replace), columns)

    def rows(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """The episodes with these numbers in the snapshot, in this order."""
        numbers = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(numbers, kind="stable")
        chosen, starts = np.unique(numbers[order], return_index=True)
        commits = [self._snapshot.commits[number] for number in chosen]
        tables = [columns_schema(columns).empty_table()]
        shares = np.split(rows[order], starts[1:])
        # Of no rows `np.split` makes one share, which is nobody's.
        for number, share, commit in zip(
            chosen, shares, self._reader.ahead(commits), strict=bool(len(rows))
        ):
            within = share - (self._ends[number - 1] if number else 0)
            wanted = self._wanted.get(int(number))
            tables.append(
                self._reader.take(commit, within if wanted is None else wanted[within], columns)
            )
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_tables(tables).take(pa.array(back))


def sample(
    snapshot: Snapshot,
    count: int,
    *,
    seed: int | Sequence[int],
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """`count` different random episodes of a snapshot. Raises as `Sampler.sample` does."""
    return Sampler(snapshot).sample(count, seed=seed, columns=columns)
