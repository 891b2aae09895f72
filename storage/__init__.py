"""Episodes, run logs and checkpoints on an object store: all the state that Forgeflow keeps.

Invariants that every module here keeps:

- An object is written once. `put_if_absent` decides every race, and only derived views (run.json,
  reports) are replaced.
- The log is the truth. An entry counts if its incarnation, the next one's `previous_last` and the
  unbroken count of entries from 0 say so; what lies beyond does not exist, whoever wrote it.
- A part counts once a commit names it, and a commit counts once the log names it. Readers never
  glob `episodes/data`.
- Nothing is acknowledged before it is durable: a write returns after the file and its directory are
  synced.
- Ledger, summary and run.json are folds of the log, never a state of their own; `verify` believes
  none of them.

Modules, each group relying only on those before it:

    contract    what a store promises              objects      stores by their URI
    local, s3*  directories; S3 through s3fs       layout       where everything lies
    records     what is stored as JSON             tombstones   runs that were deleted
    facts       what a log can say                 log          incarnations and entries
    ledger      what the log adds up to            overlap      what went on at the same time
    runs        stored configs                     summary      run.json
    resume      what later incarnations and forks need to know
    workspace   the local folder of a run

    episodes    columns of an episode              part_file    one Parquet file, checked
    parts       parts and commits                  places       where a commit's rows lie
    annotations sets of scores beside a run's own  compaction   few large parts for many small
    snapshots   what logs count, pinned            sampling     rows of a snapshot at random
    client      a run, read only                   gc, deleting garbage, and whole runs
    verify*     the proof of a run

The first group imports neither pyarrow nor anything else that is slow.

Nothing is re-exported, so that importing `storage` stays light.
"""
