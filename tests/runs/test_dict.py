"""Dict observations through whole runs: a given agent, a recipe's own DQN, and what is refused before any of it."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from torch import nn

from agents import RECIPES
from snn_rl import load_policy, save_policy
from snn_rl.cli import main
from snn_rl.rl.restarts import RestartingVecEnv
from snn_rl.runs.agent import run
from snn_rl.runs.distil import distil
from snn_rl.runs.recipe import FRESH, SPIKING

ENV_ID = "snn_rl_tests/Dict-v0"
SPACE = spaces.Dict(camera=spaces.Box(0, 255, (36, 40, 1), np.uint8), arm=spaces.Box(-1, 1, (3,), np.float32))


class Reach(gym.Env[Any, Any]):
    """Random observations; the reward is 1 where the action is the sign of the arm's first entry."""

    action_space = spaces.Discrete(2)

    def __init__(self, part: spaces.Space[Any] | None = None, *, camera: bool = True) -> None:
        parts = {key: space for key, space in SPACE.spaces.items() if camera or key != "camera"}
        self.observation_space = spaces.Dict(parts if part is None else {**parts, "part": part})

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        self.obs = self.observation_space.sample()
        return self.obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float((self.obs["arm"][0] > 0) == action)
        self.steps += 1
        self.obs = self.observation_space.sample()
        return self.obs, reward, self.steps == 8, False, {}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gym.register(ENV_ID, Reach)
    yield
    del gym.registry[ENV_ID]


def venv() -> VecMonitor:
    return VecMonitor(DummyVecEnv([Reach] * 2))


def trained(env: Any, activation: type[nn.Module]) -> PPO:
    kwargs = {"net_arch": [64], "activation_fn": activation, "features_extractor_kwargs": {"cnn_output_dim": 4}}
    model = PPO("MultiInputPolicy", env, n_steps=16, batch_size=16, policy_kwargs=kwargs, device="cpu", seed=0)
    model.learn(32)
    return model


@pytest.mark.parametrize(
    ("activation", "stages"), [(nn.ReLU, ["teacher", "T2", "T1"]), (nn.Tanh, ["teacher", "ann", "T1"])]
)
def test_a_zip_of_a_normalised_agent_spikes(activation: type[nn.Module], stages: list[str], tmp_path: Path) -> None:
    env = VecNormalize(venv(), norm_obs_keys=["arm"])
    trained(env, activation).save(tmp_path / "ppo.zip")
    env.save(str(tmp_path / "vecnormalize.pkl"))
    words = ["spike", str(tmp_path / "ppo.zip"), "--env-id", ENV_ID, "--smoke", "--run-dir", str(tmp_path / "run")]
    words += [
        "--vecnormalize",
        str(tmp_path / "vecnormalize.pkl"),
        "--schedule",
        *[s[1:] for s in stages if s[0] == "T"],
    ]
    assert main(words) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == stages
    file = tmp_path / "run" / "T1" / "policy.safetensors"
    policy = load_policy(file)
    statistics = policy.policy.statistics
    assert statistics is not None
    np.testing.assert_array_equal(statistics.mean["arm"], env.obs_rms["arm"].mean)  # type: ignore[index]
    assert main(["evaluate", str(file), "--episodes", "2"]) == 0
    assert main(["export", str(file), str(tmp_path / "policy.nir")]) == 2


def test_distil_in_a_program() -> None:
    small = {"parent_steps": 64, "distillation_updates": 3, "env_steps": 32, "buffer_size": 200}
    spiking, fresh = (dataclasses.replace(config, **small) for config in (SPIKING, FRESH))
    env = VecNormalize(venv(), norm_obs_keys=["arm"])
    distilled = distil(trained(env, nn.Tanh), env, (2, 1), episodes=2, net_arch=(64,), spiking=spiking, fresh=fresh)
    assert [stage.name for stage in distilled.stages] == ["teacher", "ann", "T2", "T1"]
    statistics = distilled.agent.policy.statistics
    assert statistics is not None
    np.testing.assert_array_equal(statistics.var["arm"], env.obs_rms["arm"].var)  # type: ignore[index]


def test_bad_dicts_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(venv(), nn.ReLU).save(tmp_path / "ppo.zip")
    for part, message in (
        (spaces.Text(4), "the observations 'part' must be Box, Discrete, MultiDiscrete or MultiBinary, got Text"),
        (spaces.Dict(a=spaces.Discrete(2)), "the observations 'part' must not be a Dict in a Dict"),
        (spaces.Box(0, 1, ()), "the observations 'part' must have an axis"),
        (spaces.Discrete(2, start=1), "the observations 'part' must count from 0 on"),
        (spaces.Discrete(2), "ppo.zip"),  # not the agent's space
    ):
        gym.register("snn_rl_tests/Bad-v0", Reach, kwargs={"part": part})
        words = [
            "spike",
            str(tmp_path / "ppo.zip"),
            "--env-id",
            "snn_rl_tests/Bad-v0",
            "--run-dir",
            str(tmp_path / "run"),
        ]
        assert main(words) == 2
        del gym.registry["snn_rl_tests/Bad-v0"]
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1, error
        assert message in error
        assert not (tmp_path / "run").exists()


def test_restarting_environments_show_dicts() -> None:
    env = RestartingVecEnv(venv(), venv(), every=3)
    obs: Any = env.reset()
    assert obs["camera"].shape == (4, 36, 40, 1)
    for step in range(1, 4):
        before = obs
        obs, _, dones, infos = env.step(np.zeros(4, dtype=np.int64))
        assert obs["arm"].shape == (4, 3)
        assert dones.tolist() == [False, False, step == 3, step == 3]
    del before
    last = infos[2]["terminal_observation"]
    assert last.keys() == SPACE.spaces.keys()
    assert not np.array_equal(last["camera"], obs["camera"][2])  # which is of the next episode


@pytest.mark.parametrize("rewards", [False, True])
def test_a_recipe_trains_its_own_dqn(rewards: bool, tmp_path: Path) -> None:
    def make(n: int, *, seed: int) -> VecMonitor:
        env = VecMonitor(DummyVecEnv([lambda: Reach(spaces.Discrete(3), camera=False)] * n))
        env.seed(seed)
        return env

    recipe = RECIPES["cartpole"].smoke()
    recipe = dataclasses.replace(
        recipe,
        name="reach",
        env_id=ENV_ID,
        make_env=make,
        env_kwargs={},
        schedule=(2, 1),
        network=dataclasses.replace(recipe.network, net_arch=(16,)),
        snn=dataclasses.replace(recipe.snn, rewards=rewards, td_weight=float(rewards)),
        ann=dataclasses.replace(recipe.ann, drop_dead_units=True),
    )
    with pytest.raises(ValueError, match=r"ann.drop_dead_units of reach must be False for Dict observations"):
        run(recipe, tmp_path / "run", device="cpu")
    recipe = dataclasses.replace(recipe, ann=dataclasses.replace(recipe.ann, drop_dead_units=False))
    convolutional = dataclasses.replace(recipe.network, convolutions=((4, 3, 2),))
    with pytest.raises(ValueError, match="ConvExtractor needs observations"):
        run(dataclasses.replace(recipe, network=convolutional), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    results = run(recipe, tmp_path / "run", device="cpu")
    assert [stage["stage"] for stage in results["stages"]] == ["ann", "T2", "T1"]
    for stage in ("ann", "T2", "T1"):
        space = load_policy(tmp_path / "run" / stage / "policy.safetensors").observation_space
        assert isinstance(space, spaces.Dict)


def test_an_ann_of_a_dict_in_another_order_is_refused(tmp_path: Path) -> None:
    """The keys' order is that of the columns behind the features extractor, and gymnasium does not compare it."""
    parts = [("arm", SPACE["arm"]), ("part", spaces.Discrete(3))]

    def env_in(order: list[tuple[str, Any]]) -> Any:
        env = Reach(spaces.Discrete(3), camera=False)
        env.observation_space = spaces.Dict(OrderedDict(order))
        return env

    dqn = DQN("MultiInputPolicy", env_in(parts), policy_kwargs={"net_arch": [16]}, buffer_size=1, device="cpu")
    save_policy(dqn, tmp_path / "ann.safetensors", {})
    recipe = RECIPES["cartpole"].smoke()

    def make(order: list[tuple[str, Any]]) -> Any:
        return lambda n, *, seed: VecMonitor(DummyVecEnv([lambda: env_in(order)] * n))

    same, other = (
        dataclasses.replace(recipe, name="reach", env_id=ENV_ID, make_env=make(order), env_kwargs={}, schedule=(1,))
        for order in (parts, parts[::-1])
    )
    with pytest.raises(ValueError, match=r"was trained with observation_space Dict\('arm'.*but reach has Dict\('part'"):
        run(other, tmp_path / "run", device="cpu", ann=tmp_path / "ann.safetensors")
    assert not (tmp_path / "run").exists()
    results = run(same, tmp_path / "run", device="cpu", ann=tmp_path / "ann.safetensors")
    assert [stage["stage"] for stage in results["stages"]] == ["ann", "T1"]
