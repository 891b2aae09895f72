"""Charts of one run, or of several in one colour each, made with Plotly.

Texts and lines of the axes get their colours from the page's style sheet, which knows whether it is dark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from flows.html_report.data import RunData, Series

_SMOOTHING = 0.8
_HEIGHT = 260
_ROW_HEIGHT = 34
# Okabe and Ito's palette, which colour-blind people can tell apart, without its black and yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("solid", "dot", "dash", "dashdot", "longdash")
_KIND_COLOURS = {
    "generate": "#0072b2",
    "train": "#d55e00",
    "score": "#009e73",
    "weights": "#cc79a7",
    "evaluate": "#56b4e9",
    "warm_start": "#e69f00",
    "checkpoint": "#a6761d",
    "startup": "#8d8d8d",
    "wait_batch": "#c9c9c9",
    "wait_weights": "#b5bfd0",
    "wait_slot": "#d8cfc0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure with its heading."""

    title: str
    """What it shows, with its unit."""
    html: str
    """A `div` and the script that fills it; Plotly's library has to be in the page."""
    is_wide: bool = False
    """Whether it wants the page's whole width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spec:
    title: str
    names: tuple[str, ...] = ()
    """Metrics of steps."""
    series: Callable[[RunData], dict[str, Series]] | None = None
    """Where they are no metrics of steps."""
    is_log: bool = False
    mode: str = "lines"


_RATIO = "sampling/importance_sampling_ratio"
_SPECS = (
    _Spec(title="Reward, mean of a step", names=("reward",)),
    _Spec(
        title="Evaluation, score on held-out prompts",
        series=RunData.evaluations,
        mode="lines+markers",
    ),
    _Spec(
        title="Evaluation, probability that one of k samples is right (pass@k)",
        series=RunData.passed,
        mode="lines+markers",
    ),
    _Spec(
        title="Of a step's prompts, probability that one of k samples is right (pass@k)",
        series=lambda run: run.told("pass@"),
    ),
    _Spec(
        title="Score by verifier, mean of a step",
        series=lambda run: run.told("verifier/"),
    ),
    _Spec(title="Reward by environment, mean of a step", series=RunData.environments),
    _Spec(
        title="Verifiers that disagree, share of samples and pairs",
        series=lambda run: run.told("disagreement"),
    ),
    _Spec(title="Groups whose rewards are all equal, share", names=("frac_reward_zero_std",)),
    _Spec(
        title="Response length, tokens",
        names=("completions/mean_length", "completions/max_length", "completions/min_length"),
    ),
    _Spec(title="Truncated responses, share", names=("completions/clipped_ratio",)),
    _Spec(
        title="Well-formed responses, and those that failed before, share",
        series=lambda run: run.told("well_formed", "failed"),
    ),
    _Spec(
        title="Distinct 1- and 2-grams of a step's responses, share",
        series=lambda run: run.told("distinct/"),
    ),
    _Spec(
        title="Repeated 4-grams within a response, share",
        series=lambda run: run.told("repetition"),
    ),
    _Spec(title="Groups of a batch that were used before, share", names=("buffer/frac_reused",)),
    _Spec(title="KL of sampled to trained policy, nats per token", names=("sampling/kl",)),
    _Spec(title="KL of trained to reference policy, nats per token", names=("kl",)),
    _Spec(title="Entropy, nats per token", names=("entropy",)),
    _Spec(
        title="Clipped tokens, share",
        names=("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"),
    ),
    _Spec(title="Gradient norm", names=("grad_norm",)),
    _Spec(
        title="Importance ratio, quantiles over tokens",
        names=(f"{_RATIO}/p50", f"{_RATIO}/p01", f"{_RATIO}/p99", f"{_RATIO}/min", f"{_RATIO}/max"),
        is_log=True,
    ),
    _Spec(
        title="Effective sample size, share of tokens", names=("sampling/effective_sample_size",)
    ),
    _Spec(title="Loss", names=("loss",)),
    _Spec(title="Learning rate", names=("learning_rate",)),
    _Spec(title="Age of a step's groups, versions", series=RunData.ages),
    _Spec(title="Parity of trainer and generator, nats", series=RunData.parity, is_log=True),
    _Spec(title="Generation, tokens per second", names=("generate/tokens_per_second",)),
    _Spec(title="Training, seconds per step", names=("train/seconds",)),
)


def charts(runs: Sequence[RunData]) -> list[Chart]:
    """All charts that have anything to show."""
    made: list[Chart] = []
    for spec in _SPECS:
        if (figure := _curves(spec, runs)) is not None:
            made.append(_chart(f"chart-{len(made)}", spec.title, figure))
    for run in runs:
        of_run = f", {run.run_id}" if len(runs) > 1 else ""
        for title, figure in (
            (f"What each mesh did{of_run}, seconds since the start", _timeline(run)),
            (f"Shares of each mesh's time{of_run}", _shares(run)),
        ):
            made.append(_chart(f"chart-{len(made)}", title, figure, is_wide=True))
    return made


def _chart(name: str, title: str, figure: go.Figure, *, is_wide: bool = False) -> Chart:
    figure.update_layout(
        template="none",
        height=figure.layout.height or _HEIGHT,
        margin={"l": 56, "r": 12, "t": 8, "b": 36},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.2, "font": {"size": 11}},
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    return Chart(title=title, html=html, is_wide=is_wide)


def _curves(spec: _Spec, runs: Sequence[RunData]) -> go.Figure | None:
    figure = go.Figure()
    for run, colour in zip(runs, _cycled(_COLOURS, len(runs)), strict=True):
        found = spec.series(run) if spec.series else {n: run.metric(n) for n in spec.names}
        series = {name: xy for name, xy in found.items() if xy[0]}
        colours = [colour] * len(series) if len(runs) > 1 else _cycled(_COLOURS, len(series))
        dashes = _cycled(_DASHES, len(series)) if len(runs) > 1 else ["solid"] * len(series)
        for (name, (x, y)), own_colour, dash in zip(series.items(), colours, dashes, strict=True):
            shown = name if len(runs) == 1 else f"{run.run_id} {name}"
            line = {"color": own_colour, "dash": dash, "width": 2}
            if len(series) == 1 and len(x) > 2:
                faint = {"color": own_colour, "width": 1}
                figure.add_scatter(
                    x=x, y=y, name=f"{shown}, raw", line=faint, opacity=0.4, mode="lines"
                )
                figure.add_scatter(x=x, y=_smoothed(y), name=shown, line=line, mode="lines")
            else:
                figure.add_scatter(x=x, y=y, name=shown, line=line, mode=spec.mode)
    if not figure.data:
        return None
    figure.update_layout(showlegend=len(figure.data) > 1)
    if spec.is_log:
        figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return figure


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average, without the pull towards 0 of its start (Kingma and Ba 2015, section 3)."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smoothed.append(total / weight)
    return smoothed


def _timeline(run: RunData) -> go.Figure:
    """One row per mesh, one trace per kind: hundreds of stretches draw as one line with gaps."""
    meshes = run.intervals()
    figure = go.Figure()
    for kind, colour in _KIND_COLOURS.items():
        x: list[float | None] = []
        y: list[str | None] = []
        for mesh, intervals in meshes.items():
            for each in intervals:
                if each.kind == kind:
                    x += [round(each.start, 3), round(each.end, 3), None]
                    y += [mesh, mesh, None]
        if x:
            figure.add_scatter(
                x=x, y=y, mode="lines", name=kind, line={"color": colour, "width": 14}
            )
    figure.update_yaxes(categoryorder="array", categoryarray=list(reversed(meshes)))
    figure.update_layout(height=150 + _ROW_HEIGHT * max(1, len(meshes)))
    return figure


def _shares(run: RunData) -> go.Figure:
    seconds = run.summary["seconds"]
    up = max(seconds["total"] - seconds["down"], 1e-9)
    meshes = dict(reversed(seconds["meshes"].items()))
    figure = go.Figure()
    for kind, colour in {**_KIND_COLOURS, "unaccounted": "#000000"}.items():
        shares = [100 * of_mesh.get(kind, 0.0) / up for of_mesh in meshes.values()]
        if any(share > 0 for share in shares):
            figure.add_bar(
                x=shares, y=list(meshes), name=kind, orientation="h", marker={"color": colour},
                hovertemplate="%{x:.1f} %",
            )  # fmt: skip
    figure.update_layout(barmode="stack", height=150 + _ROW_HEIGHT * max(1, len(meshes)))
    figure.update_xaxes(ticksuffix=" %", range=[0, 100])
    return figure


def _cycled(values: Sequence[str], count: int) -> list[Any]:
    return [values[i % len(values)] for i in range(count)]
