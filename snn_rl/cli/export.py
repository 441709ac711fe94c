"""Write an agent or a classifier as a NIR file (.nir) or an ONNX file (.onnx)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from snn_rl.cli.parser import Parser
from snn_rl.cli.status import exit_status
from snn_rl.core.network import SpikingNetwork
from snn_rl.rl.policy_file import load_policy
from snn_rl.share import write_nir, write_onnx
from snn_rl.vision import load_classifier

ENDINGS = (".nir", ".onnx")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    parser = Parser(__doc__, prog=prog)
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="an agent's policy.safetensors, or a classifier's model.safetensors"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write; its name ends in .nir or .onnx")
    options = parser.parse_args(argv)
    return exit_status(lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    if options.out.suffix not in ENDINGS:
        raise ValueError(f"the file to write must end in {' or '.join(ENDINGS)}, got {options.out.name!r}")
    network, example, images = _load(options.file)
    if options.out.suffix == ".nir":
        write_nir(network, tuple(example.shape[1:]), options.out)
    else:
        write_onnx(network, example, options.out, images=images)
    print(options.out)


def _load(path: Path) -> tuple[SpikingNetwork, torch.Tensor, bool]:
    """The network, an observation (1, ...), and whether it is an image to be divided by 255."""
    images = False
    try:
        policy = load_policy(path)
    except ValueError as no_policy:
        try:
            classifier = load_classifier(path)
        except ValueError:
            raise no_policy from None
        network, size = classifier.network, int(classifier.architecture["image_size"])
        example = torch.zeros(1, 3, size, size)  # normalised, which the caller does
    else:
        network, space = policy.network, policy.observation_space
        if not isinstance(space, spaces.Box):
            raise ValueError(f"{path} takes observations of {space}; only those of a Box can be exported")
        images = policy.policy.normalize_images and is_image_space(space)
        example = torch.from_numpy(np.zeros((1, *space.shape), dtype=space.dtype))
    if not isinstance(network, SpikingNetwork):
        raise ValueError(f"{path} holds an ANN; export a spiking stage")
    return network, example, images
