"""The part of `verify` that opens checkpoints: their files, and the weights in them."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from storage.facts import Checkpoint
from storage.groups import Problem
from storage.ledger import Ledger
from storage.objects import ObjectNotFound, ObjectStore
from storage.parts import read_file
from storage.records import FileRef
from storage.verify_weights import WeightsDigest

MANIFEST = "checkpoint.json"
"""File of a checkpoint that says what it is; checkpoints of version 1 have none."""


def checkpoint_problems(
    store: ObjectStore,
    run_id: str,
    ledger: Ledger,
    counted: Counter[str],
    *,
    trains: bool = True,
) -> Iterator[Problem]:
    """All that is wrong with the checkpoints that the log names. A run that trains nothing writes none."""
    audit = _Audit(store=store, run_id=run_id, counted=counted)
    is_due = ledger.status in ("finished", "paused") and trains
    kept = {ledger.base_step, ledger.last_step} if is_due else set()
    for step in sorted(kept - (ledger.checkpoints.keys() - ledger.pruned)):
        sentence = f"the run {ledger.status} without a checkpoint of step {step}"
        yield Problem("checkpoint", f"step {step}", sentence)
    for step, fact in ledger.checkpoints.items():
        if step in ledger.pruned:
            counted["pruned_checkpoints"] += 1
        else:
            counted["checkpoints"] += 1
            yield from audit.checkpoint(fact)


@dataclass(slots=True, kw_only=True)
class _Audit:
    store: ObjectStore
    run_id: str
    counted: Counter[str]

    def checkpoint(self, fact: Checkpoint) -> Iterator[Problem]:
        """Every file is as written, and the weights in them have the digest that the log gives them."""
        manifest: dict[str, Any] | None = None
        # First the one that says which names share a tensor.
        files = sorted(fact.files, key=lambda file: file.key != f"{fact.key}{MANIFEST}")
        if not files or files[0].key != f"{fact.key}{MANIFEST}":
            self.counted["checkpoints_without_digest"] += 1
        digest: WeightsDigest | None = None
        for file in files:
            try:
                data = read_file(self.store, file)
                self.counted["bytes"] += len(data)
                if file.key == f"{fact.key}{MANIFEST}":
                    manifest = _read_manifest(file.key, data)
                    digest = WeightsDigest(fact.weights_digest, manifest["tied"])
                elif digest is not None and _holds_weights(fact, file):
                    digest.add(file.key, data)
            except (ValueError, ObjectNotFound) as error:
                yield Problem("checkpoint", file.key, str(error))
                digest = None
        for file in fact.critic:
            try:
                self.counted["bytes"] += len(read_file(self.store, file))
            except (ValueError, ObjectNotFound) as error:
                yield Problem("checkpoint", file.key, str(error))
        if manifest is not None:
            yield from self._manifest(fact, manifest)
        if digest is not None and (found := digest.hexdigest()) != fact.weights_digest:
            sentence = (
                f"the weights in checkpoint {fact.key} have digest {found}; "
                f"the log says {fact.weights_digest}"
            )
            yield Problem("weights", fact.key, sentence)

    def _manifest(self, fact: Checkpoint, manifest: dict[str, Any]) -> Iterator[Problem]:
        """What the checkpoint says of itself is what the log says of it."""
        others = [file for file in fact.files if file.key != f"{fact.key}{MANIFEST}"]
        due = {
            "run_id": self.run_id,
            "step": fact.step,
            "weights_digest": fact.weights_digest,
            "files": sorted(others, key=lambda file: file.key),
        }
        said = {**manifest, "files": sorted(manifest["files"], key=lambda file: file.key)}
        wrong = [name for name in due if said.get(name) != due[name]]
        if wrong:
            sentence = f"{fact.key}{MANIFEST} says other things than the log of {', '.join(wrong)}"
            yield Problem("checkpoint", f"{fact.key}{MANIFEST}", sentence)


def _holds_weights(fact: Checkpoint, file: FileRef) -> bool:
    name = file.key.removeprefix(fact.key)
    return "/" not in name and name.endswith(".safetensors")


def _read_manifest(key: str, data: bytes) -> dict[str, Any]:
    """A checkpoint's own description. Raises ValueError if it is none."""
    try:
        content = dict(json.loads(data))
        content["tied"] = {str(alias): str(name) for alias, name in content["tied"].items()}
        content["files"] = [FileRef.model_validate(file) for file in content["files"]]
    except (ValueError, ValidationError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{key} does not describe a checkpoint: {error}") from error
    return content
