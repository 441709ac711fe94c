"""The table of a sweep: means, interquartile means and their intervals over seeds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snn_rl.cli.sweeping.jobs import Job

TRIM = 0.25  # on either side: what is left is the interquartile mean
RESAMPLES = 10_000

Results = Mapping[str, Any]


def gather(todo: Sequence[Job], finished: Mapping[Job, Results], failed: Mapping[Job, str]) -> dict[str, Any]:
    """The table: a row for each recipe, override and stage. A run's score in it is its mean return in evaluation."""
    rows = []
    for (recipe, override), group in itertools.groupby(todo, key=lambda job: (job.recipe.name, job.override)):
        stages: dict[str, dict[int, Results]] = {}
        for job in group:
            for stage in finished[job]["stages"] if job in finished else ():
                stages.setdefault(stage["stage"], {})[job.seed] = stage
        for name, of_seed in stages.items():
            returns = {str(seed): stage["eval"]["mean"] for seed, stage in of_seed.items()}
            rates = [stage["spike_rate"]["mean"] for stage in of_seed.values() if stage["spike_rate"]]
            energies = [stage["energy"]["ann_over_snn"] for stage in of_seed.values() if stage["energy"]]
            rows.append(
                {
                    "recipe": recipe,
                    "override": override,
                    "stage": name,
                    "seeds": len(returns),
                    **summary(list(returns.values())),
                    "spike_rate": float(np.mean(rates)) if rates else None,
                    "ann_over_snn": float(np.mean(energies)) if energies else None,
                    "returns": returns,
                }
            )
    return {
        "rows": rows,
        "failed": [{"run": job.name, "error": failed[job]} for job in todo if job in failed],
        "missing": [job.name for job in todo if job not in finished and job not in failed],
    }


def summary(scores: Sequence[float]) -> dict[str, float | None]:
    """Mean and interquartile mean of the runs' scores, with the latter's 95 % percentile bootstrap interval.

    The quarters are cut off in whole runs: none of three. Of one run there is no interval.
    """
    from scipy import stats

    def iqm(values: Any, axis: int = -1) -> Any:
        return stats.trim_mean(values, TRIM, axis=axis)

    low = high = None
    if len(scores) > 1:
        # the same table from the same runs
        interval = stats.bootstrap(
            (scores,), iqm, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"mean": float(np.mean(scores)), "iqm": float(iqm(scores)), "low": low, "high": high}


def markdown(gathered: Mapping[str, Any]) -> str:
    """The table, and by name the runs that are not in it."""
    head = ("recipe", "override", "stage", "seeds", "mean", "IQM", "95 % interval", "spike rate", "energy ANN / SNN")
    lines = [head, *map(_cells, gathered["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    text = "".join(f"| {' | '.join(line)} |\n" for line in padded)
    if gathered["failed"]:
        text += "\nFailed:\n\n" + "".join(f"- {run['run']}: {run['error']}\n" for run in gathered["failed"])
    if gathered["missing"]:
        text += f"\nNot finished yet: {', '.join(gathered['missing'])}\n"
    return text


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["recipe"],
        row["override"] or "-",
        row["stage"],
        str(row["seeds"]),
        f"{row['mean']:.1f}",
        f"{row['iqm']:.1f}",
        "-" if row["low"] is None else f"{row['low']:.1f} to {row['high']:.1f}",
        "-" if row["spike_rate"] is None else f"{row['spike_rate']:.3f}",
        "-" if row["ann_over_snn"] is None else f"{row['ann_over_snn']:.2f}",
    )
