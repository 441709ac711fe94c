"""Sweeps: recipes, variants of them and seeds as runs on Ray, gathered into one table.

A run is what `snn_rl.runs.agent.run` makes in its folder, so that the same sweep skips what is finished, and a run
whose worker dies goes on from its checkpoint on another one. The folders must be on a file system that all machines
share.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from snn_rl.base.files import atomic, read_json, write_json
from snn_rl.cli.common import overridden
from snn_rl.cli.memory import keep_freed_memory
from snn_rl.runs.agent import run
from snn_rl.runs.recipe import Recipe
from snn_rl.runs.results import check_results

RETRIES = 10  # of one run whose worker or machine dies
# A worker that is cut off from its cluster trains on until Ray gives it up: a minute by default. So long, and a little
# longer, another one waits for its folder.
GRACE_SECONDS = 75.0
MARK = "worker.json"  # who trains in a folder: left behind by a worker that died
TRIM = 0.25  # on either side: what is left is the interquartile mean
RESAMPLES = 10_000

Results = Mapping[str, Any]


@dataclass(frozen=True, eq=False)  # a recipe holds dictionaries: a job is known by itself
class Job:
    """One run of a sweep: a recipe, changed by the ``override``, with a seed, in its folder."""

    recipe: Recipe
    override: str
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.directory.parent.name}/{self.directory.name}"


def check_installed() -> None:
    """Raises ValueError where a package that sweeps take is not installed."""
    missing = [name for name in ("ray", "scipy") if find_spec(name) is None]
    if missing:
        raise ValueError(f"a sweep needs {' and '.join(missing)}: pip install -e '.[sweep]'")


# --- what to run ----------------------------------------------------------------------------------------------------


def jobs(
    recipes: Sequence[Recipe], overrides: Sequence[Sequence[str]], seeds: Sequence[int], root: Path, suffix: str = ""
) -> list[Job]:
    """Every recipe with every override and every seed, in ``root/RECIPE[suffix][-override]/seed-N``.

    An override is a sequence of ``FIELD=VALUE``, the flags ``--FIELD VALUE`` of the training scripts; an empty one
    leaves the recipe as it is.

    Raises:
        ValueError: a field, value or seed that cannot be, or two runs in one folder.
    """
    for seed in seeds:
        if not 0 <= seed < 100_000:
            raise ValueError(f"seed must lie in [0, 100000), got {seed}")
    out = []
    for recipe, words in itertools.product(recipes, overrides):
        changed = _changed(recipe, words)
        override = " ".join(f"{field.replace('-', '_')}{rest}" for field, rest in map(_split, words))
        folder = recipe.name + suffix + (f"-{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', override)}" if override else "")
        out += [Job(changed, override, seed, root / folder / f"seed-{seed}") for seed in seeds]
    for job in out:
        if sum(job.directory == other.directory for other in out) > 1:
            raise ValueError(f"two runs in {job.directory}: name each recipe, seed and --set once")
    return out


def _split(word: str) -> tuple[str, str]:
    """The field, and the rest from its ``=`` on."""
    field, equals, value = word.partition("=")
    return field, equals + value


def _changed(recipe: Recipe, words: Sequence[str]) -> Recipe:
    flags: list[str] = []
    for word in words:
        field, rest = _split(word)
        flags += [f"--{field}", *rest[1:].split()]
    said = f"--set {' '.join(words)}"
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # a framed page of help
            changed = overridden(recipe, flags, "sweep", fixed=())
        if words:  # whether an environment takes its arguments, only it can tell
            for kwargs in ({}, changed.ann_env_kwargs):
                changed.build_env(1, 0, **kwargs).close()
    except SystemExit:
        raise ValueError(
            f"{said}: {recipe.name} has no such field, or it does not take this value; the training script's --help "
            "lists them"
        ) from None
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from error
    if (changed.name, changed.env_id) != (recipe.name, recipe.env_id):
        raise ValueError(f"{said}: name and env_id say which recipe this is; name another recipe instead")
    return changed


# --- running it -----------------------------------------------------------------------------------------------------


@contextmanager
def cluster(address: str | None = None, **settings: Any) -> Iterator[None]:
    """A Ray of this machine alone or, by ``address``, a running cluster: ``auto`` or ``HOST:PORT``.

    ``settings`` go to `ray.init`. Workers import what this process can; they find it under the same paths.

    Raises:
        ValueError: no such address, or a cluster of another version.
        OSError: nothing answers there.
    """
    check_installed()
    if address not in (None, "auto"):
        _knock(str(address))
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing of this goes anywhere
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what will be the default, and is warned about until then
    }
    with mock.patch.dict(os.environ, {**quiet, **os.environ}):
        import ray

        settings = {"log_to_driver": False, "logging_level": "ERROR", **settings}
        if address is None:
            settings = {"include_dashboard": False, **settings}
        paths = os.pathsep.join(path for path in sys.path if os.path.isdir(path))
        try:
            ray.init(address or "local", runtime_env={"env_vars": {"PYTHONPATH": paths}}, **settings)
        except RuntimeError as error:
            raise ValueError(f"no Ray to be had: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ValueError(f"address must be auto or HOST:PORT, as `ray start --head` prints it, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no cluster answers at {address} ({error}); start one with `ray start --head`") from error


def sweep(
    todo: Sequence[Job],
    root: Path,
    *,
    cpus_per_run: int = 1,
    gpus_per_run: float = 0.0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run all jobs on the connected `cluster`; returns what ``root/sweep.json`` holds, written after each of them.

    A run that fails is in ``failed``, with its error in a line, and stops none of the others.

    Raises:
        ValueError: no machine of the cluster is large enough, or a recipe takes more threads than a run has CPUs.
    """
    import ray

    _check_size(todo, cpus_per_run, gpus_per_run)
    # Python's errors are the run's own and would come again; what is tried again is a worker that died.
    task = ray.remote(num_cpus=cpus_per_run, num_gpus=gpus_per_run, max_retries=RETRIES, retry_exceptions=False)(_train)
    device = "cuda" if gpus_per_run else "cpu"
    pending = {task.remote(job.recipe, job.directory.absolute(), job.seed, device, cpus_per_run): job for job in todo}
    finished: dict[Job, Results] = {}
    failed: dict[Job, str] = {}
    while pending:
        (reference,), _ = ray.wait(list(pending), num_returns=1)
        job = pending.pop(reference)
        try:
            finished[job] = ray.get(reference)
        except ray.exceptions.RayError as error:
            failed[job] = _one_line(error)
        counted = f"{len(todo) - len(pending)} of {len(todo)}"
        say(f"{counted}: {job.name} {'failed: ' + failed[job] if job in failed else 'is finished'}")
        gathered = gather(todo, finished, failed)
        write_json(root / "sweep.json", gathered)
        with atomic(root / "sweep.md") as temporary:
            temporary.write_text(markdown(gathered), encoding="utf-8")
    return gathered


def _check_size(todo: Sequence[Job], cpus: int, gpus: float) -> None:
    """Ray itself would wait for a machine that never comes."""
    import ray

    if not todo:
        raise ValueError("nothing to run: name a recipe and a seed")
    if cpus < 1 or not gpus >= 0:
        raise ValueError(f"--cpus-per-run must be >= 1 and --gpus-per-run >= 0, got {cpus} and {gpus:g}")
    for job in todo:
        if job.recipe.cpu_threads is not None and job.recipe.cpu_threads > cpus:
            raise ValueError(
                f"--cpus-per-run must be >= {job.recipe.cpu_threads}, {job.name}'s cpu_threads, got {cpus}"
            )
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in machines):
        raise ValueError(f"no machine of the cluster has {cpus} CPUs and {gpus:g} GPUs for a run")


def _one_line(error: Exception) -> str:
    """Of what Ray hands back: the run's own error, or that of its worker."""
    cause = getattr(error, "cause", None) or error
    kind = "" if isinstance(cause, ValueError | OSError) else f"{type(cause).__name__}: "
    return kind + " ".join(str(cause).split())


def _train(recipe: Recipe, directory: Path, seed: int, device: str, cpus: int) -> dict[str, Any]:
    """In a worker: one run, or what is left of it."""
    torch.set_num_threads(cpus)  # a recipe's own cpu_threads go before it
    keep_freed_memory()
    _mark(directory)
    try:
        results = run(recipe, directory, seed, device=device, wait=GRACE_SECONDS)
    finally:
        if _marked(directory) == _whoami():  # not of the worker that has taken over
            (directory / MARK).unlink()
    return check_results(results, directory / "results.json")  # of stages that stood finished


def _mark(directory: Path) -> None:
    """Leave our mark where a run begins; first let another machine's worker that left its own come to its end.

    On one machine the folder's lock tells, for which `run` waits. Over machines it may not, where the file system
    keeps it to itself: a mark that was left behind is given the time in which Ray ends a worker that it has lost.
    """
    before = _marked(directory)
    if before is not None and before.get("host") != socket.gethostname():
        time.sleep(GRACE_SECONDS)
    write_json(directory / MARK, _whoami())


def _marked(directory: Path) -> dict[str, Any] | None:
    """The mark in a folder, empty where it cannot be read; None where there is none."""
    mark = directory / MARK
    if not mark.is_file():
        return None
    try:
        before = read_json(mark)
    except ValueError:
        before = None
    return before if isinstance(before, dict) else {}


def _whoami() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


# --- the table ------------------------------------------------------------------------------------------------------


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
