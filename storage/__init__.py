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

Modules, each relying only on those before it:

    objects    the store: keys, put-if-absent      ledger    what the log adds up to
    layout     where everything lies               runs      stored configs
    records    what is stored as JSON              summary   run.json
    facts      what a log can say                  episodes  columns of an episode (pyarrow)
    log        incarnations and entries            parts     Parquet parts, commits (pyarrow)
                                                   verify    the proof of a run (pyarrow)

Nothing is re-exported, so that importing `storage` stays light.
"""
