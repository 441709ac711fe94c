"""`spike`: from the zip of an agent to the stages of a run, by recipes of seconds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize
from torch import nn

from snn_rl import Student, load_policy
from snn_rl.rl.evaluation import evaluate
from snn_rl.rl.recurrent import RecurrentLearner
from snn_rl.runs.given import Given
from snn_rl.runs.recipe import SEEDS_PER_RUN, TEST_SEEDS, NetworkConfig, SpikeRecipe
from snn_rl.runs.registered import registered
from snn_rl.runs.results import load_results
from snn_rl.runs.spike import spike

SEED = 3


def smoke(make_env: Any = None, env_id: str = "CartPole-v1", **changes: Any) -> SpikeRecipe:
    recipe = SpikeRecipe(
        name="mine",
        env_id=env_id,
        make_env=make_env or registered(env_id),
        network=NetworkConfig(net_arch=(24,)),
        schedule=(2, 1),
    )
    recipe = recipe.smoke()
    return dataclasses.replace(recipe, **{"num_envs": 4, **changes})


def saved(model: BaseAlgorithm, folder: Path) -> Given:
    model.save(folder / "agent.zip")
    return Given(folder / "agent.zip", type(model).__name__.lower())


def ppo(env: Any = "CartPole-v1", activation: type[nn.Module] = nn.Tanh) -> PPO:
    kwargs = {"net_arch": [40, 32], "activation_fn": activation}
    return PPO("MlpPolicy", env, policy_kwargs=kwargs, device="cpu", seed=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Given]:
    """Of a tanh teacher, which teaches an ordinary network first."""
    folder = tmp_path_factory.mktemp("spike")
    given = saved(ppo(), folder)
    spike(smoke(), given, folder / "run", SEED)
    return folder / "run", given


def test_the_stages_of_a_teacher_whose_network_does_not_convert(finished: tuple[Path, Given]) -> None:
    folder, given = finished
    recipe = smoke()
    results = load_results(folder)
    stages = results["stages"]
    assert (results["recipe"], results["env_id"], results["seed"]) == ("mine", "CartPole-v1", SEED)
    assert [stage["stage"] for stage in stages] == ["teacher", "ann", "T2", "T1"]
    assert [stage["timesteps"] for stage in stages] == [None, None, 2, 1]
    assert [stage["parent"] for stage in stages] == [str(given.path), "teacher", "ann", "T2"]
    played = [0, *[config.parent_steps + config.env_steps for config in (recipe.fresh, recipe.snn, recipe.snn)]]
    assert [stage["env_steps"] for stage in stages] == played
    for stage in stages:
        name, spikes = stage["stage"], stage["timesteps"] is not None
        assert len(stage["eval"]["returns"]) == stage["eval"]["episodes"] == recipe.eval_episodes
        assert stage["eval"]["mean"] == pytest.approx(np.mean(stage["eval"]["returns"]))
        assert (stage["updates"] > 0) == (name != "teacher")
        assert (stage["spike_rate"] is not None) == (stage["energy"] is not None) == spikes
        assert bool(stage["threshold"]) == bool(stage["leak"]) == spikes
        files = {path.name for path in (folder / name).iterdir() if not path.name.startswith("events")}
        trained = {"model.zip", "policy.safetensors"} if name != "teacher" else set()
        assert files == trained | {"metrics.json"}
        if spikes:
            assert stage["spike_rate"]["layers"].keys() == stage["threshold"].keys()
            assert stage["energy"]["ann_ops"] == 4 * 24 + 24 * 2  # of the new network, not of the teacher's


def test_what_is_measured_is_what_plays(finished: tuple[Path, Given]) -> None:
    """The teacher by SB3's own evaluation, a stage from its file, each on the test seeds of this run."""
    folder, given = finished
    for stage in load_results(folder)["stages"]:
        env = smoke().build_env(2, TEST_SEEDS + SEED * SEEDS_PER_RUN)
        if stage["stage"] == "teacher":
            model = PPO.load(given.path, device="cpu")
            returns, _ = evaluate_policy(model, env, 2, return_episode_rewards=True)
        else:
            policy = load_policy(folder / stage["stage"] / "policy.safetensors")
            assert policy.timesteps == stage["timesteps"]
            assert policy.metadata["provenance"]["stage"] == stage["stage"]
            returns = evaluate(policy, env, 2).returns
        assert stage["eval"]["returns"] == returns


def test_the_same_call_does_nothing_more(finished: tuple[Path, Given]) -> None:
    folder, given = finished
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.zip")}
    assert spike(smoke(), given, folder, SEED) == load_results(folder)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.zip")} == before


def test_another_agent_seed_or_recipe_is_refused(finished: tuple[Path, Given], tmp_path: Path) -> None:
    folder, given = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for recipe, agent, seed, message in (
        (smoke(), saved(ppo(), tmp_path), SEED, "belongs to another run: its ann is .*agent.zip"),
        (smoke(), given, 4, "belongs to another run: its seed is 3, not 4"),
        (smoke(schedule=(3, 1)), given, SEED, r"belongs to another run: its schedule is \[2, 1\], not \[3, 1\]"),
        (
            smoke(fresh=dataclasses.replace(smoke().fresh, parent_eps=0.5)),
            given,
            SEED,
            "another run: its fresh.parent_eps is 0.0, not 0.5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            spike(recipe, agent, folder, seed)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# --- teachers of every kind


class Turns(gym.Env[np.ndarray, Any]):
    """Random observations of two sizes, in episodes of 15 steps, with a reward for large actions."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space

    def seen(self) -> np.ndarray:
        return self.np_random.normal([5.0, 0.0, -2.0], [3.0, 1.0, 0.1]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 15
        return self.seen(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.left -= 1
        return self.seen(), float(np.sum(action)), self.left == 0, False, {}


def turns(space: spaces.Space[Any]) -> Callable[..., VecEnv]:
    def make(num_envs: int, *, seed: int) -> VecEnv:
        env = VecMonitor(DummyVecEnv([lambda: Turns(space)] * num_envs))
        env.seed(seed)
        return env

    return make


@pytest.mark.parametrize(
    ("space", "head"),
    [
        (spaces.MultiDiscrete([2, 3]), "logits"),
        (spaces.MultiBinary(3), "logits"),
        (spaces.Box(np.array([-1, 0], np.float32), np.array([1, 5], np.float32)), "mean"),
    ],
    ids=["multi-discrete", "bits", "box"],
)
def test_a_relu_network_of_any_actions_is_converted(space: spaces.Space[Any], head: str, tmp_path: Path) -> None:
    make = turns(space)
    given = saved(ppo(make(1, seed=0), nn.ReLU), tmp_path)
    results = spike(smoke(make, "Turns-v0"), given, tmp_path / "run", SEED)
    assert [stage["stage"] for stage in results["stages"]] == ["teacher", "T2", "T1"]
    policy = load_policy(tmp_path / "run" / "T1" / "policy.safetensors")
    assert (policy.metadata["head"], policy.metadata["net_arch"]) == (head, [40, 32])
    assert policy.action_space == space


def test_a_recurrent_teacher_in_a_vecnormalize(tmp_path: Path) -> None:
    """It labels with the state of its LSTM, and its statistics are part of every stage's file."""
    space = spaces.Discrete(3)
    env = VecNormalize(turns(space)(2, seed=0))
    kwargs = {"lstm_hidden_size": 8, "net_arch": [8]}
    model = RecurrentPPO("MlpLstmPolicy", env, policy_kwargs=kwargs, n_steps=64, device="cpu", seed=0).learn(128)
    env.save(str(tmp_path / "vecnormalize.pkl"))
    given = dataclasses.replace(saved(model, tmp_path), vecnormalize=tmp_path / "vecnormalize.pkl")
    recipe = smoke(turns(space), "Turns-v0")
    results = spike(recipe, given, tmp_path / "run", SEED)
    assert [stage["stage"] for stage in results["stages"]] == ["teacher", "ann", "T2", "T1"]
    raw = np.random.default_rng(0).normal([5.0, 0.0, -2.0], 1.0, (20, 3)).astype(np.float32)
    for stage in ("ann", "T2", "T1"):
        normalizer = load_policy(tmp_path / "run" / stage / "policy.safetensors").policy.net.normalizer
        assert normalizer is not None
        np.testing.assert_array_equal(normalizer(torch.as_tensor(raw)).numpy(), env.normalize_obs(raw))
    # the teacher's returns are SB3's, which carries the LSTM's state and normalises the same
    played_in = VecNormalize.load(
        str(tmp_path / "vecnormalize.pkl"), recipe.build_env(2, TEST_SEEDS + SEED * SEEDS_PER_RUN)
    )
    played_in.training = played_in.norm_reward = False
    returns, _ = evaluate_policy(model, played_in, 2, return_episode_rewards=True)
    assert results["stages"][0]["eval"]["returns"] == returns


# --- kills


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["ann", "T2", "T1"])
@pytest.mark.parametrize("moment", ["collect", "distil", "learn"])
def test_a_kill_in_the_middle_of_a_stage_is_resumed_by_the_same_call(
    moment: str, stage: str, finished: tuple[Path, Given], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, given = finished
    recipe = smoke(checkpoint_every=64)
    at = {"ann": 1, "T2": 2, "T1": 3}[stage]
    calls: list[str] = []
    taught_by: list[Any] = []

    def watch(name: str, *, kill: bool) -> None:
        method = getattr(RecurrentLearner, name)

        def watched(self: Student, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            if name != "distil" or not calls or calls[-1] != "distil":  # its pieces are one
                calls.append(name)
            if name == moment and kill and calls.count(name) == at:
                raise Killed
            taught_by.append(self.teacher)
            return result

        monkeypatch.setattr(Student, name, watched)

    with monkeypatch.context():
        for name in ("collect", "distil", "learn"):
            watch(name, kill=True)
        with pytest.raises(Killed):
            spike(recipe, given, tmp_path, SEED)
        monkeypatch.undo()
    assert calls == ["collect", "distil", "learn"] * (at - 1) + ["collect", "distil", "learn"][: ORDER[moment] + 1]
    calls.clear()
    for name in ("collect", "distil", "learn"):
        watch(name, kill=False)
    results = spike(recipe, given, tmp_path, SEED)
    # What had ended with a checkpoint is not done again. A collection writes one at its end, as does each piece of a
    # distillation: the last piece, in which it was killed here, is made again.
    done = ORDER[moment]
    assert calls[: 3 - done] == ["collect", "distil", "learn"][done:]
    assert calls.count("learn") == 4 - at
    assert all(teacher is not None for teacher in taught_by)
    expected = load_results(whole)
    for ours, theirs in zip(results["stages"], expected["stages"], strict=True):
        for key in ("stage", "timesteps", "parent", "env_steps"):
            assert ours[key] == theirs[key]
    for ours, theirs in list(zip(results["stages"], expected["stages"], strict=True))[:at]:
        assert ours["eval"] == theirs["eval"]  # stages before the kill are those of a run without one
    assert not list(tmp_path.rglob("checkpoint*"))


ORDER = {"collect": 0, "distil": 1, "learn": 2}


# --- bad input


def test_what_cannot_teach_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    overflowing = ppo()
    with torch.no_grad():
        overflowing.policy.mlp_extractor.policy_net[0].bias.fill_(1e3)
        overflowing.policy.mlp_extractor.policy_net[2].weight.fill_(1.0)  # whose tanh is 1
        overflowing.policy.action_net.weight.fill_(3e38)  # type: ignore[union-attr]
    folder = tmp_path / "run"
    too_large = saved(overflowing, tmp_path)
    with pytest.raises(ValueError, match=r"the outputs of .*agent.zip hold NaN or infinity where an episode begins"):
        spike(smoke(), too_large, folder, SEED)
    given = saved(ppo(), tmp_path)
    unmonitored = smoke(lambda n, *, seed: DummyVecEnv([lambda: gym.make("CartPole-v1")] * n))
    from_one = turns(spaces.Discrete(2, start=1))
    for recipe, agent, seed, device, message in (
        (smoke(), dataclasses.replace(given, path=tmp_path / "none.zip"), 0, "cpu", "none.zip"),
        (smoke(), dataclasses.replace(given, algo="sac"), 0, "cpu", "agent.zip: .*sac"),
        (smoke(env_id="Pendulum-v1"), given, 0, "cpu", r"agent.zip: its .*Discrete\(2\).*Box\(-2.0, 2.0"),
        (smoke(turns(spaces.Discrete(2)), "Turns-v0"), given, 0, "cpu", r"agent.zip: its .*\(4,\).*\(3,\)"),
        (smoke(from_one, "Turns-v0"), given, 0, "cpu", r"mine: .*from 0 on, not Discrete\(2, start=1\)"),
        (unmonitored, given, 0, "cpu", "make_env of mine must return monitored environments"),
        (smoke(), given, -1, "cpu", r"seed must lie in \[0, 100000\), got -1"),
        (smoke(), given, 0, "tpu", "unknown device 'tpu'; use auto, cpu or cuda"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            spike(recipe, agent, folder, seed, device=device)
        assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_a_recipe_checks_the_numbers_of_both_kinds_of_stage() -> None:
    for changes, message in (
        ({"schedule": (1, 2)}, "schedule must be decreasing"),
        (
            {"fresh": dataclasses.replace(smoke().fresh, parent_eps=1.5)},
            r"fresh.parent_eps must lie in \[0, 1\], got 1.5",
        ),
        ({"fresh": dataclasses.replace(smoke().fresh, batch_size=0)}, "fresh.batch_size must be >= 1, got 0"),
        ({"snn": dataclasses.replace(smoke().snn, leak=2.0)}, r"snn.leak must lie in \[0, 1\], got 2.0"),
        (
            {"fresh": dataclasses.replace(smoke().fresh, train_every=6)},
            r"fresh.train_every must be a multiple of num_envs \(4\), got 6",
        ),
        ({"snn": dataclasses.replace(smoke().snn, rewards=True)}, "without rewards; leave rewards at False"),
        (
            {"fresh": dataclasses.replace(smoke().fresh, learning_rate=1e-4)},
            "fresh.play_learning_rate must be <= fresh.learning_rate",
        ),
        (
            {"fresh": dataclasses.replace(smoke().fresh, buffer_size=2, sequence_length=8)},
            "fresh.parent_steps and fresh.buffer_size must be >= 32, a window of each environment, got 256 and 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            smoke(**changes)


def test_the_smoke_recipe_is_told_apart() -> None:
    whole = SpikeRecipe(name="mine", env_id="CartPole-v1", make_env=registered("CartPole-v1"))
    assert not SpikeRecipe.is_smoke(whole.as_dict())
    assert SpikeRecipe.is_smoke(json.loads(json.dumps(whole.smoke().as_dict())))
