"""Serves the flow to Prefect, as a person does who starts runs from its UI."""

from __future__ import annotations

import os

# Read by Prefect when it is imported.
os.environ["PREFECT_RUNNER_POLL_FREQUENCY"] = "1"

from flows.post_train import post_train

if __name__ == "__main__":
    post_train.serve(name="retried")
