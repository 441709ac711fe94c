"""Watch an agent play, in a window or on video. Beside the game you see the spikes of each layer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from snn_rl.cli.environments import EnvironmentOf, add_environment
from snn_rl.cli.extras import need
from snn_rl.cli.parser import STICKY_HELP, Parser
from snn_rl.cli.status import exit_status
from snn_rl.rl.policy_file import load_policy
from snn_rl.runs.recipe import TEST_SEEDS, Recipe


def main(
    argv: Sequence[str] | None = None, *, prog: str | None = None, recipes: Mapping[str, Recipe] | None = None
) -> int:
    parser = Parser(__doc__, prog=prog)
    parser.add_argument("file", metavar="FILE", type=Path, help="the agent, a policy.safetensors")
    parser.add_argument(
        "--video",
        type=Path,
        metavar="OUT",
        help="write a .gif or .mp4 instead of opening a window (default: a window; watch.gif without a display)",
    )
    parser.add_argument("--steps", type=int, default=300, help="number of frames to play")
    parser.add_argument("--seed", type=int, default=TEST_SEEDS, help="seed of the environment")
    add_environment(parser)
    parser.add_argument("--sticky", type=float, help=f"{STICKY_HELP} (default: as trained)")
    parser.add_argument("--fps", type=int, default=15, help="frames per second of the window or video")
    options = parser.parse_args(argv)
    return exit_status(lambda: _watch(options, recipes))


def _watch(options: argparse.Namespace, recipes: Mapping[str, Recipe] | None) -> None:
    need("scripts", "imageio", "PIL")
    from snn_rl.share import watch

    build = EnvironmentOf(recipes, options)
    policy = load_policy(options.file)
    overrides = {} if options.sticky is None else {"sticky": options.sticky}
    in_window = options.video is None and watch.has_display()
    if in_window:
        need("scripts", "pygame")
    with closing(build(policy, 1, options.seed, render_mode="rgb_array", **overrides)) as env:
        if in_window:
            score = watch.show(policy, env, steps=options.steps, fps=options.fps)
            print(f"{options.file}: score {score:g}")
        else:
            video = options.video or Path("watch.gif")
            score = watch.record(policy, env, video, steps=options.steps, fps=options.fps)
            print(f"{video}: {options.steps} steps, score {score:g}")
