"""Checks of a run before anything is started, and the plan of what would be.

Every refusal is one ValueError that names field, value and mend. Nothing here needs torch, an
engine or Prefect, so that a mistake costs seconds.
"""

from __future__ import annotations

import importlib.util
import os
import time
from typing import Any

from flows.data_preflight import check_run_data
from flows.estimate import check_fits, estimate, model_shape
from flows.hosts import check_hosts, describe_hosts
from flows.model_directory import ModelDirectory
from forge_core.config import HUB_PREFIX, ModelShape, RunConfig, TrainerConfig
from forge_core.ensembles.reference import find_ensemble
from forge_core.environments import Environment, Prompt, load_environment
from forge_core.placement.hosts import this_machine, visible_gpus
from forge_core.placement.plan import Plan, asks, make_plan
from forge_core.placement.roles import roles_here
from forge_core.sandbox import SandboxRefused, check_sandbox
from forge_core.tools.making import make_toolbox
from forge_core.user_code import check_reference, load_object
from storage import layout
from storage.objects import check_writable, open_store

_NUM_PROMPTS = 64
"""Training prompts that are rendered and measured."""
_NUM_TEST_PROMPTS = 4
"""Few, for only one prompt in many is held out, and some tasks are slow to make one."""
_RENDER_SECONDS = 0.5
"""Time after which no further prompt is rendered: some tasks take a second for one."""


def preflight(config: RunConfig, store_uri: str, *, run_id: str | None = None) -> None:
    """Refuse a run that cannot work; whatever the outcome, the store is as it was.

    The cheap checks come first. Raises ValueError.
    """
    model = check_input(config, store_uri, run_id=run_id)
    check_machine(config, store_uri, model)


def check_input(
    config: RunConfig, store_uri: str, *, run_id: str | None = None
) -> ModelDirectory | None:
    """Refuse what could work on no machine; the model's directory, if it is one. Raises ValueError."""
    check_writable(store_uri)
    if run_id is not None and open_store(store_uri).exists(layout.config_key(run_id)):
        raise ValueError(
            f"--run-id {run_id!r} exists in store {store_uri!r}: go on with it by forgeflow resume {run_id}, "
            "or choose another"
        )
    return check_config(config, store_uri)


def check_config(config: RunConfig, store_uri: str) -> ModelDirectory | None:
    """As `check_input`, for a run that may have begun: of the store only the ensemble that scores is looked at."""
    check_ensembles(config, store_uri)
    for field, reference in config.user_code().items():
        check_reference(field, reference)
    for sink in config.sinks:
        _check_sink(sink)
    model = find_model(config)
    check_run_data(config, model)
    environment = load_environment(config.environment, config.seed)
    _check_verifiers(config)
    _check_tools(config, environment)
    prompts = _render_prompts(environment)
    _check_answers(config, prompts)
    if config.warm_start.data is not None:
        # Brings pyarrow, which most commands do without.
        from forge_core.supervised.split import check_data

        check_data(config.warm_start)
    _check_context(config, model, [prompt.text for prompt in prompts])
    if (shape := model_shape(config, model)) is not None:
        _check_tensor_parallel(config, shape)
    return model


def _check_sink(name: str) -> None:
    """Refuse a sink that is not there, or whose packages are not installed: its module is run. Raises ValueError."""
    if ":" in name:
        check_reference("sinks", name)
        load_object("sinks", name)
    elif name != "tensorboard":
        raise ValueError(
            f"sinks {name!r} is none: name tensorboard, or a class of your own as path/file.py:name"
        )


def check_ensembles(config: RunConfig, store_uri: str) -> None:
    """Refuse an ensemble that is not in the store, or whose verifiers' files have changed. Raises ValueError."""
    if not (references := config.ensembles()):
        return
    # Deferred: it brings pyarrow, which most commands do without.
    from forge_core.ensembles.posterior import used_verifiers
    from forge_core.ensembles.reward import check_source

    store = open_store(store_uri)
    for field, reference in references.items():
        for each in used_verifiers(find_ensemble(field, reference, store)):
            check_source(each)


def find_model(config: RunConfig) -> ModelDirectory | None:
    """The directory of a config's model, if it is in one. Raises ValueError if it cannot be used."""
    path = config.model.path
    if path is None or path.startswith(HUB_PREFIX):
        if path is not None and path.removeprefix(HUB_PREFIX).count("/") != 1:
            raise ValueError(f"model.path {path!r} is no hub id: write {HUB_PREFIX}owner/name")
        return None
    return ModelDirectory.open(path)


def check_machine(config: RunConfig, store_uri: str, model: ModelDirectory | None) -> None:
    """Refuse what does not fit this machine. Raises ValueError."""
    _place(config, store_uri, model)
    check_hosts(config.hosts)


def _place(config: RunConfig, store_uri: str, model: ModelDirectory | None) -> Plan:
    shape = model_shape(config, model)
    # What other hosts have is known once the run has attached to them.
    plan = make_plan(config, [this_machine()], roles=roles_here(config), shape=shape)
    if shape is not None:
        check_fits(estimate(config, shape, store_uri))
    return plan


def dry_run_plan(
    config: RunConfig, store_uri: str, model: ModelDirectory | None, *, run_id: str | None = None
) -> dict[str, Any]:
    """The resolved config, which processes a run of it would start on which devices, and what it would need.

    `refused` says why it would not start on this machine, if it would not.
    """
    shape = model_shape(config, model)
    plan, refused = None, None
    try:
        plan = _place(config, store_uri, model)
    except ValueError as error:
        refused = str(error)
    generators, trainer = config.generators, config.trainer
    meshes = {
        "generators": {
            "meshes": generators.replicas,
            "processes_per_mesh": generators.tensor_parallel,
            "device": generators.device,
            "threads_per_process": generators.threads,
            "runs": "one in-process vLLM engine"
            if generators.tensor_parallel == 1
            else "its share of one vLLM engine",
        },
        "trainer": {
            "meshes": 1,
            "processes_per_mesh": trainer.ranks,
            "device": trainer.device,
            "threads_per_process": trainer.threads,
            "runs": f"one rank of {_layout(trainer)} over {'nccl' if trainer.device == 'cuda' else 'gloo'}",
        },
        "verifier": {
            "meshes": 1,
            "processes_per_mesh": 1,
            "device": "cpu",
            "threads_per_process": 1,
            "runs": ", ".join(config.verifiers) or f"the scorer of {config.environment.name}",
        },
        "weights": {
            "meshes": 1,
            "processes_per_mesh": 1,
            "device": "cpu",
            "threads_per_process": 1,
            "runs": "one TorchStore volume",
        },
    }
    return {
        "store": open_store(store_uri).uri,
        "run_id": run_id,
        "model": config.model.path or f"tiny model, made from seed {config.seed}",
        "episodes_per_step": config.groups_per_step * config.group_size,
        "meshes": meshes,
        "gpus": {
            "needed": sum(ask.processes * ask.gpus for ask in asks(config).values()),
            "present": None if config.hosts.are_elsewhere else len(visible_gpus()),
        },
        "hosts": [] if not config.hosts.are_elsewhere else describe_hosts(config.hosts),
        "placement": [] if plan is None else _placed(plan),
        "unbound": None if plan is None else plan.unbound,
        "parameters": None if shape is None else shape.num_parameters,
        "needs": [
            {
                "name": need.name,
                "bytes": need.bytes,
                "available_bytes": need.available,
                "parts_bytes": need.parts,
            }
            for need in ([] if shape is None else estimate(config, shape, store_uri))
        ],
        "refused": refused,
        "cores": len(os.sched_getaffinity(0)),
        "config": config.model_dump(mode="json"),
    }


def _layout(trainer: TrainerConfig) -> str:
    if trainer.tensor_parallel == 1:
        return "FSDP2"
    return f"FSDP2 {trainer.data_ranks} x tensor parallel {trainer.tensor_parallel}"


def _placed(plan: Plan) -> list[dict[str, Any]]:
    """Each process that is granted devices or cores of its own."""
    return [
        {"mesh": name, "rank": rank, "host": grant.host, "gpus": slot.gpus, "cores": slot.cores}
        for name, grant in plan.grants.items()
        for rank, slot in enumerate(grant.slots)
        if slot.gpus or slot.cores
    ]


def _render_prompts(environment: Environment) -> list[Prompt]:
    deadline = time.monotonic() + _RENDER_SECONDS
    prompts = [environment.train_prompt(0)]  # raises if there are none to train on
    prompts += environment.test_prompts(_NUM_TEST_PROMPTS)
    while len(prompts) < _NUM_PROMPTS and time.monotonic() < deadline:
        prompts.append(environment.train_prompt(len(prompts)))
    return prompts


def _check_verifiers(config: RunConfig) -> None:
    """Refuse verifiers that this machine cannot have."""
    kinds = {each.kind: name for name, each in config.verifiers.items()}
    if "math" in kinds and importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            f"verifiers.{kinds['math']} is of kind math, which needs the package math-verify: install it"
        )
    if "code" in kinds:
        try:
            check_sandbox()
        except SandboxRefused as error:
            raise ValueError(
                f"verifiers.{kinds['code']} is of kind code and runs programs in a sandbox: {error}"
            ) from None


def _check_tools(config: RunConfig, environment: Environment) -> None:
    """Refuse tools that are none, or that this machine cannot have."""
    make_toolbox(config, environment)
    if (name := next((n for n, t in config.tools.items() if t.kind == "python"), None)) is not None:
        try:
            check_sandbox()
        except SandboxRefused as error:
            raise ValueError(
                f"tools.{name} is of kind python and runs programs in a sandbox: {error}"
            ) from None


def _check_answers(config: RunConfig, prompts: list[Prompt]) -> None:
    """Refuse a warm start on answers that the environment has not got."""
    if (
        config.warm_start.steps
        and config.warm_start.data is None
        and not any(prompt.target for prompt in prompts)
    ):
        raise ValueError(
            f"warm_start.steps {config.warm_start.steps} trains on reference answers, and "
            f"environment.name {config.environment.name!r} has none: set it to 0"
        )


def _check_tensor_parallel(config: RunConfig, shape: ModelShape) -> None:
    """Refuse to share out what cannot be shared out evenly."""
    share = config.generators.tensor_parallel
    kv_heads = shape.num_kv_heads
    # Fewer heads of keys and values than processes are held by several.
    kv_fit = kv_heads % share == 0 or share % kv_heads == 0
    if shape.num_heads % share or shape.intermediate_size % share or not kv_fit:
        raise ValueError(
            f"generators.tensor_parallel {share} cannot share out the model's {shape.num_heads} attention heads, "
            f"{kv_heads} heads of keys and values and {shape.intermediate_size} hidden units evenly: set it to a "
            "number that divides them"
        )
    config.trainer.check_shares(
        num_heads=shape.num_heads,
        num_kv_heads=kv_heads,
        head_size=shape.head_size,
        intermediate_size=shape.intermediate_size,
    )


def _check_context(config: RunConfig, model: ModelDirectory | None, texts: list[str]) -> None:
    """Refuse responses that do not fit behind the longest of some prompts, chat template left aside."""
    if config.model.path is None:
        field, context = "model.tiny.context_length", config.model.tiny.context_length
        # One token per printable ASCII character and per byte of any other.
        num_tokens = max(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    elif model is None or model.context_length is None:  # a model of the hub, not seen yet
        return
    else:
        field, context = f"the context of model.path {config.model.path!r},", model.context_length
        num_tokens = model.count_tokens(texts)
    if config.generators.max_model_len < context:
        field, context = "generators.max_model_len", config.generators.max_model_len
    longest = num_tokens + config.sampling.max_tokens
    if longest > context:
        raise ValueError(
            f"sampling.max_tokens {config.sampling.max_tokens} after a prompt of {num_tokens} tokens "
            f"makes {longest}, more than {field} {context}: lower it, or shorten the prompt by "
            "environment.prompt_template"
        )
