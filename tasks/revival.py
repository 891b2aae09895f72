"""What the new processes of a mesh have to know before they take the place of the old."""

from __future__ import annotations

import logging

from forge_core.actors.messages import LoadReply
from forge_core.mesh import Mesh, MeshCall
from tasks.collect import known_batches, logged_batches
from tasks.critic import restore_critic, teach_critic
from tasks.estimates import with_estimates
from tasks.learn import check_parity, published_fact, put_newest, train_request, train_step
from tasks.prepare import restore_from_parent, restore_newest, warm_start_trainer
from tasks.run import ActiveRun
from tasks.turns import turn

logger = logging.getLogger(__name__)


async def prepare(run: ActiveRun, mesh: Mesh) -> None:
    """Bring the new actors of a mesh to where the old ones stood.

    Raises MeshCall if they fail as well, and BoundExceeded if a generator does not agree with the trainer.
    """
    match mesh.unit:
        case "generators":
            async with turn(run, "generators", weights=False):
                await _prepare_generator(run, mesh)
        case "trainer":
            async with turn(run, "trainer"):
                await _prepare_trainer(run)
        case "reference":
            if run.model_directory is not None:
                startup = run.config.timeouts.startup_seconds
                await mesh.call("load", run.model_directory, timeout_seconds=startup)
        case "critic":
            await _prepare_critic(run, mesh)
        case "verifier":
            await mesh.call("prepare", timeout_seconds=run.config.timeouts.startup_seconds)
        case "weights":
            await _fill_weights(run)


async def _prepare_generator(run: ActiveRun, mesh: Mesh) -> None:
    """Load the model, then the newest weights there are."""
    run.loads.pop(run.meshes.generators.index(mesh), None)
    if run.model_directory is None:
        return
    timeout = run.config.timeouts.startup_seconds
    await mesh.call("load", run.model_directory, timeout_seconds=timeout)
    await load_newest(run, mesh)


async def load_newest(run: ActiveRun, mesh: Mesh) -> None:
    """Have a generator load the newest weights there are, until they still are the newest.

    Raises MeshCall if it fails, and BoundExceeded if it does not agree with the trainer.
    """
    replica = run.meshes.generators.index(mesh)
    while (put := run.put) is not None:
        if run.recovery is not None:
            await run.recovery.revive(run.meshes.weights)
        try:
            answers: list[LoadReply] = await mesh.call(
                "load_version",
                put.manifest,
                run.probe,
                timeout_seconds=run.config.timeouts.call_seconds,
            )
        except Exception as error:
            # What was the newest when this began may be forgotten by now.
            if run.put is put:
                raise
            logger.info("%s asks for newer weights, after %r", mesh.name, error)
            continue
        loaded = answers[0]
        run.append(run.intervals(mesh.name, loaded.intervals))
        check_parity(run, published_fact(put, [loaded]))
        run.loads[replica] = loaded
        if run.put is put:
            return


async def _prepare_trainer(run: ActiveRun) -> None:
    """From the newest checkpoint on, train again what the log has beyond it."""
    if run.model_directory is None:
        return
    await run.meshes.trainer.call(
        "load", run.model_directory, timeout_seconds=run.config.timeouts.startup_seconds
    )
    # What it was writing is lost; the next step that is due has a checkpoint again.
    run.writing = None
    ledger = run.ledger
    if ledger.checkpoints:
        await restore_newest(run)
        if run.recovery is not None and run.meshes.opened_critic is not None:
            await run.recovery.revive(run.meshes.critic)
        for batch in known_batches(run):
            await train_step(run, batch)
    elif ledger.forked is not None:
        await restore_from_parent(run)
    elif 0 in ledger.weights:
        await warm_start_trainer(run)
    if run.recovery is not None and run.meshes.opened_weights is not None:
        await run.recovery.revive(run.meshes.weights)
    if run.put is not None and run.put.manifest.store != run.meshes.store_name:
        await put_newest(run, forget=False)


async def _prepare_critic(run: ActiveRun, mesh: Mesh) -> None:
    """From the newest checkpoint on, learn again what the log has beyond it."""
    if run.model_directory is None:
        return
    startup = run.config.timeouts.startup_seconds
    await mesh.call("load", run.model_directory, timeout_seconds=startup)
    if not run.critic_stands:
        return
    ledger = run.ledger
    standing = ledger.checkpoints.keys() - ledger.pruned
    newest = max(step for step in standing if step <= ledger.current_step)
    await restore_critic(run, ledger.checkpoints[newest])
    for batch in logged_batches(run, range(newest + 1, ledger.current_step + 1)):
        await teach_critic(run, await with_estimates(run, train_request(run, batch)))


async def _fill_weights(run: ActiveRun) -> None:
    """Put the trainer's weights in the empty store; one that is being started again does so itself."""
    if run.put is None:
        return
    try:
        await put_newest(run, forget=False)
    except MeshCall:
        if not run.meshes.trainer.has_failed():
            raise
