"""Policy files: what comes back acts as what was saved, and nothing foreign gets in."""

from __future__ import annotations

import json
import linecache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch.fx.graph_module import _loader

from envs.atari import make_atari
from snn_rl import SpikingDQN, load_policy, save_policy
from snn_rl.rl import ConvExtractor, policy_file
from snn_rl.rl.policy_file import FORMAT, check_space

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
        assert len(loaded_state) == len(state or ())


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
        (
            {"action_space": {"type": "Box", "low": 0, "high": 1, "shape": [1], "dtype": "float32"}},
            "an actor of values cannot choose among Box",
        ),
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


class Planes(gym.Env[np.ndarray, int]):
    """Observations of any space, two actions."""

    def __init__(self, observation_space: gym.spaces.Space[Any], actions: gym.spaces.Discrete | None = None) -> None:
        self.observation_space = observation_space
        self.action_space = actions or gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


def test_planes_of_booleans_come_back(tmp_path: Path) -> None:
    space = gym.spaces.Box(0, 1, (5, 5, 2), np.bool_)
    agent = SpikingDQN("MlpPolicy", Planes(space), policy_kwargs={"net_arch": [8]}, buffer_size=1000, device="cpu")
    save_policy(agent, tmp_path / "policy.safetensors", {})
    policy = load_policy(tmp_path / "policy.safetensors")
    assert policy.observation_space == space
    obs = np.random.default_rng(0).random((20, 5, 5, 2)) < 0.5
    np.testing.assert_array_equal(policy.predict(obs)[0], agent.predict(obs, deterministic=True)[0])


def test_sizes_of_numpys_numbers_are_stored(tmp_path: Path) -> None:
    kwargs = {"net_arch": [np.int64(8)], "leak": np.float32(0.5), "timesteps": 2, "persistent": np.bool_(True)}
    agent = SpikingDQN("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, buffer_size=1000, device="cpu")
    save_policy(agent, tmp_path / "policy.safetensors", {"score": np.float64(1.5), "seed": np.int32(3)})
    policy = load_policy(tmp_path / "policy.safetensors")
    assert policy.metadata["net_arch"] == [8]
    assert policy.metadata["provenance"] == {"score": 1.5, "seed": 3}


@pytest.mark.parametrize("provenance", [{"when": object()}, {("a", "b"): 1}, None, [1], "mine"])
def test_provenance_that_a_file_cannot_hold_is_refused(agent: SpikingDQN, tmp_path: Path, provenance: Any) -> None:
    with pytest.raises(ValueError, match=r"provenance must (hold what JSON does|be a dict)"):
        save_policy(agent, tmp_path / "policy.safetensors", provenance)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (gym.spaces.Discrete(3, start=1), "from 0 on"),
        (gym.spaces.Box(-1, 1, (), np.float32), r"must have an axis, got shape \(\)"),
        (gym.spaces.Box(-1, 1, (0,), np.float32), r"1 to 16,777,216 entries, got shape \(0,\)"),
        (gym.spaces.Box(-1, 1, (2**24 + 1,), np.float32), "1 to 16,777,216 entries"),
        (gym.spaces.MultiDiscrete([[2, 3]]), "MultiDiscrete spaces of one axis, from 0 on"),
        (gym.spaces.MultiDiscrete([2, 3], start=[0, 1]), "MultiDiscrete spaces of one axis, from 0 on"),
        (gym.spaces.MultiDiscrete([2, 2**17]), r"must lie in \[1, 65536\], got 131072"),
        (gym.spaces.MultiBinary(2**24 + 1), "1 to 16,777,216 entries"),
        (gym.spaces.Text(3), "knows Box, Discrete, MultiDiscrete, MultiBinary and Dict spaces, not"),
        (gym.spaces.Discrete(2**17), r"must lie in \[1, 65536\], got 131072"),
    ],
)
def test_spaces_that_would_not_come_back_are_refused(space: gym.spaces.Space[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_space(space)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float16, np.float32, np.float64, np.bool_])
def test_a_box_comes_back_as_it_was(dtype: Any) -> None:
    space = gym.spaces.Box(0, 1, (2, 3), dtype)
    check_space(space)
    assert policy_file._space_from_json(policy_file._space_to_json(space)) == space


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32])
def test_bounds_of_integers_come_back_exactly(dtype: Any) -> None:
    bounds = np.iinfo(dtype)
    for low, high in ((bounds.min, bounds.max), (0, bounds.max - 1)):
        space = gym.spaces.Box(low, high, (3,), dtype)
        assert policy_file._space_from_json(json.loads(json.dumps(policy_file._space_to_json(space)))) == space


def test_a_file_of_thousands_of_layers_is_refused(agent: SpikingDQN, path: Path) -> None:
    metadata = load_policy(path).metadata
    weights = load_file(path)
    for metadata["net_arch"] in ([4] * 8000, [4] * 129):
        save_file(weights, path, metadata={FORMAT: json.dumps(metadata)})
        with pytest.raises(ValueError, match=f"at most 128 layers, got {len(metadata['net_arch'])}"):
            load_policy(path)
    kwargs = {"net_arch": [2] * 129}
    deep = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, buffer_size=10, device="cpu")
    with pytest.raises(ValueError, match=r"at most 128 layers, got 129.*keep model\.zip"):
        save_policy(deep, path, {})


def test_loading_leaves_nothing_behind(path: Path) -> None:
    """PyTorch keeps the code that it generates for a graph, and its lines, as long as the process lives."""
    load_policy(path)
    before = len(linecache.cache), len(_loader.eval_cache)
    for _ in range(5):
        load_policy(path)
    assert (len(linecache.cache), len(_loader.eval_cache)) == before


def test_a_zip_of_sb3_is_told_apart_from_a_damaged_file(agent: SpikingDQN, tmp_path: Path) -> None:
    agent.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"model\.zip is a zip of SB3's.*give the policy\.safetensors beside it"):
        load_policy(tmp_path / "model.zip")
