"""Sound runs without processes, written as controllers would write them: tests plant faults in them.

`finished`, `resumed`, `forked` and `replaying` are four shapes of a run; `MadeRun` has what they are made of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from made_episodes import (
    CONFIG,
    GROUP_SIZE,
    TIED,
    committed,
    draw_of,
    file_of,
    generated,
    stepped,
    table,
    weights,
    weights_digest,
)
from safetensors.numpy import save

from storage import facts, layout
from storage.facts import Interval
from storage.log import RunLog, read_entries, read_incarnations
from storage.objects import LocalStore
from storage.parts import commit_part, write_part
from storage.records import Controller, FileRef
from storage.runs import store_config
from storage.summary import write_run_json
from storage.verify import verify


class MadeRun:
    """A run in a store. Each method logs what a stage would log."""

    def __init__(self, store: LocalStore, run_id: str = "run", **config: Any) -> None:
        self.store = store
        self.run_id = run_id
        self.config = {**CONFIG, **config}
        store_config(store, run_id, self.config)
        self.log = self.claim()

    def claim(self) -> RunLog:
        """Take the run over, as a resumed controller would."""
        controller = Controller.this_process(versions={}, git_commit=None)
        self.log = RunLog.claim(self.store, self.run_id, controller)
        start = self.log.incarnation.controller.claimed_at
        sha256 = hashlib.sha256(self.store.read(layout.config_key(self.run_id))).hexdigest()
        self.log.append(
            facts.Started(
                run_id=self.run_id,
                meshes=("trainer",),
                sources=self._sources(),
                config_sha256=sha256,
            ),
            facts.Intervals(
                mesh="trainer",
                intervals=(Interval(kind="startup", start=start, end=start + 1e-4),),
            ),
        )
        return self.log

    def _sources(self) -> tuple[facts.Source, ...]:
        data = b"def reward(): ..."
        key = layout.source_key(self.run_id, "0" * 64, "own.py")
        self.store.put_if_absent(key, data)
        return (facts.Source(field="reward", reference="own.py:reward", file=file_of(key, data)),)

    def warm_start(self) -> None:
        """Make version 0."""
        digest = weights_digest(0)
        self.log.append(facts.WarmStarted(steps=0, loss=None, weights_digest=digest, seconds=0.0))

    def checkpoint(self, step: int, salt: int = 0) -> None:
        """Write a checkpoint as the trainer does."""
        folder = layout.checkpoint_folder(self.run_id, step)
        files = [
            self._file(f"{folder}model.safetensors", save(weights(step, salt))),
            self._file(f"{folder}config.json", b"{}"),
            self._file(f"{folder}trainer/optimizer.safetensors", save({"m": np.zeros(2)})),
        ]
        told = {
            "run_id": self.run_id,
            "step": step,
            "weights_digest": weights_digest(step, salt),
            "tied": TIED,
            "files": [file.model_dump(mode="json") for file in files],
        }
        files.append(self._file(f"{folder}checkpoint.json", json.dumps(told).encode()))
        self.log.append(
            facts.Checkpoint(
                step=step,
                key=folder,
                weights_digest=weights_digest(step, salt),
                files=tuple(files),
            )
        )

    def _file(self, key: str, data: bytes) -> FileRef:
        self.store.replace(key, data)
        return file_of(key, data)

    def admit(self, number: int, draws: Iterable[int]) -> None:
        """Let draws in."""
        self.log.append(
            facts.Admitted(round=number, draws=tuple(draw_of(self.run_id, each) for each in draws))
        )

    def generate(self, number: int, episodes: pa.Table) -> facts.Generated:
        """Write an unscored part; the fact is not logged."""
        prefix = layout.generated_prefix(self.run_id, f"r{number}")
        return generated(number, write_part(self.store, prefix, episodes), episodes)

    def commit(self, number: int, episodes: pa.Table) -> facts.Committed:
        """Commit a scored part; the fact is not logged."""
        commit = commit_part(self.store, self.run_id, f"round-{number:06d}", episodes)
        return committed(number, commit)

    def round(self, number: int, draws: Sequence[int], episodes: pa.Table | None = None) -> None:
        """Admit, generate and commit, by the weights of version 0 unless episodes are given."""
        self.admit(number, draws)
        made = table(draws, [0, 0], run_id=self.run_id) if episodes is None else episodes
        self.log.append(self.generate(number, made))
        self.log.append(self.commit(number, made))

    def train(
        self,
        step: int,
        group_ids: Sequence[str | int],
        *,
        age: int | None = 0,
        salt: int = 0,
        reward: float | None = None,
    ) -> None:
        """Train on groups, by their ids or the run's own draws."""
        named = tuple(
            each if isinstance(each, str) else layout.group_id(self.run_id, each)
            for each in group_ids
        )
        metrics = {} if reward is None else {"trained_reward": reward}
        self.log.append(stepped(step, named, weights_digest(step, salt), age=age, **metrics))

    def drop(self, draw: int, reason: str, step: int | None = None) -> None:
        """Give a group up."""
        group_ids = (layout.group_id(self.run_id, draw),)
        self.log.append(facts.Dropped(group_ids=group_ids, reason=reason, step=step))

    def restore(self, step: int, salt: int = 0) -> None:
        """Go on from a checkpoint."""
        self.log.append(facts.Restored(step=step, weights_digest=weights_digest(step, salt)))

    def evaluate(
        self,
        name: str,
        version: int,
        *,
        held_out: bool = True,
        greedy: float = 1.05,
        pass_at: dict[int, float] | None = None,
    ) -> None:
        """Evaluate two prompts."""
        episodes = table([0, 1], [version], run_id=self.run_id, evaluation=name, held_out=held_out)
        prefix = layout.evaluation_prefix(self.run_id, name)
        self.log.append(
            facts.Evaluated(
                name=name,
                policy_version=version,
                sampled=0.05,
                greedy=greedy,
                num_prompts=2,
                pass_at=tuple(
                    facts.PassAt(k=k, probability=each) for k, each in (pass_at or {}).items()
                ),
                parts=(write_part(self.store, prefix, episodes),),
            )
        )

    def mesh(self, *intervals: tuple[float, float]) -> None:
        """Log trainer intervals, in seconds after the newest claim."""
        start = self.log.incarnation.controller.claimed_at
        self.log.append(
            facts.Intervals(
                mesh="trainer",
                intervals=tuple(
                    Interval(kind="train", start=start + first, end=start + last)
                    for first, last in intervals
                ),
            )
        )

    def end(self) -> None:
        """Finish, and write the results."""
        self.log.append(facts.End(status="finished", reason=None))
        write_run_json(self.store, self.run_id)

    def problems(self) -> list[tuple[str, str]]:
        """What `verify` finds: kinds and offenders."""
        return [(each.kind, each.offender) for each in verify(self.store, self.run_id).problems]

    def told(self, kind: str) -> str:
        """All sentences of a kind that `verify` says."""
        problems = verify(self.store, self.run_id).problems
        return " | ".join(each.sentence for each in problems if each.kind == kind)

    def part(self, number: int) -> Path:
        """The file of a round's committed part."""
        (key,) = self.store.keys(layout.episodes_prefix(self.run_id, f"round-{number:06d}"))
        return self.store.local_path(key)

    def commit_key(self, number: int) -> str:
        """The commit record of a round."""
        return layout.commit_key(self.run_id, f"round-{number:06d}")

    def edit(self, key: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change a JSON object behind the store's back."""
        content = json.loads(self.store.read(key))
        change(content)
        self.store.replace(key, json.dumps(content).encode())

    def find(self, kind: str, number: int = 0) -> tuple[str, int]:
        """Key of the entry with the run's fact number `number` of a kind, and the fact's place in it."""
        found = [
            (layout.entry_key(self.run_id, entry.incarnation, entry.seq), place)
            for entry in read_entries(self.store, self.run_id)
            for place, fact in enumerate(entry.facts)
            if fact.kind == kind
        ]
        return found[number]

    def edit_fact(self, kind: str, number: int = 0, **values: Any) -> str:
        """Change a fact behind the store's back; the key of its entry."""
        key, place = self.find(kind, number)
        self.edit(key, lambda entry: entry["facts"][place].update(values))
        return key

    def rewrite_log(self, change: Callable[[list[list[Any]]], object]) -> None:
        """Change the newest incarnation's entries, as lists of facts, and number them anew."""
        incarnation = len(read_incarnations(self.store, self.run_id)) - 1
        keys = self.store.keys(layout.entry_prefix(self.run_id, incarnation))
        entries = [json.loads(self.store.read(key)) for key in keys]
        told = [entry["facts"] for entry in entries]
        change(told)
        for seq, new in enumerate(told):
            entry = {**entries[min(seq, len(entries) - 1)], "seq": seq, "facts": new}
            key = layout.entry_key(self.run_id, incarnation, seq)
            self.store.replace(key, json.dumps(entry).encode())
        for seq in range(len(told), len(keys)):
            self.store.local_path(layout.entry_key(self.run_id, incarnation, seq)).unlink()


def finished(
    store: LocalStore,
    run_id: str = "run",
    *,
    cut: Callable[[pa.Table], pa.Table] = lambda t: t,
    end: bool = True,
) -> MadeRun:
    """Two steps in two incarnations.

    Draws 0 and 1 make step 1 at age 0, draws 2 and 3 step 2 at age 1, and draw 4 is dropped.
    """
    run = MadeRun(store, run_id)
    run.warm_start()
    run.checkpoint(0)
    run.evaluate("initial", 0)
    run.round(0, [0, 1], cut(table([0, 1], [0, 0], run_id=run_id)))
    run.train(1, [0, 1], reward=0.55)
    run.checkpoint(1)
    run.claim()
    run.restore(1)
    run.round(1, [2, 3, 4], cut(table([2, 3, 4], [1, 0], run_id=run_id, flat=[4])))
    run.drop(4, "no_signal", step=2)
    run.train(2, [2, 3], age=1)
    run.checkpoint(2)
    run.log.append(facts.Pruned(steps=(1,)))
    for key in store.keys(layout.checkpoint_folder(run_id, 1)):
        store.local_path(key).unlink()
    if end:
        run.end()
    return run


def resumed(store: LocalStore, run_id: str = "run", *, end: bool = True) -> MadeRun:
    """Three steps; after a crash steps 1 and 2 were provisional, and trained again before step 3.

    Advantages of step 3 are a loop's own: draw 5 has none.
    """
    run = MadeRun(store, run_id)
    run.warm_start()
    run.checkpoint(0)
    run.round(0, [0, 1])
    run.train(1, [0, 1])
    run.round(1, [2, 3], table([2, 3], [1, 1], run_id=run_id))
    run.train(2, [2, 3], age=0)
    run.claim()
    run.restore(0)
    run.train(1, [0, 1])
    run.train(2, [2, 3])
    run.round(2, [4, 5], table([4, 5], [2, 2], run_id=run_id))
    group_id = layout.group_id(run_id, 4)
    run.log.append(
        facts.Batched(
            step=3, group_ids=(group_id,), advantages={layout.episode_id(group_id, 0): 0.5}
        ),
        facts.Dropped(group_ids=(layout.group_id(run_id, 5),), reason="no_signal", step=3),
    )
    run.train(3, [4])
    run.checkpoint(3)
    if end:
        run.end()
    return run


def forked(
    store: LocalStore, parent: MadeRun, run_id: str = "fork", *, end: bool = True
) -> MadeRun:
    """One step more after step 2 of `finished`."""
    run = MadeRun(store, run_id, parent_run_id=parent.run_id, parent_step=2)
    run.log.append(
        facts.Forked(
            parent_run_id=parent.run_id,
            parent_step=2,
            step=2,
            checkpoint=layout.checkpoint_folder(parent.run_id, 2),
            weights_digest=weights_digest(2),
        )
    )
    run.checkpoint(2)
    run.round(0, [0, 1], table([0, 1], [2, 2], run_id=run_id))
    run.train(3, [0, 1])
    run.checkpoint(3)
    if end:
        run.end()
    return run


def replaying(
    store: LocalStore, other: MadeRun, run_id: str = "replay", *, end: bool = True
) -> MadeRun:
    """Two epochs over the groups of the first round of `finished`."""
    section = {"runs": [other.run_id], "scores": "run", "epochs": 2}
    run = MadeRun(store, run_id, replay=section)
    run.warm_start()
    run.checkpoint(0)
    run.log.append(
        facts.Replayed(
            run_id=other.run_id,
            commit=other.commit_key(0),
            draws=(draw_of(other.run_id, 0), draw_of(other.run_id, 1)),
            group_size=GROUP_SIZE,
            score_set="run",
        )
    )
    groups = [layout.group_id(other.run_id, draw) for draw in (0, 1)]
    run.train(1, groups, age=None)
    run.train(2, groups, age=None)
    run.checkpoint(2)
    if end:
        run.end()
    return run
