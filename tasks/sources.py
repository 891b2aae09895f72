"""Keeping code of the user's with the run that it decided."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from forge_core.user_code import source_file
from storage import facts, layout
from storage.objects import ObjectStore
from storage.records import FileRef


def keep_sources(
    store: ObjectStore, run_id: str, references: Mapping[str, str]
) -> tuple[facts.Source, ...]:
    """Store the file that each reference, by its field, is defined in. What that file imports is not kept.

    Raises ValueError for a reference without a file.
    """
    kept = []
    for field, reference in references.items():
        path = source_file(field, reference)
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        key = layout.source_key(run_id, sha256, path.name)
        store.put_if_absent(key, data)
        file = FileRef(key=key, sha256=sha256, bytes=len(data))
        kept.append(facts.Source(field=field, reference=reference, file=file))
    return tuple(kept)
