"""A part that is open: the row groups of a Parquet file of episodes, decoded one at a time.

No pickle is loaded from it, whatever it holds: pyarrow leaves extension types that it does not know as they are
stored, and a schema that has any is refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.episodes import SCHEMA, columns_schema, schema_of, schema_version, upgrade


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPart:
    """A part whose bytes are at hand and were checked; row groups are decoded as they are read."""

    file: pq.ParquetFile
    """The open file."""
    version: int
    """Its schema version."""
    ends: np.ndarray
    """For each row group, the number of rows up to its end."""

    @classmethod
    def of(cls, key: str, data: bytes) -> Self:
        """The part with these bytes. Raises ValueError if it is damaged or not one of episodes."""
        try:
            file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        except pa.ArrowException as error:
            raise ValueError(f"{key} is no Parquet file: {error}") from error
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        version = schema_version(key, file.schema_arrow)
        return cls(file=file, version=version, ends=np.cumsum(sizes, dtype=np.int64))

    def read(self, columns: Sequence[str] | None, groups: Sequence[int] | None = None) -> pa.Table:
        """Some columns of some row groups, in order; None: all of them."""
        names = SCHEMA.names if columns is None else list(columns)
        columns_schema(names)
        stored = [name for name in names if name in schema_of(self.version).names]
        chosen = range(len(self.ends)) if groups is None else groups
        table = self.file.read_row_groups(list(chosen), stored, use_threads=False)
        return upgrade(table, names)

    def slices(self, offset: int, rows: int, columns: Sequence[str] | None) -> Iterator[pa.Table]:
        """The rows from `offset`, at most a row group at a time."""
        first, last = np.searchsorted(self.ends, [offset, offset + rows - 1], side="right")
        for group in range(first, last + 1):
            begin = int(self.ends[group - 1]) if group else 0
            table = self.read(columns, [group])
            low, high = max(offset - begin, 0), min(offset + rows - begin, table.num_rows)
            yield table.slice(low, high - low)
