"""Ship a finished run: its policies in half precision, each played again from the file that is shipped.

Beside the files stands ``results.json``: what the shipped files, not the trained ones, return. The table of contents is
made of these alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from snn_rl.base.files import atomic, atomic_folder, read_json, write_json
from snn_rl.base.weights_file import write_weights
from snn_rl.rl.evaluation import Evaluation
from snn_rl.rl.policy_file import FORMAT, LoadedPolicy, load_policy
from snn_rl.runs.results import (
    COUNT,
    EVAL,
    HEAD,
    MEASURED,
    NAME,
    NUMBER,
    TEXT,
    TIMESTEPS,
    checked,
    is_classifier,
    load_results,
)
from snn_rl.runs.stages import measurements

MAX_BYTES = 8_000_000  # of one file

TAKEN_OVER = {"env_steps": COUNT, "updates": COUNT, "wall_seconds": NUMBER, "hardware": TEXT}  # of a trained stage
PUBLISHED = {
    **HEAD,
    "command": TEXT,
    "stages": [{"stage": NAME, "precision": TEXT, "sha256": TEXT, "eval": EVAL, **MEASURED, **TAKEN_OVER}],
}


def publish(
    run_dir: Path, into: Path, play: Callable[[LoadedPolicy], Evaluation], command: str, protocol: str
) -> dict[str, Any]:
    """Write ``STAGE.safetensors`` of each stage of ``run_dir``, and ``results.json``, into ``into``; returns these.

    ``play`` evaluates a policy on the run's test seeds; ``command`` trained the run. Weights are shipped in half
    precision where that changes no return of these episodes, and in single precision otherwise. The folder appears
    whole or not at all, and takes the place of an earlier publication.

    Raises:
        ValueError: a run without results or with damaged ones, a stage's file that is not of this run, a file of more
            than 8 MB, or a folder with anything in it that is not of an earlier publication.
    """
    results, where = load_results(run_dir), run_dir / "results.json"
    if is_classifier(results["stages"][0]):
        raise ValueError(f"{run_dir} holds classifiers; agents alone are published")
    if not TEXT.holds(command):
        raise ValueError(f"the command must be {TEXT.words}, got {command!r}")
    begun = run_dir / "run.json"
    if not begun.is_file():
        raise ValueError(f"no {begun}; give the folder of a run as it was trained")
    schedule = checked(read_json(begun), {"recipe": {"schedule": [TIMESTEPS]}}, begun)["recipe"]["schedule"]
    if [stage["timesteps"] for stage in results["stages"]] != [None, *schedule]:
        raise ValueError(f"{run_dir} has not finished its stages {schedule}; train on with the command that began it")
    for index, stage in enumerate(results["stages"]):
        checked(stage, TAKEN_OVER, where, f"stages[{index}]")
    with atomic_folder(into, _check_ours) as temporary:
        kept = {key: results[key] for key in HEAD}
        shipped = [_ship(run_dir, results, stage, temporary, play, protocol) for stage in results["stages"]]
        published = {**kept, "command": command, "stages": shipped}
        write_json(temporary / "results.json", published)
    return published


def _ship(
    run_dir: Path,
    results: Mapping[str, Any],
    stage: Mapping[str, Any],
    into: Path,
    play: Callable[[LoadedPolicy], Evaluation],
    protocol: str,
) -> dict[str, Any]:
    """Write the file of one stage; returns what is published of it."""
    name = stage["stage"]
    source, path = run_dir / name / "policy.safetensors", into / f"{name}.safetensors"
    trained = load_policy(source)
    provenance = trained.metadata["provenance"]
    found = tuple(provenance.get(key) for key in ("recipe", "seed", "stage")), trained.timesteps
    wanted = (results["recipe"], results["seed"], name), stage["timesteps"]
    if found != wanted:
        raise ValueError(f"{source} must be of {wanted} (recipe, seed and stage; timesteps), got {found}; restore it")
    evaluation, precision = play(_write(trained, path, half=False)), "single"
    if _fits_half(trained):
        halved = play(_write(trained, path, half=True))
        if halved.returns == evaluation.returns:
            evaluation, precision = halved, "half"
        else:
            _write(trained, path, half=False)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{name} has {path.stat().st_size:,} bytes; a file to ship has {MAX_BYTES:,} at most")
    return {
        "stage": name,
        "timesteps": stage["timesteps"],
        "precision": precision,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "eval": evaluation.as_dict(protocol),
        **measurements(evaluation.activity),
        **{key: stage[key] for key in TAKEN_OVER},
    }


def _check_ours(folder: Path) -> None:
    """Raises ValueError where something stands at ``folder`` that `publish` did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    ours, path = {"results.json"}, folder / "results.json"
    if path.is_file():
        ours |= {f"{stage['stage']}.safetensors" for stage in _published(path)["stages"]}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours or not entry.is_file())
    if foreign:
        raise ValueError(
            f"{folder} holds what is not of an earlier publication: {', '.join(foreign[:3])}; remove it, or give "
            "another folder"
        )


def _published(path: Path) -> Any:
    return checked(read_json(path), PUBLISHED, path)


def _fits_half(trained: LoadedPolicy) -> bool:
    return all(bool(torch.isfinite(weight.half()).all()) for weight in trained.network.state_dict().values())


def _write(trained: LoadedPolicy, path: Path, *, half: bool) -> LoadedPolicy:
    """Write the weights in half or single precision; returns the policy as it comes back from the file."""
    write_weights(path, trained.policy.net, FORMAT, trained.metadata, half=half)
    return load_policy(path)


def table_of_contents(folder: Path) -> Path:
    """Write ``README.md`` into the folder of published runs, from their ``results.json``; returns its path.

    Raises:
        ValueError: one of them that is damaged, by file and field.
    """
    lines = [
        "# Trained agents",
        "",
        "Watch an agent: `python scripts/watch.py agents/pretrained/RECIPE/STAGE.safetensors`. Evaluate it:",
        "`python scripts/evaluate.py agents/pretrained/RECIPE/STAGE.safetensors`. In a program, build the",
        "environment in which it was trained:",
        "",
        "```python",
        "from agents import environment_of",
        "from snn_rl import load_policy",
        "",
        'policy = load_policy("agents/pretrained/cartpole/T1.safetensors")',
        "env = environment_of(policy, num_envs=1, seed=0)  # a VecEnv of stable-baselines3",
        "```",
        "",
        "A return is the mean and standard deviation over greedy episodes that the file here has played, one per",
        "seed. The seeds were not used to train the agent or to choose its checkpoint. `python scripts/publish.py`",
        "wrote this folder from finished runs.",
    ]
    for path in sorted(folder.glob("[!.]*/results.json")):  # a name with a dot is what a kill left behind
        lines += ["", *_section(path.parent.name, _published(path))]
    out = folder / "README.md"
    with atomic(out) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def _section(folder: str, results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {results['recipe']}",
        "",
        f"{results['env_id']}, seed {results['seed']}: `{results['command']}`, {results['hardware']}.",
        "",
        "| file | return | episodes | spike rate | energy ANN / SNN | precision | minutes | SHA-256 |",
        "| --- " * 8 + "|",
    ]
    for stage in results["stages"]:
        cells = [
            f"[{stage['stage']}]({folder}/{stage['stage']}.safetensors)",
            f"{stage['eval']['mean']:.2f} ± {stage['eval']['std']:.2f}",
            str(stage["eval"]["episodes"]),
            f"{stage['spike_rate']['mean']:.3f}" if stage["spike_rate"] else "-",
            f"{stage['energy']['ann_over_snn']:.2f}" if stage["energy"] else "-",
            stage["precision"],
            f"{stage['wall_seconds'] / 60:.1f}" if stage["wall_seconds"] else "-",  # an ANN that was given, not trained
            f"`{stage['sha256'][:16]}`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
