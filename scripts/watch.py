"""Watch an agent play, in a window or on video. Beside the game you see the spikes of each layer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's agents, whatever else is installed

from agents import environment_of
from snn_rl.cli.common import ENV_HELP, STICKY_HELP, Parser, exit_status, named_environment
from snn_rl.rl.policy_file import load_policy
from snn_rl.runs.recipe import TEST_SEEDS
from snn_rl.share.watch import has_display, record, show


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="the agent, a policy.safetensors")
    parser.add_argument(
        "--video",
        type=Path,
        metavar="OUT",
        help="write a .gif or .mp4 instead of opening a window (default: a window; watch.gif without a display)",
    )
    parser.add_argument("--steps", type=int, default=300, help="number of frames to play")
    parser.add_argument("--seed", type=int, default=TEST_SEEDS, help="seed of the environment")
    parser.add_argument("--env", metavar="NAME", help=ENV_HELP)
    parser.add_argument("--sticky", type=float, help=f"{STICKY_HELP} (default: as trained)")
    parser.add_argument("--fps", type=int, default=15, help="frames per second of the window or video")
    options = parser.parse_args(argv)

    def command() -> None:
        policy = load_policy(options.file)
        build = environment_of if options.env is None else partial(named_environment, options.env)
        overrides = {} if options.sticky is None else {"sticky": options.sticky}
        with closing(build(policy, 1, options.seed, render_mode="rgb_array", **overrides)) as env:
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
