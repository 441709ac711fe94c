"""Play full episodes with an agent and print its returns.

The agent plays greedily, one episode per seed. By default the environment is the one that the agent was trained in.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's agents, whatever else is installed

from agents import environment_of
from snn_rl.base.files import write_json
from snn_rl.cli.common import DEVICE_HELP, ENV_HELP, STICKY_HELP, Parser, exit_status, named_environment
from snn_rl.rl.evaluation import evaluate
from snn_rl.rl.policy_file import load_policy
from snn_rl.runs.agent import PROTOCOL
from snn_rl.runs.recipe import TEST_SEEDS
from snn_rl.runs.stages import check_device


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="the agent, a policy.safetensors")
    parser.add_argument("--episodes", type=int, default=20, help="number of episodes")
    parser.add_argument("--seed", type=int, default=TEST_SEEDS, help="seed of the first episode; the others follow it")
    parser.add_argument("--env", metavar="NAME", help=ENV_HELP)
    parser.add_argument("--sticky", type=float, help=f"{STICKY_HELP} (default: as trained)")
    parser.add_argument("--clear", action="store_true", help="clear the membrane potentials at every frame")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results to this file (default: none)")
    options = parser.parse_args(argv)

    def command() -> None:
        if options.episodes < 1:
            raise ValueError(f"episodes must be >= 1, got {options.episodes}")
        policy = load_policy(options.file, check_device(options.device))
        if options.clear:
            if policy.timesteps is None:
                raise ValueError(f"{options.file} holds an ANN, which has no membranes to clear")
            policy.policy.net.persistent = False
        build = environment_of if options.env is None else partial(named_environment, options.env)
        overrides = {} if options.sticky is None else {"sticky": options.sticky}
        protocol = PROTOCOL + (f", sticky {options.sticky}" if options.sticky else "")
        protocol += "" if options.env is None else f", in {options.env}"
        with closing(build(policy, min(options.episodes, 100), options.seed, **overrides)) as env:
            result = evaluate(policy, env, options.episodes)
        print(f"{options.file}: {result.mean:.2f} +- {result.std:.2f} over {options.episodes} episodes")
        print("returns:", " ".join(f"{r:g}" for r in result.returns))
        if result.activity is not None:
            print(f"spike rate {result.activity.mean:.3f}, energy ANN / SNN {result.activity.ann_over_snn:.2f}")
        if options.json is not None:
            measured = None if result.activity is None else result.activity.as_dict()
            write_json(options.json, {"eval": result.as_dict(protocol), "activity": measured})

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
