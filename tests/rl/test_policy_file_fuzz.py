"""Mutated policy files: each is refused with one clear error, or is a policy that acts. Nothing in one is ever run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stable_baselines3.common.env_util import make_vec_env

from snn_rl import SpikingDQN, load_policy, save_policy
from snn_rl.rl.policy_file import FORMAT, MAX_OBSERVATION

MUTATIONS = int(os.environ.get("SNN_RL_MUTATIONS", "400"))  # 100,000 take about ten minutes


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kwargs = {"net_arch": [8, 4], "timesteps": 2}
    agent = SpikingDQN("MlpPolicy", make_vec_env("CartPole-v1", 1), policy_kwargs=kwargs, buffer_size=64, device="cpu")
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    save_policy(agent, path, {"recipe": "cartpole"})
    return path


def description(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as opened:
        return dict(json.loads(opened.metadata()[FORMAT]))


def is_refused_or_sound(path: Path) -> bool:
    """Whether the file was refused; else it must act."""
    message, policy = "", None
    try:
        policy = load_policy(path)
    except ValueError as error:
        message = str(error)
    if policy is None:
        assert str(path) in message
        assert "\n" not in message
        return True
    space = policy.observation_space
    observation = np.zeros((1, *(space.shape or ())), dtype=space.dtype)
    actions, state = policy.predict(observation)
    assert policy.action_space.contains(actions[0])
    actions, _ = policy.predict(observation, state)
    assert policy.action_space.contains(actions[0])
    return False


def mutated(whole: bytes, draw: np.random.Generator) -> bytes:
    """Change, insert, cut or repeat a few bytes; more often in the header, where sizes and names are."""
    data = bytearray(whole)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(int(draw.integers(1, 4))):
        at = int(draw.integers(header if draw.random() < 0.8 else len(data)))
        at = min(at, len(data) - 1)
        kind = draw.integers(4)
        if kind == 0:
            data[at] = int(draw.integers(256))
        elif kind == 1:  # a digit: sizes stay sizes
            digits = [i for i in range(8, min(header, len(data))) if 48 <= data[i] <= 57]
            data[digits[int(draw.integers(len(digits)))] if digits else at] = int(draw.integers(48, 58))
        elif kind == 2:
            del data[at : at + int(draw.integers(1, 9))]
        else:
            data[at:at] = data[at : at + int(draw.integers(1, 9))]
        if not data:
            return bytes(data)
    if draw.random() < 0.5:  # a header's length that fits its content again, so that what is in it is read
        end = bytes(data).find(b"}}") + 2 if b"}}" in data else len(data)
        data[:8] = max(0, end - 8).to_bytes(8, "little")
    return bytes(data)


def test_mutated_bytes_are_refused_or_sound(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    path = tmp_path / "policy.safetensors"
    refused = 0
    for seed in range(MUTATIONS):
        path.write_bytes(mutated(whole, np.random.default_rng(seed)))
        try:
            refused += is_refused_or_sound(path)
        except BaseException:
            print(f"mutation seed {seed}")
            raise
    assert refused > MUTATIONS // 2


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 2**40), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a description something stands."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@settings(
    max_examples=max(100, MUTATIONS // 20), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_description_of_anything_is_refused_or_sound(data: st.DataObject, file: Path, tmp_path: Path) -> None:
    changed = description(file)
    where = data.draw(st.sampled_from(list(places(changed))))
    inner: Any = changed
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = data.draw(VALUES)
    path = tmp_path / "policy.safetensors"
    save_file(load_file(file), path, metadata={FORMAT: json.dumps(changed)})
    is_refused_or_sound(path)


def test_code_in_any_field_is_not_run(file: Path, tmp_path: Path) -> None:
    witness = tmp_path / "run"

    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {witness}",))

    bombs = [
        pickle.dumps(Planted(), protocol=0).decode("latin-1"),
        f"__import__('os').system('touch {witness}')",
        f"$(touch {witness})",
        "os.system",
        "!!python/object/apply:os.system",
        {"py/object": "os.system", "__reduce__": ["os.system", [f"touch {witness}"]]},
    ]
    path = tmp_path / "policy.safetensors"
    for bomb in bombs:
        for where in places(description(file)):
            changed = description(file)
            inner: Any = changed
            for key in where[:-1]:
                inner = inner[key]
            inner[where[-1]] = bomb
            save_file(load_file(file), path, metadata={FORMAT: json.dumps(changed)})
            is_refused_or_sound(path)
            assert not witness.exists()
    for whole in (pickle.dumps(Planted()), pickle.dumps(Planted(), protocol=0)):
        path.write_bytes(whole)
        assert is_refused_or_sound(path)
        assert not witness.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net_arch": [0, 4]}, "the sizes of layers must be integers >= 1"),
        ({"net_arch": [10**9, 10**9]}, "its weights do not fit its description"),
        (
            {"observation_space": {"type": "Box", "low": 0, "high": 1, "shape": [10**5] * 3, "dtype": "float32"}},
            f"an observation must have 1 to {MAX_OBSERVATION:,} entries",
        ),
        ({"action_space": {"type": "Discrete", "n": 10**12}}, "the number of actions must lie in"),
        ({"spiking": {"timesteps": 10**9}}, "timesteps must be <= 1024, got 1000000000"),
        ({"spiking": {"timesteps": 2, "persistent": "yes"}}, "persistent must be true or false, got 'yes'"),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(
    change: dict[str, Any], message: str, file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "policy.safetensors"
    save_file(load_file(file), path, metadata={FORMAT: json.dumps({**description(file), **change})})
    with pytest.raises(ValueError, match=message):  # where memory were taken, this would be a MemoryError, or the end
        load_policy(path)


def test_weights_that_are_not_finite_are_refused(file: Path, tmp_path: Path) -> None:
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "p.safetensors", metadata={FORMAT: json.dumps(description(file))})
    with pytest.raises(ValueError, match="must hold finite numbers"):
        load_policy(tmp_path / "p.safetensors")


def test_brackets_in_brackets_are_refused(file: Path, tmp_path: Path) -> None:
    save_file(load_file(file), tmp_path / "p.safetensors", metadata={FORMAT: "[" * 100_000})
    with pytest.raises(ValueError, match="describes no policy that can be built"):
        load_policy(tmp_path / "p.safetensors")
