"""Metrics of a run in MLflow, beside TensorBoard: a sink of your own.

    pip install mlflow-skinny
    export MLFLOW_TRACKING_URI=http://127.0.0.1:5000
    forgeflow run --preset tiny --set 'sinks=["tensorboard","examples/mlflow_sink.py:MLflow"]'

A run that goes on writes to the same run of MLflow's, which is found by its tag. What is told is handed to a thread, so
that a slow server holds up no step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
except ImportError:
    raise ImportError("MLflow is not installed: pip install mlflow-skinny") from None

if TYPE_CHECKING:
    from tasks.sinks import SinkRun

EXPERIMENT = "forgeflow"
TAG = "forgeflow.run_id"
MOST_AT_ONCE = 1000
"""Metrics that MLflow takes in one call."""
CLOSING_SECONDS = 10.0


class MLflow:
    """One run of MLflow's for one of Forgeflow's."""

    def __init__(self, run: SinkRun) -> None:
        self.client = MlflowClient()
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        experiment_id = (
            self.client.create_experiment(EXPERIMENT)
            if experiment is None
            else experiment.experiment_id
        )
        known = self.client.search_runs([experiment_id], f"tags.`{TAG}` = '{run.run_id}'")
        if known:
            self.run_id = known[0].info.run_id
            self.client.set_terminated(self.run_id, "RUNNING")
        else:
            tags = {TAG: run.run_id, "mlflow.runName": run.run_id}
            self.run_id = self.client.create_run(experiment_id, tags=tags).info.run_id
            for name in ("regime", "seed", "steps", "group_size", "groups_per_step"):
                self.client.log_param(self.run_id, name, run.config[name])
        # One thread: what is told first is written first.
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self.last: Future[None] | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # MLflow takes no `@` in a name.
        metrics = [
            Metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()
        ]
        if self.last is not None and self.last.done():
            self.last.result()  # raises what the server answered
        for begin in range(0, len(metrics), MOST_AT_ONCE):
            self.last = self.writer.submit(
                self.client.log_batch, self.run_id, metrics[begin : begin + MOST_AT_ONCE]
            )

    def close(self, status: str) -> None:
        ended = {"finished": "FINISHED", "cancelled": "KILLED", "paused": "SCHEDULED"}
        last = self.writer.submit(
            self.client.set_terminated, self.run_id, ended.get(status, "FAILED")
        )
        self.writer.shutdown(wait=False)
        last.result(CLOSING_SECONDS)
