"""Sinks are told what facts measure, fail alone, and are refused in a sentence where they cannot be opened."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flows.preflight import check_config
from forge_core.config import RunConfig
from forge_core.settings import load_config
from storage import facts
from tasks.sinks import SinkListener, open_sinks

EXAMPLE = Path(__file__).parents[2] / "examples" / "mlflow_sink.py"
EVALUATED = facts.Evaluated(
    name="final",
    policy_version=2,
    sampled=0.5,
    greedy=0.75,
    num_prompts=4,
    pass_at=(facts.PassAt(k=1, probability=0.25),),
    parts=(),
)
VALUES = (2, {"eval/sampled": 0.5, "eval/greedy": 0.75, "eval/pass@1": 0.25})


class Kept:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def write(self, step: int, values: Any) -> None:
        self.told.append((step, dict(values)))

    def close(self, status: str) -> None:
        self.told.append(status)


class Broken(Kept):
    """Raises whatever it is asked."""

    def write(self, step: int, values: Any) -> None:
        raise RuntimeError("full")

    def close(self, status: str) -> None:
        raise RuntimeError("gone")


def config(*sinks: str) -> RunConfig:
    return load_config(preset="tiny", file=None, overrides=[f"sinks=[{','.join(sinks)}]"])


def test_one_that_fails_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    listener = SinkListener({"broken": Broken(), "kept": kept})
    listener(EVALUATED)
    listener(facts.End(status="finished", reason=None))
    listener.close()
    assert kept.told == [VALUES, "finished"]
    assert "sink broken failed at step 2: full" in caplog.text
    assert "sink broken could not be closed: gone" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "cancelled")]
)
def test_it_is_told_how_a_run_broke_off(
    tmp_path: Path, error: type[BaseException], status: str
) -> None:
    told = tmp_path / "told"
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def __init__(self, run): self.path = run.folder / 'told'\n"
        "    def write(self, step, values): pass\n"
        "    def close(self, status): self.path.write_text(status)\n"
    )
    with (
        pytest.raises(error),
        open_sinks(config(f'"{tmp_path}/mine.py:Mine"'), "run", tmp_path),
    ):
        raise error
    assert told.read_text() == status


def test_what_is_no_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sinks 'wandb' is none: name tensorboard"):
        check_config(config('"wandb"'), str(tmp_path))
    path = tmp_path / "mine.py"
    path.write_text("def Mine(run): raise RuntimeError('no server')\n")
    with (
        pytest.raises(ValueError, match=r"mine\.py:Mine' cannot be opened: no server"),
        open_sinks(config(f'"{path}:Mine"'), "run", tmp_path),
    ):
        pass


def test_a_package_that_is_missing_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match="MLflow is not installed: pip install mlflow-skinny"):
        check_config(config(f'"{EXAMPLE}:MLflow"'), str(tmp_path))


class Client:
    """As much of MLflow's client as the example asks, over a server that is a dictionary."""

    server: ClassVar[dict[str, Any]] = {"runs": {}}

    def get_experiment_by_name(self, name: str) -> Any:
        known = self.server.get("experiment") == name
        return types.SimpleNamespace(experiment_id="1") if known else None

    def create_experiment(self, name: str) -> str:
        self.server["experiment"] = name
        return "1"

    def search_runs(self, experiment_ids: list[str], wanted: str) -> list[Any]:
        return [
            types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))
            for run_id, run in self.server["runs"].items()
            if wanted == f"tags.`forgeflow.run_id` = '{run['tags']['forgeflow.run_id']}'"
        ]

    def create_run(self, experiment_id: str, tags: dict[str, str]) -> Any:
        run_id = f"m{len(self.server['runs'])}"
        self.server["runs"][run_id] = {
            "tags": tags,
            "metrics": [],
            "params": {},
            "status": "RUNNING",
        }
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def log_param(self, run_id: str, name: str, value: Any) -> None:
        self.server["runs"][run_id]["params"][name] = value

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.server["runs"][run_id]["metrics"] += [(m[0], m[1], m[3]) for m in metrics]

    def set_terminated(self, run_id: str, status: str) -> None:
        self.server["runs"][run_id]["status"] = status


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in for the package, and what its server holds."""
    package, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    package.MlflowClient = Client  # type: ignore[attr-defined]
    entities.Metric = lambda *told: told  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(Client, "server", {"runs": {}})
    yield Client.server
    for name in [name for name in sys.modules if "mlflow_sink" in name]:
        del sys.modules[name]


def test_the_example_goes_on_with_the_run_that_it_made(
    tmp_path: Path, mlflow: dict[str, Any]
) -> None:
    chosen = config(f'"{EXAMPLE}:MLflow"')
    for _ in range(2):
        with open_sinks(chosen, "run", tmp_path) as listener:
            listener(EVALUATED)
            listener(facts.End(status="finished", reason=None))
    (made,) = mlflow["runs"].values()
    told = [("eval/sampled", 0.5, 2), ("eval/greedy", 0.75, 2), ("eval/pass_at_1", 0.25, 2)]
    assert made["metrics"] == told * 2
    assert made["status"] == "FINISHED" and made["params"]["regime"] == "sync"
