"""Play full episodes with a policy file and print its returns."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's agents, whatever else is installed

from agents import RECIPES
from snn_rl.cli import environment_of, exit_status
from snn_rl.evaluation import evaluate
from snn_rl.files import write_json
from snn_rl.pipeline import PROTOCOL
from snn_rl.policy_file import load_policy
from snn_rl.recipe import TEST_SEEDS
from snn_rl.stages import check_device


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="a policy.safetensors")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=TEST_SEEDS, help="of the first episode (default: the test seeds)")
    parser.add_argument("--sticky", type=float, help="probability that Atari repeats the last action")
    parser.add_argument("--clear", action="store_true", help="clear the membranes at every frame, for comparison")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result there as well")
    options = parser.parse_args(argv)

    def command() -> None:
        if options.episodes < 1:
            raise ValueError(f"episodes must be >= 1, got {options.episodes}")
        policy = load_policy(options.file, check_device(options.device))
        if options.clear:
            if policy.timesteps is None:
                raise ValueError(f"{options.file} holds an ANN, which has no membranes to clear")
            policy.policy.q_net.persistent = False  # type: ignore[assignment]
        overrides = {} if options.sticky is None else {"sticky": options.sticky}
        env = environment_of(policy, RECIPES, min(options.episodes, 100), options.seed, **overrides)
        result = evaluate(policy, env, options.episodes)
        protocol = PROTOCOL + (f", sticky {options.sticky}" if options.sticky else "")
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
