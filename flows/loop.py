"""What a loop of the user's is made of: the same stages as the regimes, with the choice of what to learn left open."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from forge_core.config import RunConfig
from storage import facts
from storage.parts import read_committed
from storage.records import Commit, read_record
from tasks.checkpoints import checkpoint, is_checkpoint_due
from tasks.collect import batch, generate, score
from tasks.evaluation import evaluate
from tasks.learn import publish, train
from tasks.references import Round, Scored
from tasks.refill import spare_round_to_batch
from tasks.run import ActiveRun


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredEpisode:
    """One sample and its reward."""

    episode_id: str
    """What `Loop.train` knows it by."""
    group_id: str
    """The same for all samples of one draw of a prompt."""
    prompt: str
    """The prompt as rendered."""
    answer: str
    """The reference answer."""
    response: str
    """What the policy wrote."""
    reward: float
    """Its reward."""


class Loop:
    """The steps of a run that a function of the user's drives.

    When a run that broke off goes on, the function is called anew and answered from the log for the steps that it has:
    it is to do the same again when it is told the same.

    Example:
        async def loop(run):
            for _ in range(run.config.steps):
                episodes = await run.collect()
                await run.train({e.episode_id: e.reward for e in episodes})
                await run.publish()
    """

    def __init__(self, run: ActiveRun) -> None:
        self._run = run
        self._scored: Scored | None = None
        self._known = run.ledger.current_step
        """Last step that the log answers."""
        self.step = run.ledger.base_step
        """Steps that were trained."""
        self.policy_version = run.ledger.base_step
        """Version that the generators serve."""

    @property
    def config(self) -> RunConfig:
        """The run's config."""
        return self._run.config

    async def collect(self) -> list[ScoredEpisode]:
        """Sample `group_size` answers to each of the next `groups_per_step` prompts, score and commit them.

        Raises RuntimeError if what was collected before is not trained on yet, or the weights are too old by now.
        """
        if self._scored is not None:
            raise RuntimeError("collect() was called twice: train on what it gave first")
        age, bound = self.step - self.policy_version, self.config.max_policy_age
        if age > bound:
            raise RuntimeError(
                f"collect() would sample from weights {age} steps old, above max_policy_age {bound}: publish() first"
            )
        step = self.step + 1
        ledger = self._run.ledger
        collected = Round(number=step, first_step=step, last_step=step)
        if step <= self._known:
            if spare := ledger.spare.get(step):
                # What was collected first was not finite, and dropped.
                collected = collected.model_copy(update={"number": spare[-1].round})
            self._scored = Scored(round=collected, tokens_per_second=0.0)
        else:
            if ledger.nonfinite[step]:
                collected = spare_round_to_batch(self._run, step)
            self._scored = await score(await generate(collected))
        return self._episodes(collected)

    def _episodes(self, collected: Round) -> list[ScoredEpisode]:
        run = self._run
        commits = [
            read_record(run.store, fact.commit, Commit)
            for fact in run.ledger.committed_in.get(collected.number, ())
        ]
        names = [*ScoredEpisode.__dataclass_fields__]
        table = read_committed(run.store, run.run_id, columns=names, commits=commits)
        rows = sorted(table.to_pylist(), key=lambda row: row["episode_id"])
        return [ScoredEpisode(**row) for row in rows]

    async def train(self, advantages: Mapping[str, float]) -> dict[str, float]:
        """Train one step on what was collected; its metrics.

        `advantages` are by episode id, 0 for those that are left out. A group in which all are 0 is dropped as
        `no_signal`. With a loss or gradient that is not finite all groups are dropped and nothing is learned; the
        metrics are then `{"nonfinite": 1.0}`, and collect() draws others for the step. Raises RuntimeError if nothing
        was collected, ValueError for an id that was not, or a number that is not finite.
        """
        if self._scored is None:
            raise RuntimeError("train() follows collect()")
        step = self._scored.round.last_step
        if step > self._known:
            await train((await batch(self._scored, dict(advantages)),))
        self._scored = None
        if self._run.ledger.current_step < step:
            return {"nonfinite": 1.0}
        self.step = step
        return dict(self._run.ledger.steps[step].metrics)

    async def publish(self) -> None:
        """Give the generators the weights as they are, and keep a checkpoint if one is due."""
        # A run that goes on has published the last step that its log knows, and no older one is asked for any more.
        if self.step <= self._known:
            self.policy_version = self.step
            return
        await publish(self.step)
        self.policy_version = self.step
        if is_checkpoint_due(self._run, self.step):
            await checkpoint(self.step)

    async def evaluate(self) -> float:
        """Mean score on held-out prompts of the weights that were published last, sampled as in training."""
        name = f"step-{self.policy_version:06d}"
        await evaluate(name, policy_version=self.policy_version)
        return self._run.ledger.evaluated[name].sampled


LoopFunction = Callable[[Loop], Awaitable[None]]

own_loop: ContextVar[LoopFunction | None] = ContextVar("forgeflow_own_loop", default=None)
"""The function that takes the regime's place."""


def chosen_loop() -> LoopFunction | None:
    """The function that takes the regime's place, if there is one.

    A function, for Prefect pickles a flow that it serves with all that its module names, which a context variable
    does not survive.
    """
    return own_loop.get()


async def drive(run: ActiveRun, function: LoopFunction) -> None:
    """Let the function run, drop what it collected and did not train on, and publish what it trained last."""
    loop = Loop(run)
    await function(loop)
    if run.ledger.pending:
        run.append(
            facts.Dropped(group_ids=tuple(run.ledger.pending), reason="end_of_run", step=None)
        )
    if loop.policy_version != loop.step:
        await loop.publish()
