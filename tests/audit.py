"""An audit of a run that shares nothing with Forgeflow but the names of files: bare pyarrow, JSON and hashes.

It derives again, from the files alone, which entries of the log count, and what they add up to: that each draw was
trained on exactly once or dropped with a reason, that nothing committed was generated again, that ages keep their
bound, that steps follow each other, and that all parts and checkpoints have the bytes they were written with.

    python tests/audit.py forge-store RUN
    audit("forge-store", "r1")
    audit(fsspec.filesystem("s3"), "r1", root="bucket/forge")
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq


class FileSystem(Protocol):
    """What is asked of a filesystem of fsspec."""

    def find(self, path: str) -> list[str]:
        """Paths of all files below a path."""

    def cat_file(self, path: str) -> bytes:
        """The bytes of a file."""


def audit(store: str | Path | FileSystem, run_id: str, *, root: str = "") -> dict[str, Any]:
    """What a run adds up to. Raises AssertionError, in words, for the first thing that is wrong.

    A run that has not finished may have draws pending.
    """
    files = _Files(store, root)
    state = _Run(files, run_id)
    for incarnation, facts in _counting(files, run_id):
        if incarnation != state.incarnation:
            state.incarnation, state.status = incarnation, "running"
        for fact in facts:
            state.facts += 1
            state.take(fact)
    state.close()
    return state.told()


def check(holds: bool, words: str) -> None:
    if not holds:
        raise AssertionError(words)


class _Files:
    """The files of a store by their keys, whatever holds them."""

    def __init__(self, store: str | Path | FileSystem, root: str) -> None:
        self.store, self.root = store, root.strip("/")
        self.bytes = 0
        self._listed: dict[str, list[str]] = {}

    def under(self, folder: str) -> list[str]:
        """Sorted keys in a folder; hidden files are unfinished writes."""
        if folder not in self._listed:
            self._listed[folder] = self._list(folder)
        return self._listed[folder]

    def _list(self, folder: str) -> list[str]:
        if isinstance(self.store, str | Path):
            base = Path(self.store)
            found = [p.relative_to(base).as_posix() for p in (base / folder).rglob("*")]
            found = [key for key in found if (base / key).is_file()]
        else:
            paths = [path.strip("/") for path in self.store.find(f"{self.root}/{folder}")]
            found = [path.removeprefix(f"{self.root}/") for path in paths]
        return sorted(key for key in found if not key.rpartition("/")[2].startswith("."))

    def read(self, key: str) -> bytes:
        try:
            if isinstance(self.store, str | Path):
                data = (Path(self.store) / key).read_bytes()
            else:
                data = self.store.cat_file(f"{self.root}/{key}")
        except FileNotFoundError:
            raise AssertionError(f"{key} is gone") from None
        self.bytes += len(data)
        return data

    def json(self, key: str) -> dict[str, Any]:
        try:
            content = json.loads(self.read(key))
        except ValueError as error:
            raise AssertionError(f"{key} is not JSON: {error}") from None
        check(isinstance(content, dict), f"{key} is no JSON object")
        return content

    def whole(self, file: dict[str, Any]) -> bytes:
        """The bytes of a file of which the log or a commit says what they must be."""
        data = self.read(file["key"])
        check(len(data) == file["bytes"], f"{file['key']} has {len(data)} bytes of {file['bytes']}")
        sha256 = hashlib.sha256(data).hexdigest()
        check(
            sha256 == file["sha256"], f"{file['key']} has another SHA-256 than it was written with"
        )
        return data


def _counting(files: _Files, run_id: str) -> list[tuple[int, list[dict[str, Any]]]]:
    """Facts of each entry that counts, with its incarnation, in order.

    Of an incarnation these are the entries up to the one that its successor names, after which there is a seal; of the
    newest one, those without a gap.
    """
    folder = f"runs/{run_id}/"
    claims = [files.json(key) for key in files.under(f"{folder}incarnations/")]
    present = files.under(f"{folder}log/")
    counting = []
    for number, claim in enumerate(claims):
        check(
            (claim["run_id"], claim["incarnation"]) == (run_id, number),
            f"claim {number} is one of run {claim['run_id']}, incarnation {claim['incarnation']}",
        )
        keys = [key for key in present if key.startswith(f"{folder}log/{number:06d}-")]
        named = None
        if number + 1 < len(claims):
            last = claims[number + 1]["previous_last"]
            named = 0 if last is None else last["seq"] + 1
            check(last is None or last["incarnation"] == number, f"claim {number + 1} is lost")
        limit = len(keys) if named is None else named
        for seq in range(limit):
            key = f"{folder}log/{number:06d}-{seq:08d}.json"
            check(key in keys, f"entry {key} is missing")
            entry = files.json(key)
            check(
                (entry["incarnation"], entry["seq"]) == (number, seq),
                f"{key} holds another entry",
            )
            counting.append((number, entry["facts"]))
        if named is not None:
            seal = f"{folder}log/{number:06d}-{named:08d}.json"
            kinds = {fact["kind"] for fact in files.json(seal)["facts"]}
            check(
                kinds == {"sealed"}, f"{seal} is no seal: incarnation {number} could have gone on"
            )
    known = tuple(f"{folder}log/{number:06d}-" for number in range(len(claims)))
    stray = [key for key in present if not key.startswith(known)]
    check(not stray, f"entries of an incarnation that nobody claimed: {stray}")
    return counting


class _Run:
    """What the entries of a run add up to, one fact after the other."""

    def __init__(self, files: _Files, run_id: str) -> None:
        self.files, self.run_id = files, run_id
        self.config = files.json(f"runs/{run_id}/config.json")
        self.incarnation, self.status, self.facts = -1, "running", 0
        self.base = self.current = 0
        self.drawn: dict[str, str] = {}  # Groups, and the runs whose draws they are.
        self.committed: dict[str, str] = {}  # Groups, and their commit records.
        self.size: dict[str, int] = {}  # Commit records, and the size of their groups.
        self.dropped: dict[str, str] = {}  # Groups, and why.
        self.handed_over: set[str] = set()  # Groups that another run trains on.
        self.uses: Counter[str] = Counter()
        self.steps: dict[int, dict[str, Any]] = {}
        self.trainings = 0
        self.owed: set[int] = set()
        self.checkpoints: dict[int, dict[str, Any]] = {}
        self.parts: list[dict[str, Any]] = []
        self.commits: set[str] = set()
        self.age_max: int | None = None

    def take(self, fact: dict[str, Any]) -> None:
        """One more fact is true."""
        handler = getattr(self, f"_{fact['kind']}", None)
        if handler is not None:
            handler(fact)

    def _started(self, fact: dict[str, Any]) -> None:
        check(fact["run_id"] == self.run_id, f"an entry was written for run {fact['run_id']}")
        self.parts += [source["file"] for source in fact.get("sources", ())]

    def _forked(self, fact: dict[str, Any]) -> None:
        check(not self.steps, "the run was forked after it had begun")
        self.base = self.current = fact["step"]

    def _restored(self, fact: dict[str, Any]) -> None:
        step = fact["step"]
        kept = self.checkpoints.get(step)
        check(kept is not None, f"step {step} was restored, of which there is no checkpoint")
        assert kept is not None
        check(
            kept["weights_digest"] == fact["weights_digest"],
            f"other weights of step {step} were restored than its checkpoint has",
        )
        self.current = step
        self.owed = {each for each in self.steps if each > step}

    def _admitted(self, fact: dict[str, Any]) -> None:
        for draw in fact["draws"]:
            group = draw["group_id"]
            check(
                not self.owed, f"{group} was admitted before steps {self.owed} were trained again"
            )
            check(group == f"{self.run_id}-{draw['draw']:08d}", f"{group} is misnamed")
            check(group not in self.drawn, f"{group} was admitted twice")
            self.drawn[group] = self.run_id

    def _replayed(self, fact: dict[str, Any]) -> None:
        for draw in fact["draws"]:
            group = draw["group_id"]
            check(
                not self.owed, f"{group} was replayed before steps {self.owed} were trained again"
            )
            check(group not in self.drawn, f"{group} was admitted twice")
            self.drawn[group] = fact["run_id"]
            self.committed[group] = fact["commit"]
        self.size[fact["commit"]] = fact["group_size"]

    def _generated(self, fact: dict[str, Any]) -> None:
        self.parts.append(fact["part"])
        for group in fact["group_ids"]:
            check(group in self.drawn, f"{group} was generated and never admitted")
            check(group not in self.committed, f"{group} was generated again after its commit")

    def _committed(self, fact: dict[str, Any]) -> None:
        check(fact["commit"] not in self.commits, f"{fact['commit']} was committed twice")
        self.commits.add(fact["commit"])
        self.size[fact["commit"]] = self.config["group_size"]
        record = self.files.json(fact["commit"])
        check(record["group_ids"] == list(fact["group_ids"]), f"{fact['commit']} has other groups")
        for group in fact["group_ids"]:
            check(group in self.drawn, f"{group} was committed and never admitted")
            check(group not in self.committed, f"{group} was committed twice")
            self.committed[group] = fact["commit"]

    def _dropped(self, fact: dict[str, Any]) -> None:
        for group in fact["group_ids"]:
            check(group in self.drawn, f"{group} was dropped and never admitted")
            check(bool(fact["reason"]), f"{group} was dropped without a reason")
            check(group not in self.dropped, f"{group} was dropped twice")
            self.dropped[group] = fact["reason"]

    def _handed_over(self, fact: dict[str, Any]) -> None:
        check(fact["to_run"] == self.config["parent_run_id"], f"handed over to {fact['to_run']}")
        for group in fact["group_ids"]:
            check(group in self.committed, f"{group} was handed over before its commit")
            check(group not in self.handed_over, f"{group} was handed over twice")
            self.handed_over.add(group)

    def _step(self, fact: dict[str, Any]) -> None:
        step, groups = fact["step"], fact["group_ids"]
        check(step == self.current + 1, f"step {step} came after step {self.current}")
        check(fact["policy_version"] == step, f"step {step} made version {fact['policy_version']}")
        check(len(set(groups)) == len(groups), f"step {step} has a group twice")
        for group in groups:
            check(group in self.committed, f"step {step} trained on {group} before its commit")
        earlier = self.steps.get(step)
        if earlier is None:
            check(not self.owed, f"step {step} came before steps {self.owed} were trained again")
            self.uses.update(groups)
        else:
            check(earlier["group_ids"] == groups, f"step {step} was trained again on other groups")
        self.owed.discard(step)
        self.steps[step] = fact
        self.trainings += 1
        self.current = step

    def _evaluated(self, fact: dict[str, Any]) -> None:
        self.parts += fact["parts"]

    def _checkpoint(self, fact: dict[str, Any]) -> None:
        self.checkpoints[fact["step"]] = fact

    def _pruned(self, fact: dict[str, Any]) -> None:
        for step in fact["steps"]:
            check(step in self.checkpoints, f"step {step} was pruned and had no checkpoint")
            del self.checkpoints[step]

    def _end(self, fact: dict[str, Any]) -> None:
        self.status = fact["status"]

    def close(self) -> None:
        """What must hold of all facts together, and of the files that they name."""
        most = (self.config.get("replay") or {}).get("epochs", 1)
        for group in self.drawn:
            uses, reason = self.uses[group], self.dropped.get(group)
            check(uses <= most, f"{group} was trained on {uses} times")
            handed_over = group in self.handed_over
            check(not (uses and reason), f"{group} was trained on and dropped as {reason}")
            check(not (handed_over and (uses or reason)), f"{group} was used and handed over")
            pending = not (uses or reason or handed_over)
            check(self.status != "finished" or not pending, f"{group} was forgotten")
        if self.status == "finished":
            last = max(self.steps, default=self.base)
            for step in () if self.config.get("collect") else (self.base, last):
                check(step in self.checkpoints, f"step {step} has no checkpoint")
            check(not self.owed, f"steps {self.owed} were never trained again")
        for file in self.parts:
            self.files.whole(file)
        for kept in self.checkpoints.values():
            for file in kept["files"]:
                self.files.whole(file)
        oldest = self._oldest_versions()
        for step, fact in self.steps.items():
            for group in fact["group_ids"]:
                if self.drawn[group] == self.run_id or self.config.get("train_rounds"):
                    age = step - 1 - oldest[group]
                    bound = self.config["max_policy_age"]
                    check(0 <= age <= bound, f"step {step} trained on {group} at age {age}")
                    self.age_max = max(age, self.age_max or 0)

    def _oldest_versions(self) -> dict[str, int]:
        """Oldest version of any token that the policy wrote, by group; all groups are whole."""
        oldest: dict[str, int] = {}
        samples: dict[str, list[int]] = {}
        for key in sorted(set(self.committed.values())):
            for row in self._rows(key):
                group = row["group_id"]
                versions = zip(row["token_policy_versions"], row["mask"], strict=True)
                version = min(version for version, is_ours in versions if is_ours)
                oldest[group] = min(version, oldest.get(group, version))
                samples.setdefault(group, []).append(row["sample"])
                check(
                    row["episode_id"] == f"{group}-{row['sample']:03d}",
                    f"{key} has an episode {row['episode_id']} in {group}",
                )
        for group, key in self.committed.items():
            due = list(range(self.size[key]))
            found = sorted(samples.get(group, []))
            check(found == due, f"{group} has samples {found} in {key}")
        return oldest

    def _rows(self, key: str) -> list[dict[str, Any]]:
        """The episodes of a commit, in its own part or where a compaction has put them."""
        record = self.files.json(key)
        part, offset = record["part"], 0
        if part["key"] not in self.files.under(f"episodes/data/{record['run_id']}/"):
            for compaction in self.files.under(f"episodes/compactions/{record['run_id']}/"):
                told = self.files.json(compaction)
                for each in told["commits"]:
                    if (each["commit"], each["sha256"]) == (
                        record["key"],
                        record["part"]["sha256"],
                    ):
                        part, offset = told["parts"][each["part"]], each["offset"]
        columns = ["episode_id", "group_id", "sample", "mask", "token_policy_versions"]
        data = pq.read_table(io.BytesIO(self.files.whole(part)), columns=columns, use_threads=False)
        rows: list[dict[str, Any]] = data.slice(offset, record["rows"]).to_pylist()
        check(len(rows) == record["rows"], f"{key} has {len(rows)} of {record['rows']} episodes")
        check(
            list(dict.fromkeys(row["group_id"] for row in rows)) == record["group_ids"],
            f"{key} names other groups than its part has",
        )
        return rows

    def told(self) -> dict[str, Any]:
        """The figures of the run."""
        last = max(self.steps, default=self.base)
        return {
            "status": self.status,
            "incarnations": len(self.files.under(f"runs/{self.run_id}/incarnations/")),
            "facts": self.facts,
            "drawn": len(self.drawn),
            "trained": sum(bool(uses) for uses in self.uses.values()),
            "dropped": dict(sorted(Counter(self.dropped.values()).items())),
            "pending": sum(
                not (self.uses[g] or g in self.dropped or g in self.handed_over) for g in self.drawn
            ),
            "steps": last,
            "retrained": self.trainings - len(self.steps),
            "age_max": self.age_max,
            "weights_digest": self.steps[last]["weights_digest"] if last in self.steps else None,
            "bytes": self.files.bytes,
        }


if __name__ == "__main__":
    print(json.dumps(audit(sys.argv[1], sys.argv[2]), indent=2))
