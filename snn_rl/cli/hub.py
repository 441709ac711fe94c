"""Write an agent as a model repository for the Hugging Face hub: model card, config, results and video.

Without --push-to, nothing is uploaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from snn_rl.cli.environments import EnvironmentOf
from snn_rl.cli.parser import Parser
from snn_rl.cli.status import exit_status
from snn_rl.rl.policy_file import load_policy
from snn_rl.runs.agent import PROTOCOL
from snn_rl.runs.recipe import Recipe
from snn_rl.share.hub import NAMES, VIDEO, check_push, export, push


def main(
    argv: Sequence[str] | None = None, *, prog: str | None = None, recipes: Mapping[str, Recipe] | None = None
) -> int:
    parser = Parser(__doc__, prog=prog)
    parser.add_argument("file", metavar="FILE", type=Path, help="the agent, a policy.safetensors")
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="the folder to write: a new one, or one that this command wrote"
    )
    parser.add_argument("--episodes", type=int, default=20, help="number of episodes to play for the results")
    parser.add_argument("--video-steps", type=int, default=500, metavar="N", help="frames of the video; 0: no video")
    parser.add_argument(
        "--push-to",
        metavar="OWNER/NAME",
        help="upload the folder to this repository of the hub, with the token in HF_TOKEN (default: no upload)",
    )
    options = parser.parse_args(argv)

    return exit_status(lambda: _write(options, recipes))


def _write(options: argparse.Namespace, recipes: Mapping[str, Recipe] | None) -> None:
    if options.push_to is not None:
        check_push(options.push_to)  # before minutes of play
    build = EnvironmentOf(recipes)
    results = export(
        options.file,
        options.folder,
        build,
        episodes=options.episodes,
        video_steps=options.video_steps,
        protocol=PROTOCOL,
        repo_id=options.push_to,
        by_id=build.name(load_policy(options.file)) is not None,
    )
    written = [name for name in NAMES if (options.folder / name).is_file()]
    print(f"{options.folder}: {', '.join(written)}")
    print(f"mean reward {results['mean_reward']:.2f} +/- {results['std_reward']:.2f}")
    if options.video_steps and VIDEO not in written:
        print("no video: install imageio and imageio-ffmpeg with pip install 'snn_rl[scripts]'")
    if options.push_to is not None:
        print(push(options.folder, options.push_to))
