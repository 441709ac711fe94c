"""The paper's experiments with classifiers: each a recipe with a schedule, their results beside the paper's figures.

Chowdhury, Rathi, Roy, "Towards Ultra Low Latency Spiking Neural Networks for Vision and Sequential Tasks Using Temporal
Pruning" (ECCV 2022).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from snn_rl.base.files import atomic
from snn_rl.runs.results import load_results
from snn_rl.vision.classifier_training import MODEL
from snn_rl.vision.recipe import VISION_RECIPES, VisionRecipe
from snn_rl.vision.training import run


@dataclass(frozen=True)
class Experiment:
    """A row of a table.

    ``ann_of`` names the experiment whose ANN this one starts from; ``paper`` holds the published accuracies in percent,
    by stage, as far as they are in a text that could be read (the paper's abstract).
    """

    name: str
    recipe: VisionRecipe
    ann_of: str | None = None
    paper: Mapping[str, float] = field(default_factory=dict)


PUBLISHED = {
    "vgg16-cifar10": {"T1": 93.05},
    "vgg16-cifar100": {"T1": 70.15},
    "vgg16-imagenet": {"T1": 69.00},
}


def _whole(recipe: VisionRecipe) -> Experiment:
    return Experiment(recipe.name, recipe, paper=PUBLISHED.get(recipe.name, {}))


def _with(recipe: VisionRecipe, name: str, **changes: Any) -> Experiment:
    """A variant that starts from the ANN of the whole experiment."""
    return Experiment(f"{recipe.name}-{name}", replace(recipe, **changes), ann_of=recipe.name)


def table1(recipe: VisionRecipe | None) -> list[Experiment]:
    """ANN and T5 to T1 of every network and data set."""
    recipes = [VISION_RECIPES[name] for name in TABLE1] if recipe is None else [recipe]
    return [_whole(r) for r in recipes]


TABLE1 = (
    "vgg6-cifar10", "vgg16-cifar10", "resnet20-cifar10", "vgg6-cifar100", "vgg16-cifar100", "resnet20-cifar100",
    "vgg16-imagenet",
)  # fmt: skip


def table4(recipe: VisionRecipe | None) -> list[Experiment]:
    """Pruned gradually, against converted directly at each T."""
    r = recipe or VISION_RECIPES["vgg6-cifar10"]
    return [_whole(r), *(_with(r, f"direct-T{t}", schedule=(t,)) for t in r.schedule[1:])]


def table5(recipe: VisionRecipe | None) -> list[Experiment]:
    """With and without batch-norm."""
    r = recipe or VISION_RECIPES["vgg16-cifar10"]
    ann = replace(r.ann, learning_rate=r.ann.learning_rate / 5)  # without batch-norm the ANN's own rate diverges
    return [_whole(r), Experiment(f"{r.name}-no-bn", replace(r, batch_norm=False, ann=ann))]


def skipping(recipe: VisionRecipe | None) -> list[Experiment]:
    """5-4-3-2-1 against 5-3-1."""
    r = recipe or VISION_RECIPES["vgg16-cifar10"]
    return [_whole(r), _with(r, "5-3-1", schedule=(5, 3, 1))]


def budget(recipe: VisionRecipe | None) -> list[Experiment]:
    """The same number of epochs in all, spent on five stages, on three, or on T1 alone."""
    r = recipe or VISION_RECIPES["vgg6-cifar10"]
    epochs = sum(map(r.snn_epochs, r.schedule))
    return [
        _whole(r),
        *(_with(r, f"budget-{'-'.join(map(str, s))}", schedule=s, total_snn_epochs=epochs) for s in ((5, 3, 1), (1,))),
    ]


def transition(recipe: VisionRecipe | None) -> list[Experiment]:
    """Figure 1d: T1 reached step by step, from T5 at once, and from the ANN at once; thresholds kept and rescaled."""
    r = recipe or VISION_RECIPES["vgg16-cifar10"]
    kept = replace(r.snn, keep_rates=False)
    untrained = replace(r.snn, epochs=1, learning_rate=0.0)
    return [
        _whole(r),
        _with(r, "thresholds-kept", snn=kept),
        _with(r, "5-1", schedule=(5, 1)),
        _with(r, "5-1-thresholds-kept", schedule=(5, 1), snn=kept),
        _with(r, "direct-T1", schedule=(1,)),
        _with(r, "direct-T1-untrained", schedule=(1,), snn=untrained),
    ]


def sparse(recipe: VisionRecipe | None) -> list[Experiment]:
    """T1 with 90 % of the weights pruned by magnitude, zero weights skipped."""
    r = recipe or VISION_RECIPES["vgg16-cifar10"]
    return [Experiment(f"{r.name}-sparse", replace(r, sparsity=0.9))]


TABLES: dict[str, Callable[[VisionRecipe | None], list[Experiment]]] = {
    "table1": table1,
    "table4": table4,
    "table5": table5,
    "skipping": skipping,
    "budget": budget,
    "transition": transition,
    "sparse": sparse,
}


def reproduce(
    table: str,
    directory: Path,
    *,
    recipe: VisionRecipe | None = None,
    seed: int = 0,
    device: str = "auto",
    progress_bar: bool = False,
    deadline: Callable[[], float | None] = lambda: None,
) -> Path:
    """Run what of ``table`` is not finished, and write it as Markdown into ``directory``; returns that file.

    ``recipe`` takes the place of the paper's network and data. ``deadline`` gives the minutes that are left.

    Raises:
        ValueError: an unknown table; as `snn_rl.vision.run` otherwise.
        OutOfTimeError: the time is up; the same call goes on. What is finished is in the table.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a table is run by one process; run its recipes with scripts/train_vision.py under torchrun")
    if table not in TABLES:
        raise ValueError(f"unknown table {table!r}; there are {', '.join(TABLES)}")
    experiments = TABLES[table](recipe)
    out = directory / f"{table}.md"
    try:
        for experiment in experiments:
            ann = None if experiment.ann_of is None else directory / experiment.ann_of / f"seed-{seed}" / "ann" / MODEL
            folder = directory / experiment.name / f"seed-{seed}"
            kwargs: dict[str, Any] = {"device": device, "progress_bar": progress_bar, "minutes": deadline()}
            run(experiment.recipe, folder, seed, ann=ann, **kwargs)
    finally:
        finished = {e.name: r for e in experiments if (r := _results(directory / e.name / f"seed-{seed}")) is not None}
        if finished:
            with atomic(out) as temporary:
                temporary.write_text(_markdown(table, experiments, finished, seed), encoding="utf-8")
            _draw(directory / f"{table}.png", finished)
    return out


def _results(folder: Path) -> dict[str, Any] | None:
    return load_results(folder) if (folder / "results.json").is_file() else None


def _markdown(
    table: str, experiments: Sequence[Experiment], finished: Mapping[str, Mapping[str, Any]], seed: int
) -> str:
    lines = [f"# {table}", "", (TABLES[table].__doc__ or "").strip(), ""]
    lines += ["| experiment | stage | top 1, % | paper, % | spike rate | energy ANN / SNN | memory accesses | epochs |"]
    lines += ["| --- " * 8 + "|"]
    for experiment in experiments:
        for stage in finished.get(experiment.name, {"stages": []})["stages"]:
            rate = "-" if stage["spike_rate"] is None else f"{stage['spike_rate']['mean']:.3f}"
            energy = stage["energy"]
            cells = [
                experiment.name,
                stage["stage"],
                f"{100 * stage['accuracy']['top1']:.2f}",
                f"{experiment.paper[stage['stage']]:.2f}" if stage["stage"] in experiment.paper else "-",
                rate,
                "-" if energy is None else f"{energy['ann_over_snn']:.1f}",
                "-" if energy is None else f"{energy['memory_accesses']['total']:,.0f}",
                str(stage["epochs"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        if experiment.name not in finished:
            lines.append(f"| {experiment.name} | not run yet" + " | -" * 6 + " |")
    first = next(iter(finished.values()))
    versions = ", ".join(f"{name} {number}" for name, number in first.get("versions", {}).items())
    lines += ["", f"Data: {first['env_id']}; seed {seed}; {first.get('hardware', '')}; {versions}", ""]
    return "\n".join(lines)


def _draw(path: Path, finished: Mapping[str, Mapping[str, Any]]) -> None:
    """Layer-wise spike rates of each experiment's last stage, side by side."""
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, results in finished.items():
        stages = [stage for stage in results["stages"] if stage["spike_rate"] is not None]
        if stages:
            rates = list(stages[-1]["spike_rate"]["layers"].values())
            label = f"{name}, {stages[-1]['stage']}: {100 * stages[-1]['accuracy']['top1']:.1f} %"
            axes.plot(range(1, len(rates) + 1), rates, "o-", label=label)
    axes.set(xlabel="LIF layer", ylabel="spikes per neuron and image")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
