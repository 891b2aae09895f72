"""From a checked experiment to an exit code, as `flows.launch` does for a run."""

from __future__ import annotations

import json

from rich.console import Console

from flows.decision import decision_sentence
from flows.ephemeral import surroundings
from flows.launch import drive, explain, new_run_id, output_to
from flows.terminal import FAILED
from forge_core.config import RunConfig
from forge_core.config.promotion import PromotionConfig
from storage.objects import open_store
from storage.promotions import Decision, candidate_run
from storage.workspace import keep_folder, open_folder


def launch_experiment(
    config: RunConfig,
    promotion: PromotionConfig,
    *,
    store_uri: str,
    experiment_id: str | None,
    json_output: bool,
    verbose: bool,
) -> int:
    """Carry an experiment out and say what was decided; the exit code is 0 once there is a decision, either way.

    What its processes print goes to `output.log` in the folder of the run that makes its checkpoint.
    """
    store = open_store(store_uri)
    experiment_id = experiment_id or new_run_id()
    candidate = candidate_run(experiment_id)
    folder, output = open_folder(store, candidate)
    decisions: list[Decision] = []

    async def main() -> None:
        # Deferred: Prefect reads its settings from the environment when it is imported.
        from flows.experiment import experiment

        decisions.append(await experiment(config, store_uri, experiment_id, promotion))

    with output_to(output, aside=verbose) as (out, err):
        console = Console(file=err if json_output else out, highlight=False, soft_wrap=True)
        with surroundings() as workdir:
            console.print(f"experiment {experiment_id}: its checkpoint is made by run {candidate}")
            failure = drive(main, config.steps, console, workdir)
        if failure is not None:
            go_on = f"experiment --experiment-id {experiment_id}"
            explain(failure, f"experiment {experiment_id}", go_on, store_uri, folder, console)
        if json_output:
            document = (
                decisions[0].model_dump(mode="json")
                if decisions
                else {"experiment_id": experiment_id, "reason": str(failure)}
            )
            json.dump(document, out, indent=2, ensure_ascii=False)
            out.write("\n")
        elif decisions:
            console.print(decision_sentence(decisions[0]), markup=False)
            console.print(f"next: forgeflow promoted {promotion.line} --store {store_uri}")
    keep_folder(store, candidate, folder)
    return 0 if failure is None else FAILED
