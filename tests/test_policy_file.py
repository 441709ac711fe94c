"""Policy files: what comes back acts as what was saved, and nothing foreign gets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from envs.atari import make_atari
from snn_rl import SpikingDQN, load_policy, save_policy
from snn_rl.dqn import ConvExtractor
from snn_rl.policy_file import FORMAT

PROVENANCE = {"recipe": "cartpole", "env_id": "CartPole-v1", "env_kwargs": {}, "seed": 0, "stage": "T3"}


@pytest.fixture(scope="module")
def agent() -> SpikingDQN:
    env = make_vec_env("CartPole-v1", 2, seed=0)
    kwargs = {"net_arch": [16, 16], "timesteps": 3, "leak": 0.7}
    return SpikingDQN("MlpPolicy", env, policy_kwargs=kwargs, buffer_size=1000, seed=0, device="cpu").learn(200)


@pytest.fixture
def path(agent: SpikingDQN, tmp_path: Path) -> Path:
    save_policy(agent, tmp_path / "policy.safetensors", PROVENANCE)
    return tmp_path / "policy.safetensors"


def test_a_loaded_policy_acts_as_the_saved_one(agent: SpikingDQN, path: Path) -> None:
    policy = load_policy(path)
    assert policy.timesteps == 3
    assert policy.metadata["provenance"] == PROVENANCE
    assert policy.observation_space == agent.observation_space
    assert policy.action_space == agent.action_space
    obs = np.random.default_rng(0).normal(size=(5, 40, 4)).astype(np.float32)
    states: list[Any] = [None, None]
    for frame in obs:
        actions = []
        for k, who in enumerate((agent, policy)):
            action, states[k] = who.predict(frame, states[k], deterministic=True)
            actions.append(action)
        np.testing.assert_array_equal(*actions)
        for ours, theirs in zip(*states, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_evaluate_policy_takes_it(path: Path) -> None:
    mean, _ = evaluate_policy(load_policy(path), make_vec_env("CartPole-v1", 2, seed=1), 4)  # type: ignore[arg-type]
    assert mean >= 8  # the shortest fall


def test_an_ann_and_a_convolutional_policy(tmp_path: Path) -> None:
    env = make_atari("pong", 2, seed=0, image_size=36)
    kwargs: dict[str, Any] = {
        "net_arch": [],
        "features_extractor_class": ConvExtractor,
        "features_extractor_kwargs": {"features_dim": 16, "convolutions": ((4, 8, 4), (4, 3, 2))},
    }
    ann = DQN("CnnPolicy", env, policy_kwargs=kwargs, buffer_size=100, device="cpu")
    snn = SpikingDQN.from_ann(ann, env, timesteps=2, calibration_steps=20, buffer_size=100, device="cpu")
    obs = env.reset()
    for model, timesteps in ((ann, None), (snn, 2)):
        save_policy(model, tmp_path / "p.safetensors", PROVENANCE)
        policy = load_policy(tmp_path / "p.safetensors")
        assert policy.timesteps == timesteps
        expected, state = model.predict(obs, deterministic=True)  # type: ignore[arg-type]
        actions, loaded_state = policy.predict(obs)  # type: ignore[arg-type]
        np.testing.assert_array_equal(actions, expected)
        assert (loaded_state is None) == (state is None)


def test_an_unknown_features_extractor_is_refused(tmp_path: Path) -> None:
    class Mine(FlattenExtractor):
        pass

    env = make_vec_env("CartPole-v1", 1)
    model = SpikingDQN(
        "MlpPolicy", env, policy_kwargs={"features_extractor_class": Mine}, buffer_size=100, device="cpu"
    )
    with pytest.raises(ValueError, match="features extractor 'Mine' cannot be stored"):
        save_policy(model, tmp_path / "p.safetensors", PROVENANCE)
    assert not list(tmp_path.iterdir())


def test_another_activation_is_refused(tmp_path: Path) -> None:
    dqn = DQN("MlpPolicy", make_vec_env("CartPole-v1", 1), policy_kwargs={"activation_fn": nn.Tanh}, buffer_size=100)
    with pytest.raises(ValueError, match="activation Tanh cannot be stored in a policy file, which knows ReLU"):
        save_policy(dqn, tmp_path / "p.safetensors", PROVENANCE)
    assert not list(tmp_path.iterdir())


def test_missing_truncated_and_foreign_files_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no policy file at .*nowhere"):
        load_policy(tmp_path / "nowhere")
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a readable safetensors file"):
            load_policy(path)
    path.write_bytes(b"PK\x03\x04 a zip, perhaps")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_policy(path)
    path.write_bytes(whole)
    save_file(load_file(path), tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="but not a policy of this package"):
        load_policy(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features_extractor": "os.system"}, "unknown features extractor 'os.system'"),
        ({"observation_space": {"type": "pickle"}}, "unknown space 'pickle'"),
        ({"net_arch": [8, 8]}, "its weights do not fit its description"),
        ({"net_arch": None}, "describes no policy that can be built"),
        ({"spiking": {"timesteps": 0}}, "timesteps must be an integer >= 1, got 0"),
        ({"spiking": {"backdoor": 1}}, "describes no policy that can be built"),
        (
            {"observation_space": {"type": "Box", "low": -1, "high": 1e9, "shape": [4], "dtype": "uint8"}},
            "describes no policy that can be built",
        ),
        ({"action_space": {"type": "Discrete", "n": 0}}, "describes no policy that can be built"),
        ({"action_space": {"type": "Box", "low": 0, "high": 1, "shape": [1], "dtype": "float32"}}, "must be Discrete"),
    ],
)
def test_a_changed_description_is_refused(path: Path, change: dict[str, Any], message: str) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        policy = {**json.loads(file.metadata()[FORMAT]), **change}
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(policy)})
    with pytest.raises(ValueError, match=message):
        load_policy(path)


def test_writing_again_replaces_the_whole_file(agent: SpikingDQN, path: Path) -> None:
    before = path.read_bytes()
    for _ in range(20):  # the bytes, and so the checksum, depend on the policy alone
        save_policy(agent, path, PROVENANCE)
        assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["policy.safetensors"]
    assert path.stat().st_mode & 0o444 == 0o444
