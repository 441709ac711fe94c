"""Ship the policies of a finished run in agents/pretrained, in half precision, and list them there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this repository's agents, whatever else is installed

from agents import RECIPES, environment_of
from snn_rl.cli.parser import Parser
from snn_rl.cli.status import exit_status
from snn_rl.rl.evaluation import Evaluation, evaluate
from snn_rl.rl.policy_file import LoadedPolicy
from snn_rl.runs.agent import PROTOCOL
from snn_rl.runs.recipe import SEEDS_PER_RUN, TEST_SEEDS
from snn_rl.runs.results import load_results
from snn_rl.share.publish import publish, table_of_contents


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="the folder of a finished run, such as runs/pong-lite/seed-0"
    )
    parser.add_argument("--command", required=True, help="the command that trained it, to be listed")
    into = ROOT / "agents" / "pretrained"
    parser.add_argument("--into", type=Path, default=into, help="write below this folder (default: agents/pretrained)")
    options = parser.parse_args(argv)

    def play(policy: LoadedPolicy) -> Evaluation:
        seed = TEST_SEEDS + policy.metadata["provenance"]["seed"] * SEEDS_PER_RUN
        episodes = RECIPES[policy.metadata["provenance"]["recipe"]].eval_episodes
        env = environment_of(policy, episodes, seed)
        try:
            return evaluate(policy, env, episodes)
        finally:
            env.close()

    def command() -> None:
        recipe = load_results(options.run)["recipe"]
        if recipe not in RECIPES:
            raise ValueError(f"{options.run} is no run of a recipe here: {', '.join(RECIPES)}")
        published = publish(options.run, options.into / recipe, play, options.command, PROTOCOL)
        for stage in published["stages"]:
            print(f"{stage['stage']}: {stage['eval']['mean']:.2f} +- {stage['eval']['std']:.2f}, {stage['precision']}")
        print(table_of_contents(options.into))

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
