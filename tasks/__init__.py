"""Tasks: the stages of a run, each a Prefect task that can be tried again by itself.

A stage's effect is a log entry or a put-if-absent object under a logical key, so a second attempt finds what the
first one did. Small references pass between stages; tokens and weights stay in the meshes and the store.
"""
