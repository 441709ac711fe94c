"""What a user of SB3's DQN expects of `SpikingDQN`, with that DQN as the oracle."""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.preprocessing import maybe_transpose
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack
from torch import nn

from snn_rl import SpikingDQN, Student, load_policy, save_policy
from snn_rl.rl import SequenceReplayBuffer, StackedTeacher
from snn_rl.rl.spaces import UnsupportedSpaceError

SMALL: dict[str, Any] = {"buffer_size": 1_000, "policy_kwargs": {"net_arch": [16]}, "device": "cpu"}
SPIKING: dict[str, Any] = {"buffer_size": 1_000, "batch_size": 4, "sequence_length": 4, "burn_in": 0, "device": "cpu"}
ZEROS = np.zeros((1, 4), np.float32)


class Played(gym.Env):
    """Random observations of any space, in episodes of ten steps; keeps what it showed and what was done."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space | None = None) -> None:
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = spaces.Discrete(3) if action_space is None else action_space
        self.observation_space.seed(0)
        self.shown: list[Any] = []
        self.actions: list[int] = []

    def _show(self) -> Any:
        self.shown.append(self.observation_space.sample())
        return self.shown[-1]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        self.actions.append(int(action))
        return self._show(), 1.0, self.t >= 10, False, {}


def box(*shape: int, dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(0, 1, shape, dtype)


# --- seeds


def build(cls: type[DQN], seed: int | None = 0) -> DQN:
    return cls("MlpPolicy", "CartPole-v1", seed=seed, **SMALL)


def draws(model: DQN) -> list[int]:
    model.exploration_rate = 1.0
    return [int(model.predict(ZEROS)[0][0]) for _ in range(40)]


@pytest.mark.parametrize("cls", [DQN, SpikingDQN])
def test_set_random_seed_decides_exploration(cls: type[DQN]) -> None:
    model = build(cls)
    played = []
    for seed in (1, 1, 2):
        model.set_random_seed(seed)
        played.append(draws(model))
    assert played[0] == played[1]
    assert played[0] != played[2]


@pytest.mark.parametrize("cls", [DQN, SpikingDQN])
def test_the_seed_of_load_decides_exploration(cls: type[DQN], tmp_path: Path) -> None:
    model = build(cls)
    draws(model)
    model.save(tmp_path / "model.zip")
    played = [draws(cls.load(tmp_path / "model.zip", device="cpu", seed=seed)) for seed in (1, 1, 2, 0)]
    assert played[0] == played[1]
    assert played[0] != played[2]
    assert played[3] == draws(build(cls, seed=0))


@pytest.mark.parametrize("seed", [0, None])
def test_a_load_without_a_seed_goes_on_where_the_saved_agent_stopped(seed: int | None, tmp_path: Path) -> None:
    model = build(SpikingDQN, seed)
    draws(model)
    model.save(tmp_path / "model.zip")
    expected = draws(model)
    assert draws(SpikingDQN.load(tmp_path / "model.zip", device="cpu")) == expected
    assert draws(SpikingDQN.load(tmp_path / "model.zip", device="cpu", seed=None)) == expected


def test_a_zip_without_a_generator_starts_from_its_seed(tmp_path: Path) -> None:
    model = build(SpikingDQN, seed=3)
    draws(model)
    model.save(tmp_path / "older.zip", exclude=["_exploration"])
    assert draws(SpikingDQN.load(tmp_path / "older.zip", device="cpu")) == draws(build(SpikingDQN, seed=3))
    build(SpikingDQN, seed=None).save(tmp_path / "unseeded.zip", exclude=["_exploration"])
    assert len(set(draws(SpikingDQN.load(tmp_path / "unseeded.zip", device="cpu")))) == 2


def test_without_a_seed_sb3s_global_one_decides() -> None:
    played = []
    for seed in (5, 5, 6):
        set_random_seed(seed)
        played.append(draws(build(SpikingDQN, seed=None)))
    assert played[0] == played[1]
    assert played[0] != played[2]


def test_random_actions_before_learning_starts_follow_the_seed_and_go_on_after_a_load(tmp_path: Path) -> None:
    def warm_up(seed: int) -> tuple[SpikingDQN, Played]:
        env = Played(box(4))
        return SpikingDQN("MlpPolicy", env, learning_starts=1_000, seed=seed, **SMALL).learn(60), env

    model, env = warm_up(0)
    assert set(env.actions) == {0, 1, 2}
    assert env.actions == warm_up(0)[1].actions
    assert env.actions != warm_up(1)[1].actions
    model.save(tmp_path / "model.zip")
    model.learn(60, reset_num_timesteps=False)
    again = Played(box(4))
    SpikingDQN.load(tmp_path / "model.zip", env=again, device="cpu").learn(60, reset_num_timesteps=False)
    assert again.actions == env.actions[60:]
    assert again.actions != env.actions[:60]


def test_conversion_and_pruning_follow_their_seed() -> None:
    dqn = build(DQN)
    dqn.exploration_rate = 0.5

    def converted(seed: int) -> tuple[list[int], torch.Tensor, list[int]]:
        agent = SpikingDQN.from_ann(dqn, "CartPole-v1", 2, calibration_steps=50, seed=seed, **SPIKING)
        child = SpikingDQN.from_parent(agent, "CartPole-v1", 1, seed=seed, **SPIKING)
        return draws(agent), agent.policy.parameters_to_vector(), draws(child)

    first, same, other = converted(1), converted(1), converted(2)
    np.testing.assert_array_equal(first[1], same[1])
    assert (first[0], first[2]) == (same[0], same[2])
    assert first[0] != other[0]
    assert first[2] != other[2]


# --- spaces

SUPPORTED = {
    "bool planes": box(5, 5, 2, dtype=np.bool_),
    "float64": box(4, dtype=np.float64),
    "int64": spaces.Box(-5, 5, (4,), np.int64),
    "matrix": box(3, 4),
    "Discrete": spaces.Discrete(5),
    "MultiDiscrete": spaces.MultiDiscrete([3, 4]),
    "MultiBinary": spaces.MultiBinary((3, 2)),
    "image": spaces.Box(0, 255, (3, 8, 8), np.uint8),
    "image, channels last": spaces.Box(0, 255, (8, 8, 3), np.uint8),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_observations_that_sb3s_dqn_takes(name: str) -> None:
    """The Q-values of the ANN, near enough, and in the replay what the environment showed."""
    space = SUPPORTED[name]
    dqn = DQN("MlpPolicy", Played(space), seed=0, **SMALL)
    env = Played(space)
    agent = SpikingDQN.from_ann(
        dqn, env, 500, leak=1.0, percentile=100.0, calibration_steps=300, learning_starts=10, seed=0, **SPIKING
    )
    assert agent.observation_space == dqn.observation_space
    some = np.array([env.observation_space.sample() for _ in range(64)])
    obs, _ = dqn.policy.obs_to_tensor(maybe_transpose(some, dqn.observation_space))
    with torch.no_grad():
        expected, q_values = dqn.q_net(obs), agent.q_net(obs)[0]
    assert (q_values - expected).norm() < 0.02 * expected.norm()

    env.shown.clear()
    agent.learn(60)
    assert agent._n_updates > 0
    assert agent.replay_buffer is not None
    shown = maybe_transpose(np.array(env.shown), dqn.observation_space)
    held = agent.replay_buffer.frames[0, : agent.replay_buffer.count[0]]
    np.testing.assert_array_equal(held.reshape(shown[: len(held)].shape), shown[: len(held)])
    child = SpikingDQN.from_parent(agent, Played(space), 1, seed=0, **SPIKING)
    child.collect(agent, 40)
    child.collect(dqn, 40)
    child.keep_rates(agent)
    action, _ = child.predict(some[0])  # one bare observation, as the environment shows it
    assert child.action_space.contains(int(action))


TUPLE = spaces.Tuple((box(2), box(2)))
UNSUPPORTED: list[tuple[spaces.Space, spaces.Space, str]] = [
    (box(2), box(2), r"DQN needs a Discrete action space, got Box\(.*\); discretise the actions first"),
    (box(2), spaces.MultiDiscrete([2, 2]), r"DQN needs a Discrete action space, got MultiDiscrete\(\[2 2\]\)"),
    (
        box(2),
        spaces.Discrete(3, start=1),
        r"Discrete actions from 0 on, got Discrete\(3, start=1\); .*to add 1 to each",
    ),
    (box(2), spaces.Discrete(3, start=-1), r"Discrete actions from 0 on, got Discrete\(3, start=-1\); wrap"),
    (
        spaces.Discrete(4, start=2),
        spaces.Discrete(2),
        r"observations must count from 0 on, got Discrete\(4, start=2\);",
    ),
    (
        spaces.MultiDiscrete([2, 3], start=[0, 1]),
        spaces.Discrete(2),
        r"must count from 0 on, got MultiDiscrete\(\[2 3\]",
    ),
    (
        spaces.MultiDiscrete([[2, 3]]),
        spaces.Discrete(2),
        r"observations must have one axis, got MultiDiscrete\(\[\[2 3\]\]",
    ),
    (box(), spaces.Discrete(2), r"observations must have an axis, got Box\(0.0, 1.0, \(\), float32\); .*ReshapeObserv"),
    (box(0), spaces.Discrete(2), r"observations must have an entry, got Box\(.*\(0,\), float32\)"),
    (spaces.Dict(a=spaces.Text(3)), spaces.Discrete(2), "the observations 'a' must be Box, Discrete, .*, got Text"),
    (TUPLE, spaces.Discrete(2), r"observations must be Box, Discrete, MultiDiscrete or MultiBinary, got Tuple"),
]


@pytest.mark.parametrize(("observations", "actions", "message"), UNSUPPORTED)
def test_spaces_that_it_cannot_learn_in(observations: spaces.Space, actions: spaces.Space, message: str) -> None:
    """Refused in one line before anything is built, by the type that SB3 raises for actions, and as a ValueError."""
    for policy in ("MlpPolicy", "CnnPolicy", "MultiInputPolicy"):
        with pytest.raises(AssertionError, match=message) as caught:
            SpikingDQN(policy, Played(observations, actions))
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)
    if isinstance(observations, spaces.Tuple) or not message.startswith("DQN"):
        with pytest.raises(UnsupportedSpaceError, match=message):  # the replay, which takes actions of any kind
            SequenceReplayBuffer(100, observations, actions)


def test_sb3_refuses_the_same_actions_by_the_same_type() -> None:
    for cls in (DQN, SpikingDQN):
        with pytest.raises(AssertionError):
            cls("MlpPolicy", "Pendulum-v1")


def test_the_ways_out_of_spaces_lead_out() -> None:
    wrappers = gym.wrappers
    discrete = Played(spaces.Discrete(4, start=2), spaces.Discrete(3, start=1))
    from_0 = wrappers.TransformAction(discrete, lambda action: action + 1, spaces.Discrete(3))
    for env in (
        wrappers.TransformObservation(from_0, lambda obs: obs - 2, spaces.Discrete(4)),
        wrappers.ReshapeObservation(Played(box()), (1,)),
        wrappers.FlattenObservation(Played(spaces.Dict(a=box(2)))),
        wrappers.FlattenObservation(Played(spaces.MultiDiscrete([[2, 3]]))),
    ):
        SpikingDQN("MlpPolicy", env, learning_starts=0, **SMALL).learn(40)
    assert set(discrete.actions) <= {1, 2, 3}


def test_a_zip_of_an_agent_with_actions_from_1_on_is_refused(tmp_path: Path) -> None:
    """Such an agent could be trained before, and would play other actions than it learnt."""
    agent = build(SpikingDQN)
    agent.action_space = spaces.Discrete(2, start=1)
    agent.save(tmp_path / "older.zip")
    with pytest.raises(UnsupportedSpaceError, match="from 0 on"):
        SpikingDQN.load(tmp_path / "older.zip", device="cpu")


def test_no_environment_is_refused() -> None:
    with pytest.raises(ValueError, match="env must be an environment or the id of one, got None"):
        SpikingDQN("MlpPolicy", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("stack", [1, 2])
def test_images_whose_channels_are_last(stack: int) -> None:
    """As gymnasium shows them, in every place that takes an environment."""
    space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def stacked() -> VecEnv:
        return VecFrameStack(DummyVecEnv([lambda: Played(space)] * 2), 2)

    dqn = DQN("CnnPolicy", stacked(), buffer_size=10, policy_kwargs={"features_extractor_kwargs": {"features_dim": 8}})
    assert dqn.observation_space.shape == (2, 36, 36)
    env: Any = stacked() if stack == 2 else Played(space)
    agent = SpikingDQN.from_ann(dqn, env, 2, calibration_steps=20, **{**SPIKING, "burn_in": 1})
    assert agent.observation_space.shape == (stack, 36, 36)
    assert agent.replay_buffer is not None
    assert agent.replay_buffer.frames.shape[2:] == (1, 36, 36)
    teacher: Any = dqn if stack == 2 else StackedTeacher(dqn, space)
    agent.teacher = teacher
    agent.collect(teacher, 60)
    agent.distil(1)
    child = SpikingDQN.from_parent(agent, stacked() if stack == 2 else Played(space), 1, **SPIKING)
    child.collect(agent, 60)
    child.keep_rates(agent)
    child.learn(8)


def test_a_stacked_teacher_takes_observations_as_the_environment_shows_them() -> None:
    space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    dqn = DQN("CnnPolicy", VecFrameStack(DummyVecEnv([lambda: Played(space)]), 3), buffer_size=10, device="cpu")
    teacher = StackedTeacher(dqn, space)
    frames = np.array([[space.sample()] for _ in range(4)])
    last = first = None
    for frame in frames:
        _, last = teacher.predict(frame, last)
        _, first = teacher.predict(frame.transpose(0, 3, 1, 2), first)
    assert last is not None
    assert first is not None
    np.testing.assert_array_equal(last[0][0], frames[1:, 0, :, :, 0])
    np.testing.assert_array_equal(last[0], first[0])
    with pytest.raises(ValueError, match=r"observations must have shape \(n_envs, 1, 36, 36\), got \(36, 36, 1\)"):
        teacher.predict(frames[0, 0])


def test_an_environment_of_other_spaces_is_refused_before_a_network_is_built() -> None:
    cartpole = build(DQN)
    images = DQN("CnnPolicy", Played(spaces.Box(0, 255, (36, 36, 1), np.uint8)), buffer_size=10, device="cpu")
    message = r"the environment's observation_space is .*, but the agent was trained on .*; build it as for"
    for dqn, env in ((images, "CartPole-v1"), (cartpole, Played(spaces.Box(0, 255, (36, 36, 1), np.uint8)))):
        with pytest.raises(ValueError, match=message) as caught:
            SpikingDQN.from_ann(dqn, env)
        assert "\n" not in str(caught.value)
    parent = SpikingDQN.from_ann(images, Played(spaces.Box(0, 255, (36, 36, 1), np.uint8)), 2, **SPIKING)
    with pytest.raises(ValueError, match=message):
        SpikingDQN.from_parent(parent, "CartPole-v1", 1)
    with pytest.raises(ValueError, match=r"the environment's action_space is Discrete\(3\), but .* Discrete\(2\)"):
        SpikingDQN.from_ann(cartpole, Played(cartpole.observation_space))
    with pytest.raises(UnsupportedSpaceError, match="discretise the actions first"):
        SpikingDQN.from_ann(cartpole, "Pendulum-v1")


# --- arguments, saving


def test_sb3s_arguments_come_first_and_in_sb3s_order() -> None:
    theirs, ours = (list(inspect.signature(cls).parameters) for cls in (DQN, SpikingDQN))
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("truncations", [True, False])
def test_optimize_memory_usage_changes_nothing(truncations: bool, tmp_path: Path) -> None:
    def trained(**kwargs: Any) -> torch.Tensor:
        agent = SpikingDQN(
            "MlpPolicy",
            "CartPole-v1",
            learning_starts=10,
            seed=0,
            replay_buffer_kwargs={"handle_timeout_termination": truncations},
            **kwargs,
            **SMALL,
        )
        agent.learn(60)
        agent.learn(60)  # SB3's buffer truncates the last trajectory here, and warns
        agent.save(tmp_path / "agent.zip")
        return torch.as_tensor(agent.policy.parameters_to_vector())

    assert torch.equal(trained(optimize_memory_usage=True), trained())
    loaded = SpikingDQN.load(tmp_path / "agent.zip", env=gym.make("CartPole-v1"), optimize_memory_usage=True)
    loaded.learn(20)
    loaded.learn(20)


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
@pytest.mark.parametrize("part", ["q_net", "policy"])
def test_a_network_alone_is_saved_and_loaded(policy: str, part: str, tmp_path: Path) -> None:
    env: Any = "CartPole-v1" if policy == "MlpPolicy" else Played(spaces.Box(0, 255, (36, 36, 1), np.uint8))
    kwargs: dict[str, Any] = {"timesteps": 3, "leak": 0.7, "leak_reset": True, "persistent": False}
    if policy == "CnnPolicy":
        kwargs["features_extractor_kwargs"] = {"features_dim": 8}
    agent = SpikingDQN(policy, env, policy_kwargs=kwargs, buffer_size=100, device="cpu")
    agent.q_net.load_state_dict({name: torch.rand_like(p) for name, p in agent.q_net.state_dict().items()})
    saved = getattr(agent, part)
    saved.save(tmp_path / "part.pkl")
    loaded = type(saved).load(tmp_path / "part.pkl")
    q_net, expected = (x if part == "q_net" else x.q_net for x in (loaded, saved))
    assert q_net.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(q_net.state_dict()[name], value), name
    assert (q_net.network.timesteps, q_net.persistent) == (3, False)
    assert all(lif.leak_reset for lif in q_net.network.lif_layers.values())
    obs = torch.as_tensor(np.array([agent.observation_space.sample() for _ in range(8)]))
    with torch.no_grad():
        for ours, theirs in zip(q_net(obs)[1], expected(obs)[1], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cls", [DQN, SpikingDQN])
def test_minus_one_gradient_step_is_one_for_each_transition(cls: type[DQN]) -> None:
    env = DummyVecEnv([lambda: Played(box(4))] * 2)
    model = cls("MlpPolicy", env, learning_starts=0, train_freq=3, gradient_steps=-1, **SMALL)
    if isinstance(model, SpikingDQN):
        model.collect(model, 60)  # updates need a window
    before = model._n_updates
    model.learn(6)
    assert model._n_updates - before == 6


# --- play of others


class Scripted:
    """No agent of SB3's: no spaces, and a state of its own type, which cannot be pickled."""

    def __init__(self, actions: list[Any]) -> None:
        self.actions, self.seen = actions, []

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        assert deterministic
        self.seen.append((state and state["step"], np.asarray(episode_start).tolist()))
        step = 0 if state is None else state["step"]
        return self.actions[step % len(self.actions)], {"step": step + 1, "generator": (i for i in ())}

    def __len__(self) -> int:
        return 0  # an actor all the same


def played(agent: SpikingDQN, i: int = 0) -> list[int]:
    buffer = agent.replay_buffer
    assert buffer is not None
    held = slice(0, buffer.count[i])
    return buffer.slot_actions[i, held][buffer.acted[i, held]].tolist()


def test_any_object_with_predict_fills_the_replay(tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: Played(box(4))] * 2)
    agent = SpikingDQN("MlpPolicy", env, **SMALL)
    actor = Scripted([[0, 1], [2, 2], [1, 0]])
    agent.collect(actor, 24)
    assert played(agent, 0) == [0, 2, 1] * 4
    assert played(agent, 1) == [1, 2, 0] * 4
    assert [step for step, _ in actor.seen] == [None, *range(1, 12)]
    assert [start for _, start in actor.seen] == [[t in (0, 10)] * 2 for t in range(12)]  # episodes of ten steps
    agent.save(tmp_path / "agent.zip")  # without the actor's state


def test_an_actors_exploration_rate_is_followed() -> None:
    agent = SpikingDQN("MlpPolicy", Played(box(4)), seed=0, **SMALL)
    actor: Any = Scripted([[0]])
    actor.exploration_rate = 0.6
    agent.collect(actor, 1_000)
    assert np.mean(played(agent)) == pytest.approx(0.6, abs=0.08)  # a third each of 0, 1 and 2, where it explores


def test_agents_of_sb3_and_policy_files_fill_the_replay(tmp_path: Path) -> None:
    spiking = SpikingDQN("MlpPolicy", "CartPole-v1", seed=1, **SMALL)
    for model, name in ((build(DQN), "ann"), (spiking, "snn")):
        save_policy(model, tmp_path / f"{name}.safetensors", {})
    for actor in (
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu"),
        A2C("MlpPolicy", "CartPole-v1", device="cpu"),
        load_policy(tmp_path / "ann.safetensors"),
        load_policy(tmp_path / "snn.safetensors"),
    ):
        agent = SpikingDQN("MlpPolicy", "CartPole-v1", **SMALL)
        agent.collect(actor, 100)
        buffer = agent.replay_buffer
        assert buffer is not None
        state, greedy = None, []
        for slot in range(buffer.count[0]):  # its play again, from the observations that were stored
            action, after = actor.predict(
                buffer.frames[0, slot][None], state, buffer.episode_start[0, slot : slot + 1], deterministic=True
            )
            if buffer.acted[0, slot]:  # it never saw an episode's last observation
                greedy.append(int(action[0]))
                state = after
        assert played(agent) == greedy  # it has no exploration rate


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        (None, "collect takes an agent that has SB3's predict.*, got None"),
        ("ann.zip", "collect takes an agent that has SB3's predict.*, got a str"),
        (PPO, "collect takes an agent that has SB3's predict.*, got the class PPO"),
        (
            Scripted([[3]]),
            r"a Scripted must choose one of the actions 0 to 2 in each of 1 environments, got \[3\] of int",
        ),
        (Scripted([[-1]]), r"must choose one of the actions 0 to 2 .*, got \[-1\]"),
        (Scripted([[0, 1]]), r"must choose one of the actions 0 to 2 in each of 1 environments, got \[0 1\]"),
        (Scripted([1]), r"must choose one of the actions 0 to 2 in each of 1 environments, got 1 of int"),
        (Scripted([[0.5]]), r"must choose one of the actions 0 to 2 .*, got \[0.5\] of float64"),
    ],
)
def test_what_cannot_act_is_refused_before_the_first_step(actor: Any, message: str) -> None:
    env = Played(box(4))
    agent = SpikingDQN("MlpPolicy", env, **SMALL)
    with pytest.raises(ValueError, match=message) as caught:
        agent.collect(actor, 50)
    assert "\n" not in str(caught.value)
    assert env.actions == []
    agent.learn(20)  # and nothing of it is left behind
    assert len(env.actions) == 20


def test_an_actor_of_other_spaces_is_refused_before_the_first_step() -> None:
    env = Played(box(4))
    agent = SpikingDQN("MlpPolicy", env, **SMALL)
    for actor, message in (
        (
            build(DQN),
            r"this agent's observation_space is .*, but the actor has .*; build it as for that agent's training",
        ),
        (
            DQN("MlpPolicy", Played(box(4), spaces.Discrete(4)), **SMALL),
            "this agent's action_space is .*, but the actor",
        ),
        (
            DQN("MlpPolicy", VecFrameStack(DummyVecEnv([lambda: Played(box(4))]), 2), **SMALL),
            "this agent's observation_space .*; StackedTeacher lets a DQN on a stack of frames act on one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            agent.collect(actor, 50)
    assert env.actions == []


def test_collect_without_an_environment_is_refused(tmp_path: Path) -> None:
    build(SpikingDQN).save(tmp_path / "agent.zip")
    agent = SpikingDQN.load(tmp_path / "agent.zip", device="cpu")
    with pytest.raises(ValueError, match="collect needs an environment; call set_env, or pass env to load"):
        agent.collect(agent, 10)


def test_what_from_ann_and_from_parent_cannot_take(tmp_path: Path) -> None:
    spiking = build(SpikingDQN)
    for model, name in ((build(DQN), "ann"), (spiking, "snn")):
        save_policy(model, tmp_path / f"{name}.safetensors", {})
    ann, snn = (load_policy(tmp_path / f"{name}.safetensors") for name in ("ann", "snn"))
    ppo = PPO(
        "MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, policy_kwargs={"activation_fn": nn.ReLU}, device="cpu"
    )
    for agent, message in (
        (ann, "got a LoadedPolicy; Student.from_ann takes agents of other algorithms, and policy files"),
        (snn, "the agent spikes already; from_parent of its class takes it to fewer timesteps"),
        (ppo, "got a PPO; Student.from_ann takes agents of other algorithms, and policy files"),
        ("dqn.zip", "got a str; DQN.load makes one of an SB3 zip"),
        (None, "got None; DQN.load makes one of an SB3 zip"),
    ):
        with pytest.raises(ValueError, match=message):
            SpikingDQN.from_ann(agent, "no environment is made")  # type: ignore[arg-type]
    for agent, message in (
        (snn, "got a LoadedPolicy; load the agent's SB3 zip by SpikingDQN.load"),
        (ann, "got a LoadedPolicy; of an ANN, SpikingDQN.from_ann makes one"),
        (None, "got None; of an ANN, SpikingDQN.from_ann makes one"),
    ):
        with pytest.raises(ValueError, match=message):
            SpikingDQN.from_parent(agent, "no environment is made", 1)  # type: ignore[arg-type]
    for other in (ann, ppo):  # the way out that the message names
        student = Student.from_ann(other, "CartPole-v1", 1, calibration_steps=20, buffer_size=1_000, device="cpu")
        assert student.timesteps == 1


# --- teachers


def test_a_teacher_is_checked_when_it_is_assigned(tmp_path: Path) -> None:
    agent = SpikingDQN("MlpPolicy", "CartPole-v1", burn_in=1, distillation_weight=1.0, **SMALL)
    agent.save(tmp_path / "agent.zip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded_as_ann = DQN.load(tmp_path / "agent.zip", device="cpu")
    stacked = DQN("MlpPolicy", VecFrameStack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), 3), **SMALL)
    space = agent.observation_space
    ppo = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    for teacher, message in (
        (ppo, "this agent's outputs are values, but the teacher's are logits; use Student.fresh"),
        (tmp_path / "ann.zip", "a teacher must be .*, got a PosixPath"),
        (DQN, "a teacher must be .*, got the class DQN"),
        (DQN("MlpPolicy", "Acrobot-v1", **SMALL), "this agent's observation_space is .*, but the teacher has"),
        (DQN("MlpPolicy", Played(space, spaces.Discrete(3)), **SMALL), "this agent's action_space is .*, but the teac"),
    ):
        with pytest.raises(ValueError, match=message):
            agent.teacher = teacher  # type: ignore[assignment]
        assert agent.teacher is None
    agent.teacher = build(DQN)
    for other in (None, loaded_as_ann):
        agent.teacher = other
    agent.teacher = stacked  # type: ignore[assignment]
    assert isinstance(agent.teacher, StackedTeacher)  # an agent on a stack of frames teaches one on single frames


def test_a_missing_teacher_is_told_before_the_first_step() -> None:
    env = Played(box(4))
    agent = SpikingDQN("MlpPolicy", env, td_weight=0.0, **SMALL)
    with pytest.raises(ValueError, match=r"distillation needs a teacher: assign an agent to `.teacher`"):
        agent.learn(1_000)
    assert env.shown == []
    agent.collect(Scripted([[0]]), 20)  # the replay may be filled before
