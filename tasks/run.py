"""The run that the current flow holds: its config, its log and its meshes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from forge_core.actors.messages import CheckpointReply, LoadReply, PublishReply
from forge_core.buffers.mixture import ReplayBuffer
from forge_core.config import RunConfig
from forge_core.environments import Environment, load_environment
from forge_core.levels import Levels
from forge_core.mesh import Mesh
from forge_core.meshes import Meshes, open_meshes
from forge_core.placement.roles import mesh_names, roles_of
from forge_core.services.metrics import ReplicaSnapshot
from forge_core.settings import stored_config
from forge_core.timeline import Interval
from forge_core.weights.manifest import Manifest
from storage import facts, layout
from storage.ledger import Ledger
from storage.log import Fenced, RunLog, read_entries, read_incarnations
from storage.objects import ObjectStore, open_store
from storage.records import Controller, FileRef
from storage.runs import store_config
from storage.summary import write_run_json
from storage.workspace import local_folder
from tasks.ending import Ending
from tasks.interrupts import cancelled_by
from tasks.provenance import git_commit, versions
from tasks.recovery import Recovery, guarded
from tasks.sinks import SinkListener, open_sinks
from tasks.sources import keep_sources
from tasks.turns import Turns

logger = logging.getLogger(__name__)

Listener = Callable[[facts.Fact], None]


@dataclass(kw_only=True)
class ActiveRun:
    """One controller's hold on a run while its flow lives."""

    run_id: str
    """The run."""
    config: RunConfig
    """Its stored config."""
    store_uri: str
    """Where it is kept."""
    store: ObjectStore
    """The same, opened."""
    log: RunLog
    """What makes things true."""
    ledger: Ledger
    """The log so far, folded."""
    meshes: Meshes
    """The run's processes."""
    environment: Environment
    """Draws prompts; scoring happens in the verifier."""
    listeners: tuple[Listener, ...] = ()
    """Told of every fact once it is true."""
    folder: Path
    """Local folder for what libraries write themselves, such as the tiny model."""
    probe: tuple[tuple[int, ...], ...] = ()
    """Token ids that trainer and generators score at each publish."""
    kept_step: int = 0
    """Step of the newest checkpoint that was begun."""
    kept_at: float = field(default_factory=time.monotonic)
    """When it was begun, on the monotonic clock."""
    writing: CheckpointReply | None = None
    """The checkpoint that is being written, if one is."""
    writing_critic: tuple[FileRef, ...] = ()
    """The critic's part of it, which is written."""
    critic_stands: bool = False
    """Whether the critic, if there is one, has weights."""
    tokens_per_second: dict[int, float] = field(default_factory=dict)
    """By round, how fast it was generated, until its batch is chosen."""
    paused: str | None = None
    """Why the run ends for now with steps left, once there is nothing to do for it; None: it ends finished."""
    pipeline: object = None
    """What stages that run at the same time share; theirs alone."""
    model_directory: str | None = None
    """Hugging Face directory that meshes load, once it is known."""
    put: PublishReply | None = None
    """The newest weights that generators can fetch."""
    replaced: list[Manifest] = field(default_factory=list)
    """Versions that are put and not yet forgotten, of which nobody will ask for any but the newest."""
    loads: dict[int, LoadReply] = field(default_factory=dict)
    """By replica, the weights that it loaded last."""
    buffer: ReplayBuffer | None = None
    """What may be trained on again, as it stands after the step that was batched last; None until it is asked for."""
    levels: Levels = field(default_factory=Levels)
    """How far the tasks have come in their curricula, by the commits that were looked at."""
    recovery: Recovery | None = None
    """What brings meshes back that fail."""
    turns: Turns | None = None
    """Whose turn it is, where generators and trainer are colocated."""
    ending: Ending = field(default_factory=lambda: Ending(0.0))
    """Whether a signal has asked it to end, and whether the trainer stands between two steps."""
    scorings_lost: Counter[str] = field(default_factory=Counter)
    """By part, how often the verifier failed while it scored it."""
    replicas_told_at: float = field(default_factory=time.monotonic)
    """When the log was last told what each mesh did, on the monotonic clock."""

    @property
    def continued_by(self) -> str:
        """The command that goes on with it once it has ended."""
        return f"`forgeflow resume {self.run_id}`"

    async def prepare(self, mesh: Mesh) -> None:
        """Bring the new actors of a mesh to where the old ones stood. Raises as `tasks.revival.prepare` does."""
        # Here, for it is made of the stages that need this module.
        from tasks.revival import prepare

        await prepare(self, mesh)

    def append(self, *new: facts.Fact) -> None:
        """Make facts true, then tell the listeners. Raises Fenced if another controller took the run over."""
        self.settle()
        self._take(self.log.append(*new))

    def settle(self) -> None:
        """Take in an entry that was written although its writing failed, before anything is decided by the ledger."""
        if (settled := self.log.settle()) is not None:
            self._take(settled)

    def _take(self, entry: facts.Entry) -> None:
        self.ledger.add(entry)
        for fact in entry.facts:
            for listener in self.listeners:
                try:
                    listener(fact)
                except (Exception, SystemExit) as error:
                    # The fact is true whoever could not be told; rich raises SystemExit on a closed pipe.
                    logger.warning("a listener failed on %s: %s", fact.kind, error)

    def intervals(self, mesh: str, intervals: Iterable[Interval]) -> facts.Intervals:
        """The fact that tells a mesh's intervals."""
        return facts.Intervals(
            mesh=mesh,
            intervals=tuple(
                facts.Interval(kind=i.kind, start=i.start, end=i.end) for i in intervals
            ),
        )

    async def drain_intervals(self) -> None:
        """Log what every mesh did since it last told."""
        timeout = self.config.timeouts.call_seconds
        told = []
        for mesh in self.meshes.all:
            if mesh.has_failed():  # it is being started again, for a run that needs it no more
                continue
            answers = await mesh.call("intervals", timeout_seconds=timeout)
            told.append(self.intervals(mesh.name, answers[0]))
        self.append(*told, *self.replicas())

    def replicas(self, *, every_seconds: float = 0.0) -> list[facts.Replica]:
        """The facts that tell what each mesh did so far; none if they were told less than `every_seconds` ago."""
        if time.monotonic() - self.replicas_told_at < every_seconds:
            return []
        self.replicas_told_at = time.monotonic()
        return [replica_fact(mesh.snapshot()) for mesh in self.meshes.all]


def replica_fact(did: ReplicaSnapshot) -> facts.Replica:
    """What a mesh did, for the log."""
    shared = facts.Replica.model_fields.keys() - {"kind", "mesh"}
    return facts.Replica(mesh=did.name, **{name: getattr(did, name) for name in shared})


_current: ContextVar[ActiveRun] = ContextVar("forgeflow_run")
_more_code: ContextVar[dict[str, str]] = ContextVar("forgeflow_more_code", default={})  # noqa: B039
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("forgeflow_listeners", default=())


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """Have the runs that are opened inside tell every fact to `listeners`."""
    token = _listeners.set((*_listeners.get(), *listeners))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def relying_on(references: Mapping[str, str]) -> Iterator[None]:
    """Have the runs that are opened inside keep further code of the user's, by what it is."""
    token = _more_code.set(dict(references))
    try:
        yield
    finally:
        _more_code.reset(token)


def current() -> ActiveRun:
    """The run of the flow that is running; LookupError outside one."""
    return _current.get()


@asynccontextmanager
async def open_run(config: RunConfig, store_uri: str, run_id: str) -> AsyncIterator[ActiveRun]:
    """Claim a run, open its meshes, and log how it ended, whatever happened.

    A run that has begun is taken over from whoever holds it, and goes on where its log ends. The config is stored
    first. Raises ValueError if the run exists with another config, and Fenced once another controller has taken over.
    """
    store = open_store(store_uri)
    config = _stored(config, store, run_id)
    log = RunLog.claim(
        store, run_id, Controller.this_process(versions=versions(), git_commit=git_commit())
    )
    ledger = Ledger.fold(read_entries(store, run_id), read_incarnations(store, run_id))
    claimed_at = log.incarnation.controller.claimed_at
    ending = Ending(config.shutdown.grace_seconds)
    try:
        sources = keep_sources(store, run_id, {**config.user_code(), **_more_code.get()})
        async with (
            cancelled_by(signal.SIGTERM, first=ending.let_step_end),
            _scratch_folder() as scratch,
            _told_to_sinks(config, run_id, local_folder(store, run_id)) as sinks,
            open_meshes(config, store_uri, scratch, claimed_at, roles_of(config)) as meshes,
        ):
            run = ActiveRun(
                run_id=run_id,
                config=config,
                store_uri=store_uri,
                store=store,
                log=log,
                ledger=ledger,
                meshes=meshes,
                environment=load_environment(config.environment, config.seed),
                listeners=(*_listeners.get(), sinks),
                folder=local_folder(store, run_id),
                ending=ending,
            )
            if config.placement == "colocated" and {"generators", "trainer"} <= roles_of(config):
                # Here, for it is made of the stages that need this module.
                from tasks.revival import load_newest

                run.turns = Turns(run, load_newest)
            _tell_start(run, mesh_names(config), sources)
            token = _current.set(run)
            try:
                try:
                    async with guarded(run):
                        yield run
                except asyncio.CancelledError:
                    await _keep_state(run)
                    raise
                await run.drain_intervals()
                status: facts.Status = "finished" if run.paused is None else "paused"
                run.append(facts.End(status=status, reason=run.paused))
            finally:
                _current.reset(token)
    except Fenced:
        raise
    except BaseException as error:
        _tell_end(store, run_id, log, error)
        raise
    write_run_json(store, run_id)


async def _keep_state(run: ActiveRun) -> None:
    """After a SIGTERM, keep what was trained since the last checkpoint, as far as the grace allows."""
    if not run.ending.may_keep_state or not run.config.trains or run.turns is not None:
        return
    # Here, for it is made of the stages that need this module.
    from tasks.checkpoints import keep

    try:
        async with asyncio.timeout(run.ending.seconds_left):
            await keep(run, run.ledger.current_step)
    except Exception as error:
        # It ends anyway, and what is not kept is trained again.
        logger.warning("no checkpoint was kept before the end: %s: %s", type(error).__name__, error)


def _stored(config: RunConfig, store: ObjectStore, run_id: str) -> RunConfig:
    """The config that the run has from now on: the stored one, which must be the same.

    Raises ValueError, naming the keys that differ, if it is another.
    """
    try:
        store_config(store, run_id, config.model_dump(mode="json"))
    except ValueError:
        # An older version of this code may have stored it, with fewer keys.
        if stored_config(store, run_id) != config:
            raise
    return stored_config(store, run_id)


def _tell_start(run: ActiveRun, meshes: tuple[str, ...], sources: tuple[facts.Source, ...]) -> None:
    """The first facts of an incarnation, one of them if code of the user's is not what it was."""
    new: list[facts.Fact] = [
        facts.Started(
            run_id=run.run_id,
            meshes=meshes,
            sources=sources,
            config_sha256=hashlib.sha256(run.store.read(layout.config_key(run.run_id))).hexdigest(),
        )
    ]
    before = {source.field: source.file.sha256 for source in run.ledger.sources}
    changed = [s for s in sources if before.get(s.field, s.file.sha256) != s.file.sha256]
    if changed:
        named = ", ".join(f"{source.field} ({source.reference})" for source in changed)
        logger.warning("run %s goes on with changed code: %s", run.run_id, named)
        new.append(facts.Diverged(step=None, reason=f"changed code: {named}"))
    run.append(*new)


def _tell_end(store: ObjectStore, run_id: str, log: RunLog, error: BaseException) -> None:
    """Log that the run broke off and why, as far as that can be told."""
    status = "failed" if isinstance(error, Exception) else "cancelled"
    # What cannot be told any more must not hide why: the store may be what failed, or another may hold the run.
    with contextlib.suppress(OSError, Fenced):
        # Read anew: what broke off may have been the writing or the noting of an entry.
        log.settle()
        ledger = Ledger.fold(read_entries(store, run_id), read_incarnations(store, run_id))
        if ledger.status == "running":
            log.append(facts.End(status=status, reason=f"{type(error).__name__}: {error}"[:2000]))
        write_run_json(store, run_id)


@asynccontextmanager
async def _told_to_sinks(
    config: RunConfig, run_id: str, folder: Path
) -> AsyncIterator[SinkListener]:
    """As `open_sinks`, beside contexts that are asynchronous."""
    with open_sinks(config, run_id, folder) as sinks:
        yield sinks


@asynccontextmanager
async def _scratch_folder() -> AsyncIterator[Path]:
    """A local folder for what lives only as long as the meshes, such as rendezvous files."""
    with tempfile.TemporaryDirectory(prefix="forgeflow-meshes-") as folder:
        yield Path(folder)
