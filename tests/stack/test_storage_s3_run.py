"""A run's episodes in a bucket: read, sampled, compacted, collected and deleted as in a folder."""

from __future__ import annotations

import os
import time

import pyarrow.parquet as pq
from pyarrow import fs
from stored_run import StoredRun

from storage import layout
from storage.client import Run
from storage.compaction import compact, plan_compaction
from storage.deleting import delete_run
from storage.garbage import Limits
from storage.gc import delete_garbage
from storage.objects import open_store
from storage.sampling import sample
from storage.snapshots import Filters, take_snapshot

HOUR = 3600.0
NOW = Limits(before=time.time() + HOUR)
"""Nothing is left alone for its age."""


def test_a_bucket_is_served_alike(s3_store_uri: str) -> None:
    store = open_store(s3_store_uri)
    run = StoredRun(store)
    for number in range(3):
        run.commit([2 * number, 2 * number + 1])
    run.end()
    store.put_if_absent("probe-1234", b"first")
    snapshot = take_snapshot(store, ["run"], Filters(min_reward=1.0))
    before, drawn = snapshot.table(), sample(snapshot, 5, seed=3)
    plan = plan_compaction(store, "run", take_snapshot(store, ["run"]).commits, whole=True)
    assert compact(store, plan) is not None
    assert delete_garbage(store, Limits(before=time.time() - HOUR)).garbage == []
    deleted = delete_garbage(store, NOW).garbage
    assert [each.kind for each in deleted] == [*["compacted parts"] * 3, "temporary files"]
    assert not store.exists("probe-1234")
    assert snapshot.table().equals(before)
    assert sample(snapshot, 5, seed=3).equals(drawn)
    client = Run(s3_store_uri, "run")
    [part] = store.keys(layout.compacted_folder("run"))
    assert client.files() == [f"{s3_store_uri}/{part}"]
    system = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
    table = pq.read_table(
        [file.removeprefix("s3://") for file in client.files()], filesystem=system
    )
    assert table.num_rows == client.episodes().num_rows == 12
    delete_run(store, "run")
    assert store.keys("") == [layout.deleted_key("run")]
