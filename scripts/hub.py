"""Write a policy file as a Hugging Face model repository: card, config, results, video; with --push-to, upload it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's agents, whatever else is installed

from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from agents import RECIPES
from snn_rl.cli import environment_of, exit_status
from snn_rl.hub import NAMES, VIDEO, check_push, export, push
from snn_rl.pipeline import PROTOCOL
from snn_rl.policy_file import LoadedPolicy


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="a policy.safetensors")
    parser.add_argument("folder", type=Path, help="a new folder, or one that an earlier call wrote")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--video-steps", type=int, default=500, metavar="N", help="frames of the agent; 0: no video")
    parser.add_argument("--push-to", metavar="OWNER/NAME", help="upload the folder there; needs a token in HF_TOKEN")
    options = parser.parse_args(argv)

    def build(policy: LoadedPolicy, num_envs: int, seed: int, **overrides: Any) -> VecEnv:
        return environment_of(policy, RECIPES, num_envs, seed, **overrides)

    def command() -> None:
        if options.push_to is not None:
            check_push(options.push_to)  # before minutes of play
        results = export(
            options.file,
            options.folder,
            build,
            episodes=options.episodes,
            video_steps=options.video_steps,
            protocol=PROTOCOL,
            repo_id=options.push_to,
        )
        written = [name for name in NAMES if (options.folder / name).is_file()]
        print(f"{options.folder}: {', '.join(written)}")
        print(f"mean reward {results['mean_reward']:.2f} +/- {results['std_reward']:.2f}")
        if options.video_steps and VIDEO not in written:
            print("no video: it takes imageio and imageio-ffmpeg, pip install -e '.[scripts]'")
        if options.push_to is not None:
            print(push(options.folder, options.push_to))

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
