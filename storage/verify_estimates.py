"""The part of `verify` about reference and critic: what was told of their figures is there, and of the weights due."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from storage.estimates import reference_step
from storage.facts import Estimated
from storage.groups import Problem
from storage.ledger import Ledger
from storage.objects import ObjectNotFound, ObjectStore
from storage.parts import read_file


def estimate_problems(
    store: ObjectStore, config: dict[str, Any], ledger: Ledger, counted: Counter[str]
) -> Iterator[Problem]:
    """Every step trained with reference logprobs and values, where its config asks for them, of the weights due."""
    algorithm = dict(config.get("algorithm") or {})
    kl = dict(algorithm.get("kl") or {})
    has = {
        "reference_logprobs": bool(kl.get("coefficient")),
        "values": algorithm.get("loss") == "ppo",
    }
    for step, fact in ledger.steps.items():
        for what in (name for name, is_due in has.items() if is_due and fact.group_ids):
            if what not in ledger.estimates.get(step, {}):
                sentence = f"step {step} was trained without {what}, which its config asks for"
                yield Problem("estimated", f"step {step}", sentence)
    refresh_steps = int(kl.get("refresh_steps") or 0)
    for told in (each for of_step in ledger.estimates.values() for each in of_step.values()):
        yield from _file(store, told, counted)
        due = told.step - 1
        if told.what == "reference_logprobs":
            due = reference_step(told.step, base_step=ledger.base_step, refresh_steps=refresh_steps)
        if not has[told.what] or told.weights_step != due:
            sentence = (
                f"the {told.what} of step {told.step} are of step {told.weights_step}; {due} is due"
            )
            yield Problem("estimated", f"step {told.step}", sentence)


def _file(store: ObjectStore, told: Estimated, counted: Counter[str]) -> Iterator[Problem]:
    counted["estimates"] += 1
    try:
        counted["bytes"] += len(read_file(store, told.file))
    except (ValueError, ObjectNotFound) as error:
        yield Problem("estimated", told.file.key, str(error))
