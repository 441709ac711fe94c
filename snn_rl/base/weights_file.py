"""Files of weights with a description: safetensors, and as JSON all that is needed to rebuild the network.

Reading runs no code from the file: nothing in it is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from snn_rl.base.files import atomic
from snn_rl.base.limits import MAX_TIMESTEPS as MAX_TIMESTEPS


def write_weights(
    path: Path, network: nn.Module, form: str, description: dict[str, Any], *, half: bool = False
) -> None:
    """Write a network's state to ``path``, atomically, ``half`` in float16; ``form`` names what the description means.

    ``form`` is the one key of the file's metadata: safetensors writes several in random order, and a file's checksum is
    to depend on its content alone.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    if half:
        weights = {name: w.half() if w.dtype is torch.float32 else w for name, w in weights.items()}  # no statistics
    with atomic(path) as temporary:
        save_file(weights, temporary, metadata={form: json.dumps(description)})


def read_weights(path: Path, form: str, kind: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights of a file that `write_weights` made: a ``kind``, which trainings write as ``name``.

    Raises:
        ValueError: a missing, truncated or foreign file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a training writes STAGE/{name} in it")
    if path.suffix == ".zip":
        raise ValueError(f"{path} is a zip of SB3's, which the scripts do not play; give the {name} beside it")
    if not path.is_file():
        raise ValueError(f"no {kind} file at {path}; a training writes STAGE/{name}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); where it should be one, copy it again"
        ) from error
    if form not in header:
        raise ValueError(f"{path} is a safetensors file, but not a {kind} of this package (its metadata lack {form!r})")
    try:
        description = json.loads(header[form])
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets, thousands deep
        raise ValueError(f"{path} describes no {kind} that can be built: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(
            f"{path} describes no {kind} that can be built: {type(description).__name__} instead of object"
        )
    return description, weights


def check_fits(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of the network that ``build`` makes.

    It is built without memory: a description may speak of any sizes, a file's weights have those it holds.

    Raises:
        ValueError: other names or shapes than the network's, or weights that are not finite.
    """
    with torch.device("meta"):
        expected = build().state_dict()
    if odd := expected.keys() ^ weights.keys():
        raise ValueError(f"its weights do not fit its description: {sorted(odd)[:3]}")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"its weights do not fit its description: {name} has shape {tuple(weight.shape)} instead of "
                f"{tuple(expected[name].shape)}"
            )
        if weight.is_floating_point() != expected[name].is_floating_point() or not torch.isfinite(weight).all():
            raise ValueError(f"{name} must hold finite numbers like {expected[name].dtype}, got {weight.dtype}, or NaN")
