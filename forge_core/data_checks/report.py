"""All checks over one dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from forge_core.data_checks.balance import check_balance, check_splits
from forge_core.data_checks.columns import Columns, read_columns
from forge_core.data_checks.duplicates import check_duplicates
from forge_core.data_checks.findings import DataReport
from forge_core.data_checks.rows import named_splits, read_raw
from forge_core.data_checks.tokens import Limits, check_tokens


def check_dataset(
    path: str,
    *,
    columns: Columns | None = None,
    test_fraction: float = 0.1,
    limits: Limits | None = None,
    rendered: Callable[[str], str] = str,
    needs_test: bool = True,
    only: Sequence[str] = (),
) -> DataReport:
    """Check a file or folder of rows.

    Args:
        path: a file, or a folder whose files may be named after splits.
        columns: where questions and answers stand.
        test_fraction: share that is held out, by a hash of the prompt, where files are not named after splits.
        limits: what rows must fit into; lengths in tokens are not checked if not given.
        rendered: makes the prompt of a question.
        needs_test: whether rows must be held out.
        only: the splits that count, where files are named after splits; all unless given. Of one alone a share is held
            out by hash, if rows must be.

    Raises ValueError if there is no such file.
    """
    report = DataReport()
    rows = [row for row in read_raw(path, report) if not only or row.split in (None, *only)]
    named = {split for split in named_splits(path) if not only or split in only}
    if needs_test and len(only) == 1:
        rows, named = [dataclasses.replace(row, split=None) for row in rows], set()
    examples = read_columns(
        rows, columns or Columns(), report, test_fraction=test_fraction, rendered=rendered
    )
    check_splits(examples, named, report, path=path, needs_test=needs_test)
    check_duplicates(examples, report)
    check_balance(examples, report)
    if limits is not None:
        check_tokens(examples, limits, report)
    return report
