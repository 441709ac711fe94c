"""Play full episodes with an agent, greedily and one per seed, and print the returns."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from snn_rl.base.files import write_json
from snn_rl.cli.environments import EnvironmentOf, add_environment
from snn_rl.cli.parser import DEVICE_HELP, STICKY_HELP, Parser
from snn_rl.cli.status import exit_status
from snn_rl.rl.evaluation import evaluate
from snn_rl.rl.policy_file import load_policy
from snn_rl.runs.agent import PROTOCOL
from snn_rl.runs.recipe import TEST_SEEDS, Recipe
from snn_rl.runs.stages import check_device


def main(
    argv: Sequence[str] | None = None, *, prog: str | None = None, recipes: Mapping[str, Recipe] | None = None
) -> int:
    parser = Parser(__doc__, prog=prog)
    parser.add_argument("file", metavar="FILE", type=Path, help="the agent, a policy.safetensors")
    parser.add_argument("--episodes", type=int, default=20, help="number of episodes")
    parser.add_argument("--seed", type=int, default=TEST_SEEDS, help="seed of the first episode; the others follow it")
    add_environment(parser)
    parser.add_argument("--sticky", type=float, help=f"{STICKY_HELP} (default: as trained)")
    parser.add_argument("--clear", action="store_true", help="clear the membrane potentials at every frame")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results to this file (default: none)")
    options = parser.parse_args(argv)
    return exit_status(lambda: _play(options, recipes))


def _play(options: argparse.Namespace, recipes: Mapping[str, Recipe] | None) -> None:
    if options.episodes < 1:
        raise ValueError(f"episodes must be >= 1, got {options.episodes}")
    build = EnvironmentOf(recipes, options)
    policy = load_policy(options.file, check_device(options.device))
    if options.clear:
        if policy.timesteps is None:
            raise ValueError(f"{options.file} holds an ANN, which has no membranes to clear")
        policy.policy.net.persistent = False
    overrides = {} if options.sticky is None else {"sticky": options.sticky}
    with closing(build(policy, min(options.episodes, 100), options.seed, **overrides)) as env:
        result = evaluate(policy, env, options.episodes)
    name = build.name(policy)
    where = "" if name is None else f" in {name}"
    print(f"{options.file}: {result.mean:.2f} +- {result.std:.2f} over {options.episodes} episodes{where}")
    print("returns:", " ".join(f"{r:g}" for r in result.returns))
    if result.activity is not None:
        print(f"spike rate {result.activity.mean:.3f}, energy ANN / SNN {result.activity.ann_over_snn:.2f}")
    if options.json is not None:
        protocol = PROTOCOL + (f", sticky {options.sticky}" if options.sticky else "")
        protocol += "" if name is None else f", in {name}"
        protocol += f", with {' '.join(options.env_kwargs)}" if options.env_kwargs else ""
        measured = None if result.activity is None else result.activity.as_dict()
        write_json(options.json, {"eval": result.as_dict(protocol), "activity": measured})
