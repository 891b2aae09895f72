"""The data of a run, checked before it starts: what would ruin it is refused, and the rest is told."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from flows.model_directory import ModelDirectory
from forge_core.config import RunConfig
from forge_core.data_checks.columns import Columns
from forge_core.data_checks.findings import DataReport
from forge_core.data_checks.report import check_dataset
from forge_core.data_checks.tokens import Limits
from forge_core.environments.question_answer import NAME, Questions
from forge_core.environments.question_files import PATH
from forge_core.environments.template import render

logger = logging.getLogger(__name__)


def check_run_data(config: RunConfig, model: ModelDirectory | None) -> None:
    """Refuse a run whose files of questions or of supervised examples would ruin it, and log what else was found.

    A file of examples that is not there is left to those who read it. Raises ValueError.
    """
    if config.environment.name == NAME:
        questions = Questions.of(config.environment.params)
        splits = questions.splits()
        template = config.environment.prompt_template
        report = check_dataset(
            questions.path,
            columns=Columns(question=questions.question, answer=questions.answer),
            test_fraction=config.environment.test_fraction,
            limits=_limits(config, model, is_sampled=True),
            rendered=partial(render, "prompt_template", template, metadata={}),
            only=() if splits is None else splits.used,
        )
        _tell(PATH, questions.path, report)
    data = config.warm_start.data
    if data is not None and Path(data).expanduser().exists():
        report = check_dataset(
            data,
            test_fraction=0.0,
            limits=_limits(config, model, is_sampled=False),
            needs_test=False,
            only=(config.warm_start.split,),
        )
        _tell("warm_start.data", data, report)


def _limits(config: RunConfig, model: ModelDirectory | None, *, is_sampled: bool) -> Limits | None:
    """What rows must fit into; None for a model of the hub, which was not seen yet, or without tokenizer.json."""
    tokenizer: Path | None
    context: int | None
    if config.model.path is None:
        tokenizer, context = None, config.model.tiny.context_length
        name = "model.tiny.context_length"
    elif model is None or not (model.path / "tokenizer.json").is_file():
        return None
    else:
        tokenizer, context = model.path / "tokenizer.json", model.context_length
        name = f"the context of model.path {config.model.path!r}"
    if is_sampled and (context is None or config.generators.max_model_len < context):
        context, name = config.generators.max_model_len, "generators.max_model_len"
    return Limits(
        tokenizer=tokenizer,
        context=context,
        context_name=name,
        max_response=config.sampling.max_tokens,
        response_name="sampling.max_tokens",
        max_example=config.warm_start.max_tokens,
        example_name="warm_start.max_tokens",
    )


def _tell(field: str, path: str, report: DataReport) -> None:
    if report.blocking:
        first, *others = report.blocking
        more = f" ({len(others)} more: forgeflow doctor {path})" if others else ""
        raise ValueError(f"{field}: {first.says}{more}")
    logger.info("%s: %s", field, report.figures)
    for finding in report.warnings:
        logger.warning("%s: %s", field, finding.says)
