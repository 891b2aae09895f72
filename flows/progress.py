"""Live progress of a run, told by its facts."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from storage import facts

_PLAIN_EVERY = 10

# What a fact being true means is now under way.
_NEXT_STAGE = {
    "started": "load model",
    "warm_started": "publish",
    "admitted": "generate",
    "generated": "score",
    "committed": "buffer",
    "batched": "train",
    "step": "publish",
    "published": "generate",
    "checkpoint": "generate",
    "evaluated": "generate",
}


class LiveProgress:
    """A bar on a terminal; a line now and then elsewhere.

    Example:
        with LiveProgress(console, steps=100) as progress, listening(progress):
            await post_train(...)
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._is_live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("reward {task.fields[reward]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._is_live,
        )
        self._task = self._progress.add_task("start", total=steps, reward="-", speed="-")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, fact: facts.Fact) -> None:
        """Show what a fact changes."""
        if fact.kind in _NEXT_STAGE:
            self._progress.update(self._task, description=_NEXT_STAGE[fact.kind])
        if isinstance(fact, facts.Step):
            self._show_step(fact)
        elif isinstance(fact, facts.WarmStarted) and fact.steps:
            loss = "" if fact.loss is None else f", loss {fact.loss:.3f} nats per token"
            self._line(f"warm start: {fact.steps} steps in {fact.seconds:.0f} s{loss}")
        elif isinstance(fact, facts.Evaluated):
            self._line(
                f"evaluation {fact.name}: sampled {fact.sampled:.3f}, greedy {fact.greedy:.3f} "
                f"on {fact.num_prompts} held-out prompts"
            )
        elif isinstance(fact, facts.Retry):
            self._line(f"retry of {fact.stage} (attempt {fact.attempt}): {fact.cause[:200]}")
        elif isinstance(fact, facts.Failed):
            then = "serves again after" if fact.started_at else "was not back when the run ended,"
            self._line(f"{fact.mesh} failed and {then} {fact.seconds:.1f} s: {fact.cause[:200]}")

    def _show_step(self, fact: facts.Step) -> None:
        reward = fact.metrics.get("reward")
        speed = fact.metrics.get("generate/tokens_per_second")
        shown = {
            "reward": "-" if reward is None else f"{reward:.3f}",
            "speed": "-" if speed is None else f"{speed:,.0f}",
        }
        self._progress.update(self._task, completed=fact.step, **shown)  # type: ignore[arg-type]
        if not self._is_live and (fact.step % _PLAIN_EVERY == 0 or fact.step == self._steps):
            self._line(
                f"step {fact.step} of {self._steps}: reward {shown['reward']}, {shown['speed']} tok/s"
            )

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
