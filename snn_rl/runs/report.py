"""Figures and one self-contained report.html of a run, from its results.json alone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from snn_rl.base.files import atomic
from snn_rl.runs.results import is_classifier, load_results

# Okabe and Ito's palette, distinguishable without colour vision
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child"
    "{text-align:left}figure{margin:1.5rem 0}img{max-width:100%}figcaption,.small{color:#555;font-size:.9em}"
)

Results = Mapping[str, Any]
Stage = Mapping[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write ``figures/*.png`` and ``report.html`` into ``run_dir``; returns the latter's path.

    Raises:
        ValueError: as `load_results`.
    """
    run_dir = Path(run_dir)
    results = load_results(run_dir)
    of_kind = CLASSIFIER_FIGURES if is_classifier(results["stages"][0]) else AGENT_FIGURES
    figures = {name: (caption, _png(draw, results)) for name, (caption, draw) in {**of_kind, **FIGURES}.items()}
    page = _html(results, figures)  # nothing is written before everything is drawn
    for name, (_, png) in figures.items():
        with atomic(run_dir / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    with atomic(run_dir / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run_dir / "report.html"


# --- figures ------------------------------------------------------------------------------------------------------


def _is_spiking(stage: Stage) -> bool:
    return stage["timesteps"] is not None


def _spiking(results: Results) -> list[Stage]:
    return list(filter(_is_spiking, results["stages"]))


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _plain(name: str) -> str:
    """What matplotlib shows as ``name``: a pair of dollar signs would begin a formula."""
    return name.replace("$", r"\$")


def reward_curves(axes: Axes, results: Results) -> None:
    """Return of every stage over its own environment steps: in training as a line, on validation seeds as points."""
    for index, stage in enumerate(results["stages"]):
        curve, label = stage["curve"], stage["stage"]
        if curve["env_steps"]:
            axes.plot(curve["env_steps"], curve["returns"], label=label, color=_colour(index))
            label = None
        if stage.get("validation"):
            steps, means = zip(*stage["validation"], strict=True)
            axes.plot(steps, means, "o:", label=label, color=_colour(index), markersize=4, linewidth=1)
    axes.set(xlabel="environment steps of the stage", ylabel="return: training (line), validation (points)")
    axes.set_xscale("symlog", linthresh=1000)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def return_per_timesteps(axes: Axes, results: Results) -> None:
    """Return over T with standard deviations, the ANN as a band: the paper's figure 3a and 3b."""
    for stage in results["stages"]:
        if stage["timesteps"] is None:
            mean, std = stage["eval"]["mean"], stage["eval"]["std"]
            axes.axhline(mean, color=COLOURS[0], linestyle="--", label="ANN")
            axes.axhspan(mean - std, mean + std, color=COLOURS[0], alpha=0.1)
    stages = _spiking(results)
    axes.errorbar(
        [stage["timesteps"] for stage in stages],
        [stage["eval"]["mean"] for stage in stages],
        [stage["eval"]["std"] for stage in stages],
        fmt="o-",
        capsize=4,
        color=COLOURS[1],
        label="SNN",
    )
    axes.set(xlabel="timesteps per frame T", ylabel="return, mean and standard deviation")
    axes.set_xticks([stage["timesteps"] for stage in stages])
    axes.legend()


def accuracy_curves(axes: Axes, results: Results) -> None:
    """Accuracy of every stage over its own epochs: in training as a line, on validation images as points."""
    for index, stage in enumerate(results["stages"]):
        curve, label = stage["curve"], stage["stage"]
        if curve["epochs"]:
            axes.plot(curve["epochs"], [100 * a for a in curve["accuracy"]], label=label, color=_colour(index))
        if stage.get("validation"):
            epochs, accuracies = zip(*stage["validation"], strict=True)
            axes.plot(epochs, [100 * a for a in accuracies], "o:", color=_colour(index), markersize=3, linewidth=1)
    axes.set(xlabel="epochs of the stage", ylabel="accuracy, %: training (line), validation (points)")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def accuracy_per_timesteps(axes: Axes, results: Results) -> None:
    """Test accuracy over T, and the ANN's as a line."""
    for stage in results["stages"]:
        if not _is_spiking(stage):
            axes.axhline(100 * stage["accuracy"]["top1"], color=COLOURS[0], linestyle="--", label="ANN")
    stages = _spiking(results)
    axes.plot(
        [stage["timesteps"] for stage in stages],
        [100 * stage["accuracy"]["top1"] for stage in stages],
        "o-",
        color=COLOURS[1],
        label="SNN",
    )
    axes.set(xlabel="timesteps T", ylabel="test accuracy, %")
    axes.set_xticks(sorted({stage["timesteps"] for stage in stages}))
    axes.legend()


def layer_spike_rates(axes: Axes, results: Results) -> None:
    """Spike rate of each layer, one line per T: the paper's figure 3c."""
    for index, stage in enumerate(_spiking(results), start=1):
        layers = stage["spike_rate"]["layers"]
        axes.plot(range(1, len(layers) + 1), list(layers.values()), "o-", color=_colour(index), label=stage["stage"])
        axes.set_xticks(range(1, len(layers) + 1), list(map(_plain, layers)))
    axes.set(xlabel="LIF layer", ylabel="spikes per neuron and frame")
    axes.set_ylim(bottom=0)
    axes.legend()


def _per_stage(key: str, label: str) -> Callable[[Axes, Results], None]:
    def draw(axes: Axes, results: Results) -> None:
        stages = _spiking(results)
        for index, layer in enumerate(stages[0][key] if stages else (), start=1):
            values = [stage[key].get(layer) for stage in stages]
            axes.plot([stage["stage"] for stage in stages], values, "o-", color=_colour(index), label=_plain(layer))
        axes.set(xlabel="stage", ylabel=label)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()

    return draw


Figures = dict[str, tuple[str, Callable[[Axes, Results], None]]]
AGENT_FIGURES: Figures = {
    "reward-curves": (
        "Training return of the stages, over the last episodes; a stage in which none ended has no line.",
        reward_curves,
    ),
    "return-per-T": (
        "Return of the evaluation per T; error bars are standard deviations over episodes.",
        return_per_timesteps,
    ),
}
CLASSIFIER_FIGURES: Figures = {
    "accuracy-curves": ("Training and validation accuracy of the stages.", accuracy_curves),
    "accuracy-per-T": ("Test accuracy per T.", accuracy_per_timesteps),
}
FIGURES: Figures = {
    "spike-rates": ("Spike rate of each layer, summed over the T micro-steps of a frame.", layer_spike_rates),
    "thresholds": ("Threshold of each layer at the end of a stage.", _per_stage("threshold", "threshold")),
    "leaks": ("Leak of each layer at the end of a stage.", _per_stage("leak", "leak per micro-step")),
}


def _png(draw: Callable[[Axes, Results], None], results: Results) -> bytes:
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not _spiking(results) and draw in [drawn for _, drawn in FIGURES.values()]:
        axes.text(0.5, 0.5, "no spiking stage yet", ha="center", transform=axes.transAxes)
    else:
        draw(axes, results)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


# --- the page -----------------------------------------------------------------------------------------------------


def _html(results: Results, figures: Mapping[str, tuple[str, bytes]]) -> str:
    title = html.escape(f"{results['recipe']}, seed {results['seed']}")
    stages = results["stages"]
    if is_classifier(stages[0]):
        columns, protocol, returns = CLASSIFIER_COLUMNS, "test images, unseen in training and selection", ""
    else:
        columns, protocol = AGENT_COLUMNS, html.escape(str(stages[-1]["eval"].get("protocol", "")))
        returns = f"<h2>All returns</h2>{_table(RETURN_COLUMNS, stages)}"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    pictures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, png in figures.values()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{html.escape(str(results['env_id']))}. {protocol}.</p>"
        f"{_table([*columns, *STAGE_COLUMNS], stages)}"
        f"<h2>Energy and memory accesses per frame</h2>{_table(ENERGY_COLUMNS, _spiking(results))}{pictures}"
        f"{returns}"
        f'<p class="small">{html.escape(str(results["hardware"]))}; {html.escape(versions)}</p></html>\n'
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _energy(stage: Stage, *keys: str) -> Any:
    value = stage["energy"]
    for key in keys:
        value = None if value is None else value.get(key)
    return value


Column = tuple[str, Callable[[Stage], str]]
AGENT_COLUMNS: Sequence[Column] = (
    ("stage", lambda s: str(s["stage"])),
    ("return", lambda s: f"{s['eval']['mean']:.2f} ± {s['eval']['std']:.2f}"),
    ("episodes", lambda s: str(s["eval"]["episodes"])),
    ("env steps", lambda s: f"{s['env_steps']:,}"),
)
CLASSIFIER_COLUMNS: Sequence[Column] = (
    ("stage", lambda s: str(s["stage"])),
    ("top 1, %", lambda s: f"{100 * s['accuracy']['top1']:.2f}"),
    ("top 5, %", lambda s: f"{100 * s['accuracy']['top5']:.2f}"),
    ("images", lambda s: f"{s['accuracy']['images']:,}"),
    ("epochs", lambda s: str(s["epochs"])),
)
STAGE_COLUMNS: Sequence[Column] = (
    ("updates", lambda s: _number(s.get("updates"), ",")),
    ("minutes", lambda s: _number(None if s.get("wall_seconds") is None else s["wall_seconds"] / 60, ".1f")),
    ("spike rate", lambda s: "-" if s["spike_rate"] is None else f"{s['spike_rate']['mean']:.3f}"),
    ("energy ANN / SNN", lambda s: _number(_energy(s, "ann_over_snn"), ".2f")),
)
ENERGY_COLUMNS: Sequence[Column] = (
    ("stage", lambda s: str(s["stage"])),
    ("ANN operations", lambda s: _number(_energy(s, "ann_ops"), ",.0f")),
    ("SNN operations", lambda s: _number(_energy(s, "snn_ops"), ",.0f")),
    ("energy ANN / SNN", lambda s: _number(_energy(s, "ann_over_snn"), ".2f")),
    ("weight accesses", lambda s: _number(_energy(s, "memory_accesses", "weights"), ",.0f")),
    ("membrane accesses", lambda s: _number(_energy(s, "memory_accesses", "membranes"), ",.0f")),
    ("ANN accesses", lambda s: _number(_energy(s, "memory_accesses", "ann"), ",.0f")),
)
RETURN_COLUMNS: Sequence[Column] = (
    ("stage", lambda s: str(s["stage"])),
    ("returns", lambda s: " ".join(f"{r:g}" for r in s["eval"]["returns"])),
)


def _table(columns: Sequence[Column], stages: Sequence[Stage]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell(s))}</td>" for _, cell in columns) + "</tr>" for s in stages
    )
    return f"<table><tr>{head}</tr>{rows}</table>"
