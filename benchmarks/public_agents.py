"""Make every trained agent in a folder spike, and write a table of how well they play.

    python benchmarks/public_agents.py FOLDER [--runs DIR] [--table FILE] [--seeds 0 1] [--only NAME ...]

FOLDER holds one folder per agent, with ``model.zip`` and, where its observations are normalised, ``vecnormalize.pkl``.
``index.json`` in FOLDER lists them: name, algo, env_id, env_kwargs, vecnormalize, teacher_mean and random_mean. Each
agent is made to spike as ``snn-rl spike`` does it, by one set of numbers. LunarLander and the like need
``pip install -e '.[games]'``. The same command resumes; finished agents are
not run again. Several processes may work on one folder: an agent that another one works on is left out.

The score of a stage is (its mean - random_mean) / (teacher_mean - random_mean).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from snn_rl.base.files import atomic, read_json, write_json
from snn_rl.rl.evaluation import evaluate
from snn_rl.rl.policy_file import load_policy
from snn_rl.runs.given import Given
from snn_rl.runs.recipe import TEST_SEEDS, SpikeRecipe
from snn_rl.runs.registered import registered
from snn_rl.runs.spike import spike

HEAD = """# Agents that others trained

Each agent was made to spike as `snn-rl spike` does it, by one set of numbers for all of them:

    python benchmarks/public_agents.py FOLDER --table docs/public-agents.md

The score of a stage is (its mean return - that of random actions) / (the teacher's - that of random actions), by the
means that are noted with the agents. Every stage plays the same episodes, whose seeds were not used in training.
"""
NOTES = """- **New ANN**: the network of ReLUs that a teacher first teaches where its own does not convert.
- **Cleared**: the score of the last stage when its membrane potentials are cleared before every frame.
- **Rate**: spikes per neuron and frame of the last stage. **Energy**: that of the ANN over that of the last stage.
- **Minutes**: of one core, for all stages together."""
ROOT = Path(__file__).resolve().parents[1]
LONG = ("BipedalWalker", "HalfCheetah", "Swimmer", "Hopper", "Walker2d", "Ant", "Humanoid")  # 20 episodes each


def recipe_of(agent: Mapping[str, Any]) -> SpikeRecipe:
    """How ``snn-rl spike`` would run this agent."""
    env_id = agent["env_id"]
    return SpikeRecipe(
        name=f"spike-{env_id}",
        env_id=env_id,
        make_env=registered(env_id),
        env_kwargs=agent["env_kwargs"],
        eval_episodes=20 if env_id.startswith(LONG) else 100,
    )


def run(folder: Path, agent: Mapping[str, Any], directory: Path, seed: int) -> None:
    """Make one agent spike, and play its last stage with cleared membranes, too."""
    recipe, home = recipe_of(agent), folder / agent["name"]
    saved = home / "vecnormalize.pkl"
    given = Given(home / "model.zip", agent["algo"], saved if agent["vecnormalize"] else None)
    spike(recipe, given, directory, seed)
    if not (directory / "cleared.json").is_file():
        policy = load_policy(directory / f"T{recipe.schedule[-1]}" / "policy.safetensors")
        policy.policy.net.persistent = False
        env = recipe.build_env(recipe.eval_episodes, TEST_SEEDS + seed * 1_000)
        write_json(directory / "cleared.json", evaluate(policy, env, recipe.eval_episodes).as_dict("cleared"))
        env.close()


def row(agent: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """What the table shows of a finished run; None of an unfinished one."""
    if not (directory / "cleared.json").is_file():
        return None
    results = read_json(directory / "results.json")
    stages = {stage["stage"]: stage for stage in results["stages"]}
    spiking = [name for name in stages if name.startswith("T")]
    worst, best = agent["random_mean"], agent["teacher_mean"]

    def score(mean: float) -> float:
        return (mean - worst) / (best - worst)

    last = stages[spiking[-1]]
    return {
        "name": agent["name"],
        "seed": results["seed"],
        "episodes": last["eval"]["episodes"],
        "fresh": "ann" in stages,
        **{name: (stage["eval"]["mean"], stage["eval"]["std"]) for name, stage in stages.items()},
        "scores": {name: score(stages[name]["eval"]["mean"]) for name in spiking},
        "cleared": score(read_json(directory / "cleared.json")["mean"]),
        "rate": last["spike_rate"]["mean"],
        "energy": last["energy"]["ann_over_snn"],
        "minutes": sum(stage["cpu_seconds"] for stage in stages.values()) / 60,
        "hardware": results["hardware"],
        "versions": results["versions"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    names = list(rows[0]["scores"])
    head = ["agent", "seed", "teacher", "new ANN", *names, *(f"score {n}" for n in names), "cleared", "rate", "energy"]
    lines = [" | ".join(["", *head, "minutes", ""]).strip(), "|" + " --- |" * (len(head) + 1)]
    for r in rows:
        cells = [r["name"], str(r["seed"]), _pm(r["teacher"]), _pm(r["ann"]) if r["fresh"] else "converted"]
        cells += [_pm(r[name]) for name in names] + [f"{r['scores'][name]:.3f}" for name in names]
        cells += [f"{r['cleared']:.2f}", f"{r['rate']:.3f}", f"{r['energy']:.1f}x", f"{r['minutes']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    first = [r for r in rows if r["seed"] == min(x["seed"] for x in rows)]
    summary = [
        f"{name}: median {statistics.median(r['scores'][name] for r in first):.3f}, "
        f"{sum(r['scores'][name] >= 0.95 for r in first)} of {len(first)} at 0.95 or above"
        for name in names
    ]
    machines = sorted({r["hardware"] for r in rows})
    packages = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in rows})
    return "\n".join(
        [
            HEAD,
            "Scores of the first seed. " + "; ".join(summary) + ".",
            "",
            *lines,
            "",
            NOTES,
            "",
            *machines,
            *packages,
            "",
        ]
    )


def _pm(value: tuple[float, float]) -> str:
    return f"{value[0]:.1f} ± {value[1]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "public-agents", help="folder of the runs")
    parser.add_argument("--table", type=Path, help="file of the table (default: printed)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of agents (default: all)")
    options = parser.parse_args()
    agents = [a for a in read_json(options.folder / "index.json") if not options.only or a["name"] in options.only]
    for seed in options.seeds:
        for agent in agents:
            try:
                run(options.folder, agent, options.runs / agent["name"] / f"seed-{seed}", seed)
            except ValueError as error:  # another process works on it, or it cannot be made to spike
                print(f"{agent['name']}: {error}", file=sys.stderr)
    found = (row(a, options.runs / a["name"] / f"seed-{s}") for s in options.seeds for a in agents)
    rows = [r for r in found if r is not None]
    if rows and options.table is None:
        print(table(rows))
    elif rows:
        with atomic(options.table) as temporary:
            temporary.write_text(table(rows))


if __name__ == "__main__":
    main()
