"""Running a sweep on a Ray of this machine, or on a cluster."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from snn_rl.base.files import atomic, read_json, write_json
from snn_rl.cli.memory import keep_freed_memory
from snn_rl.cli.sweeping.jobs import Job
from snn_rl.cli.sweeping.table import Results, gather, markdown
from snn_rl.runs.agent import run
from snn_rl.runs.recipe import Recipe
from snn_rl.runs.results import check_results

RETRIES = 10  # of one run whose worker or machine dies
# A worker that is cut off from its cluster trains on until Ray gives it up: a minute by default. So long, and a little
# longer, another one waits for its folder.
GRACE_SECONDS = 75.0
MARK = "worker.json"  # who trains in a folder: left behind by a worker that died


@contextmanager
def cluster(address: str | None = None, **settings: Any) -> Iterator[None]:
    """A Ray of this machine alone or, by ``address``, a running cluster: ``auto`` or ``HOST:PORT``.

    ``settings`` go to `ray.init`. Workers import what this process can; they find it under the same paths.

    Raises:
        ValueError: no such address, or a cluster of another version.
        OSError: nothing answers there.
    """
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
