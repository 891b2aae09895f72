"""`run()`: a run from Python, as `forgeflow run` is from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flows.preflight import preflight
from flows.s3_block import use_s3_block
from flows.terminal import DEFAULT_STORE
from forge_core.settings import load_config
from forge_core.user_code import reference_to

if TYPE_CHECKING:
    from flows.loop import LoopFunction

_has_run = False


class RunFailed(RuntimeError):
    """A run that did not finish; its cause is `__cause__`, and its store has what it did until then."""


def run(
    *,
    preset: str | None = None,
    config: str | None = None,
    regime: str | None = None,
    environment: str | type | None = None,
    reward: str | Callable[..., Any] | None = None,
    loss: str | Callable[..., Any] | None = None,
    generate_episode: str | Callable[..., Any] | None = None,
    loop: LoopFunction | None = None,
    overrides: Sequence[str] = (),
    store: str = DEFAULT_STORE,
    run_id: str | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Post-train a model and return what run.json holds. One run per process.

    Functions and classes are given as they are, or by reference; other processes import them from their file, so they
    are defined at its top level and the file runs nothing when it is imported.

    Args:
        preset: name of a config that comes with the package.
        config: TOML, JSON or YAML file over it.
        regime: `sync`, `async` or `hybrid`.
        environment: a task of reasoning-gym by its name, or a class of your own.
        reward: `(prompts, completions, **columns) -> list[float]`, in the stead of the environment's own scorer.
        loss: `(logprobs, sampled_logprobs, advantages, mask) -> loss per token`, in the algorithm's stead.
        generate_episode: `async (policy, prompt_text, *, seed) -> Episode`.
        loop: `async (Loop) -> None`, in the regime's stead; needs regime sync.
        overrides: further `dotted.key=value`.
        store: URI of the store that keeps the run.
        run_id: its name; made up if not given.
        verbose: log more, to the error stream.

    Raises ValueError for input that is refused, before anything is started, and RunFailed if the run does not finish.
    """
    given = {
        "regime": regime,
        "environment.name": environment,
        "reward": reward,
        "loss": loss,
        "generate_episode": generate_episode,
    }
    chosen = [
        f"{field}={value if isinstance(value, str) else reference_to(field, value)}"
        for field, value in given.items()
        if value is not None
    ]
    resolved = load_config(preset=preset, file=config, overrides=[*chosen, *overrides])
    if loop is not None:
        reference_to("loop", loop)
        if resolved.buffer.policy != "once":
            raise ValueError(
                f"buffer.policy {resolved.buffer.policy!r} chooses what is trained on, and so does loop: leave out one"
            )
        if resolved.regime != "sync":
            raise ValueError(
                f"regime {resolved.regime!r} has a loop of its own: leave out loop, or take sync"
            )
    use_s3_block(store)
    preflight(resolved, store, run_id=run_id)
    _claim_process()
    # Deferred: it brings Prefect, which takes seconds to import.
    from flows.launch import launch

    outcome = launch(
        resolved, store_uri=store, run_id=run_id, json_output=False, verbose=verbose, loop=loop
    )
    if outcome.failure is not None:
        name = outcome.summary["run_id"]
        failure = outcome.failure
        raise RunFailed(f"run {name}: {type(failure).__name__}: {failure}") from failure
    return outcome.summary


def _claim_process() -> None:
    """Prefect and Monarch take settings from the environment once per process, those of the first run."""
    global _has_run
    if _has_run:
        raise RuntimeError("one run per process: start another process for the next run")
    _has_run = True
