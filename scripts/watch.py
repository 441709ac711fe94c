"""Watch a policy file play, in a window or on video: the game beside the spikes of each layer as they fire."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's agents, whatever else is installed

from agents import RECIPES
from snn_rl.cli import environment_of, exit_status
from snn_rl.policy_file import load_policy
from snn_rl.recipe import TEST_SEEDS
from snn_rl.watch import has_display, record, show


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="a policy.safetensors")
    parser.add_argument(
        "--video",
        type=Path,
        metavar="OUT",
        help="a .gif or .mp4, in place of a window (default without a display: watch.gif)",
    )
    parser.add_argument("--steps", type=int, default=300, help="frames of the agent")
    parser.add_argument("--seed", type=int, default=TEST_SEEDS)
    parser.add_argument("--sticky", type=float, help="probability that Atari repeats the last action")
    parser.add_argument("--fps", type=int, default=15)
    options = parser.parse_args(argv)

    def command() -> None:
        policy = load_policy(options.file)
        overrides = {} if options.sticky is None else {"sticky": options.sticky}
        env = environment_of(policy, RECIPES, 1, options.seed, render_mode="rgb_array", **overrides)
        if options.video is None and has_display():
            score = show(policy, env, steps=options.steps, fps=options.fps)
            print(f"{options.file}: score {score:g}")
        else:
            video = options.video or Path("watch.gif")
            score = record(policy, env, video, steps=options.steps, fps=options.fps)
            print(f"{video}: {options.steps} steps, score {score:g}")

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
