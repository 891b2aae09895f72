"""The part of `verify` that recounts evaluations from their scored episodes."""

from collections.abc import Iterator
from math import comb

import numpy as np
import pyarrow as pa

from storage import layout
from storage.episodes import policy_version_bounds, reward_mean
from storage.facts import Evaluated
from storage.groups import Problem
from storage.ledger import Ledger
from storage.verify_groups import is_close

_RIGHT_ABOVE = 0.5


def evaluation_problems(
    run_id: str, ledger: Ledger, fact: Evaluated, table: pa.Table
) -> Iterator[Problem]:
    """Means, prompts and versions are as logged, and no prompt was drawn for training."""
    name = f"evaluation {fact.name}"
    yield from _whole(run_id, fact, table)
    samples = table["sample"].to_numpy()
    for what, said, is_meant, due in (
        ("sampled", fact.sampled, samples < fact.num_samples, fact.num_samples * fact.num_prompts),
        ("greedy", fact.greedy, samples == fact.num_samples, fact.num_prompts),
    ):
        chosen = table.filter(pa.array(is_meant))
        if chosen.num_rows != due:
            sentence = (
                f"{name} has {chosen.num_rows} {what} episodes for {fact.num_prompts} prompts"
            )
            yield Problem("evaluation", name, sentence)
        elif chosen.num_rows and not is_close(said, reward_mean(chosen)):
            sentence = (
                f"{name} was logged as {said} {what}; its episodes give {reward_mean(chosen)}"
            )
            yield Problem("evaluation", name, sentence)
    yield from _passed(fact, table.filter(pa.array(samples < fact.num_samples)))
    oldest, newest = policy_version_bounds(table)
    versions = np.unique(np.concatenate([oldest, newest])).tolist()
    if versions != [fact.policy_version]:
        sentence = f"{name} is logged for policy version {fact.policy_version}; its tokens are of {versions}"
        yield Problem("evaluation", name, sentence)
    drawn = {group.draw.prompt_id for group in ledger.groups.values() if group.draw}
    for prompt_id in sorted(drawn & set(table["prompt_id"].to_pylist())):
        sentence = f"prompt {prompt_id} of {name} was drawn for training as well"
        yield Problem("held_out", prompt_id, sentence)


def _passed(fact: Evaluated, sampled: pa.Table) -> Iterator[Problem]:
    """pass@k is as logged: one less the share of k samples among which none is right."""
    _, of = np.unique(np.asarray(sampled["group_id"]), return_inverse=True)
    wrong = np.bincount(of, sampled["reward"].to_numpy() <= _RIGHT_ABOVE).astype(int).tolist()
    for k, said in ((each.k, each.probability) for each in fact.pass_at):
        ways = comb(fact.num_samples, k)
        passed = 1.0 - sum(comb(each, k) for each in wrong) / (ways * len(wrong)) if ways else 0.0
        if not is_close(said, passed):
            name = f"evaluation {fact.name}"
            sentence = f"{name} was logged with pass@{k} {said}; its episodes give {passed}"
            yield Problem("evaluation", name, sentence)


def evaluate_only_problems(ledger: Ledger) -> Iterator[Problem]:
    """A run that only evaluates answers with the weights that it began with, and draws and trains on nothing."""
    if ledger.status == "finished" and not ledger.evaluated:
        yield Problem(
            "evaluation", "final", "the run only evaluates, and finished without doing so"
        )
    for name, fact in ledger.evaluated.items():
        if fact.policy_version != ledger.base_step:
            sentence = f"evaluation {name} is of version {fact.policy_version}, and the run of {ledger.base_step}"
            yield Problem("evaluation", name, sentence)
    for step in sorted(ledger.steps.keys() | ledger.batches.keys()):
        yield Problem(
            "evaluation", f"step {step}", f"step {step} was trained by a run that evaluates"
        )
    for group_id in ledger.groups:
        yield Problem("evaluation", group_id, f"group {group_id} was drawn by a run that evaluates")


def _whole(run_id: str, fact: Evaluated, table: pa.Table) -> Iterator[Problem]:
    """Every prompt has all samples, under its own name."""
    name = f"evaluation {fact.name}"
    columns = table.select(["run_id", "group_id", "draw", "sample", "episode_id"]).to_pylist()
    samples: dict[int, list[int]] = {}
    for row in columns:
        samples.setdefault(row["draw"], []).append(row["sample"])
        group_id = layout.group_id(f"{run_id}-{fact.name}", row["draw"])
        if (row["run_id"], row["group_id"], row["episode_id"]) != (
            run_id,
            group_id,
            layout.episode_id(group_id, row["sample"]),
        ):
            sentence = f"episode {row['episode_id']} is not of {name} of run {run_id}"
            yield Problem("episode", row["episode_id"], sentence)
    due = list(range(fact.num_samples + 1))
    for draw in sorted(samples.keys() | set(range(fact.num_prompts))):
        found = sorted(samples.get(draw, []))
        if found != due or draw >= fact.num_prompts:
            sentence = f"prompt {draw} of {name} has samples {found} where {due} are due"
            yield Problem("evaluation", name, sentence)
