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

from snn_rl.evaluation import Evaluation
from snn_rl.files import atomic, read_json, write_json
from snn_rl.policy_file import FORMAT, LoadedPolicy, load_policy
from snn_rl.stages import measurements
from snn_rl.weights_file import write_weights

MAX_BYTES = 8_000_000  # of one file


def publish(
    run_dir: Path, into: Path, play: Callable[[LoadedPolicy], Evaluation], command: str, protocol: str
) -> dict[str, Any]:
    """Write ``STAGE.safetensors`` of each stage of ``run_dir``, and ``results.json``, into ``into``; returns these.

    ``play`` evaluates a policy on the run's test seeds; ``command`` trained the run. Weights are shipped in half
    precision where that changes no return of these episodes, and in single precision otherwise.

    Raises:
        ValueError: a run without results, or a file of more than 8 MB.
    """
    if not (run_dir / "results.json").is_file():
        raise ValueError(f"no results at {run_dir / 'results.json'}; give the folder of a finished run")
    results = read_json(run_dir / "results.json")
    schedule = read_json(run_dir / "run.json")["recipe"]["schedule"]
    if not results["stages"] or results["stages"][-1]["timesteps"] != schedule[-1]:
        raise ValueError(f"{run_dir} has not finished its stages {schedule}; train on with the command that began it")
    shipped = []
    for stage in results["stages"]:
        trained = load_policy(run_dir / stage["stage"] / "policy.safetensors")
        path = into / f"{stage['stage']}.safetensors"
        evaluation, precision = play(_write(trained, path, half=False)), "single"
        if _fits_half(trained):
            halved = play(_write(trained, path, half=True))
            if halved.returns == evaluation.returns:
                evaluation, precision = halved, "half"
            else:
                _write(trained, path, half=False)
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a file to ship has {MAX_BYTES:,} at most")
        shipped.append(
            {
                "stage": stage["stage"],
                "timesteps": stage["timesteps"],
                "precision": precision,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "eval": evaluation.as_dict(protocol),
                **measurements(evaluation.activity),
                **{key: stage[key] for key in ("env_steps", "updates", "wall_seconds", "hardware")},
            }
        )
    kept = {key: results[key] for key in ("recipe", "env_id", "seed", "versions", "hardware")}
    published = {**kept, "command": command, "stages": shipped}
    write_json(into / "results.json", published)
    return published


def _fits_half(trained: LoadedPolicy) -> bool:
    return all(bool(torch.isfinite(weight.half()).all()) for weight in trained.policy.q_net.state_dict().values())


def _write(trained: LoadedPolicy, path: Path, *, half: bool) -> LoadedPolicy:
    """Write the weights in half or single precision; returns the policy as it comes back from the file."""
    write_weights(path, trained.policy.q_net, FORMAT, trained.metadata, half=half)
    return load_policy(path)


def table_of_contents(folder: Path) -> Path:
    """Write ``README.md`` into the folder of published runs, from their ``results.json``; returns its path."""
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
    for path in sorted(folder.glob("*/results.json")):
        lines += ["", *_section(read_json(path))]
    out = folder / "README.md"
    with atomic(out) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def _section(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {results['recipe']}",
        "",
        f"{results['env_id']}, seed {results['seed']}: `{results['command']}`, {results['hardware']}.",
        "",
        "| file | return | episodes | spike rate | energy ANN / SNN | precision | minutes | SHA-256 |",
        "| --- " * 8 + "|",
    ]
    for stage in results["stages"]:
        spiking = stage["spike_rate"] is not None
        cells = [
            f"[{stage['stage']}]({results['recipe']}/{stage['stage']}.safetensors)",
            f"{stage['eval']['mean']:.2f} ± {stage['eval']['std']:.2f}",
            str(stage["eval"]["episodes"]),
            f"{stage['spike_rate']['mean']:.3f}" if spiking else "-",
            f"{stage['energy']['ann_over_snn']:.2f}" if spiking else "-",
            stage["precision"],
            f"{stage['wall_seconds'] / 60:.1f}" if stage["wall_seconds"] else "-",  # an ANN that was given, not trained
            f"`{stage['sha256'][:16]}`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
