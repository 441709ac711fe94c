"""Dict observations from end to end, against SB3's own ``MultiInputPolicy``."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize
from torch import Tensor, nn

from snn_rl import SpikingDQN, load_policy, save_policy, to_spiking
from snn_rl.rl import SequenceReplayBuffer, Student, actor_of, teacher_of
from snn_rl.rl.evaluation import evaluate
from snn_rl.rl.network import normalizer_of
from snn_rl.rl.observations import FlatDict, FlatExtractor, flat_dict, side_by_side
from snn_rl.rl.policy_file import check_space
from snn_rl.rl.spaces import UnsupportedSpaceError, check_observation_space
from snn_rl.rl.statistics import Statistics

IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)  # channels last, as most environments show them
VECTOR = spaces.Box(-3, 3, (2, 3), np.float64)
# in an order that is not the sorted one
MIXED = spaces.Dict(
    OrderedDict(
        wheels=spaces.MultiDiscrete([2, 3]),
        camera=IMAGE,
        arm=VECTOR,
        gear=spaces.Discrete(3),
        lamps=spaces.MultiBinary(4),
    )
)
SMALL_IMAGES = spaces.Dict(camera=IMAGE, arm=VECTOR)
VECTORS = spaces.Dict(arm=VECTOR, gear=spaces.Discrete(3))
THREE = spaces.Discrete(3)
SMALL: dict[str, Any] = {"net_arch": [12], "features_extractor_kwargs": {"cnn_output_dim": 8}}


class Env(gym.Env[Any, Any]):
    """Random observations, and a reward for action 1 where the first entry of the arm is positive."""

    def __init__(self, space: spaces.Space[Any], actions: spaces.Space[Any], seed: int = 0, length: int = 9) -> None:
        self.observation_space, self.action_space, self.length = space, actions, length
        self.observation_space.seed(seed)
        self.shown: list[Any] = []
        self.starts: set[int] = set()  # where in it episodes begin

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        self.step_number = 0
        self.starts.add(len(self.shown))
        return self.show(), {}

    def show(self) -> Any:
        self.shown.append(self.observation_space.sample())
        return self.shown[-1]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.step_number += 1
        reward = float((self.shown[-1]["arm"].flat[0] > 0) == (np.ravel(action)[0] == 1))
        return self.show(), reward, self.step_number >= self.length, False, {}


def venv(space: spaces.Space[Any] = MIXED, actions: spaces.Space[Any] = THREE, n: int = 2, **kwargs: Any) -> VecEnv:
    def make(i: int) -> Any:
        return lambda: Env(copied(space), actions, seed=i, **kwargs)

    return VecMonitor(DummyVecEnv([make(i) for i in range(n)]))


def copied(space: spaces.Space[Any]) -> Any:
    """A space with a generator of its own."""
    return copy.deepcopy(space)


def draw(space: spaces.Dict, n: int, seed: int = 5) -> dict[str, np.ndarray]:
    space = copied(space)
    space.seed(seed)
    samples = [space.sample() for _ in range(n)]
    return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}


def randomise(module: nn.Module) -> None:
    """Weights with which no output is trivial: SB3 starts from biases of 0, and PPO from outputs near 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def dqn_on(space: spaces.Space[Any] = MIXED, **kwargs: Any) -> DQN:
    kwargs = {"buffer_size": 100, "learning_starts": 0, "policy_kwargs": {**SMALL}} | kwargs
    model = DQN("MultiInputPolicy", venv(space), seed=0, device="cpu", **kwargs)
    randomise(model.policy)
    return model


def ppo_in(env: VecEnv, **kwargs: Any) -> PPO:
    policy_kwargs = {**SMALL, "activation_fn": nn.ReLU, **kwargs}
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    randomise(model.policy)
    return model


STUDENT: dict[str, Any] = {
    "calibration_steps": 60,
    "buffer_size": 400,
    "batch_size": 4,
    "sequence_length": 4,
    "burn_in": 2,
    "seed": 0,
    "device": "cpu",
}


# --- one array ----------------------------------------------------------------------------------------------------


def test_observations_survive_the_bytes_in_their_own_types() -> None:
    space = spaces.Dict(
        OrderedDict(
            flag=spaces.Box(0, 1, (3,), bool),
            arm=VECTOR,
            half=spaces.Box(-1, 1, (1,), np.float16),
            steps=spaces.Box(-(2**62), 2**62, (2,), np.int64),
            camera=IMAGE,
            gear=spaces.Discrete(1000),
            lamps=spaces.MultiBinary([2, 2]),
        )
    )
    flat, observations = FlatDict(space), draw(space, 7)
    observations["steps"][0] = 2**62 - 1  # more than floats hold
    encoded = flat.encode(observations)
    assert encoded.shape == (7, flat.size)
    assert flat.size <= 36 * 40 * 3 + 3 + 6 * 8 + 2 + 2 * 8 + 8 + 4 + 8  # a pixel takes a byte beside doubles
    decoded = flat.decode(torch.from_numpy(encoded))
    assert list(decoded) == list(space.spaces)
    for key, part in decoded.items():
        assert part.numpy().dtype == space[key].dtype
        np.testing.assert_array_equal(part.numpy(), observations[key])
    one = flat.decode(torch.from_numpy(encoded)[3:4])  # a view in the midst of memory
    np.testing.assert_array_equal(one["steps"].numpy(), observations["steps"][3:4])


def test_what_does_not_fit_into_the_bytes_is_refused() -> None:
    flat = FlatDict(VECTORS)
    with pytest.raises(ValueError, match=r"must be a dict of \['arm', 'gear'\], got \['arm'\]"):
        flat.encode({"arm": np.zeros((1, 2, 3))})
    with pytest.raises(ValueError, match=r"of as many environments, got {'arm': 2, 'gear': 1}"):
        flat.encode({"arm": np.zeros((2, 2, 3)), "gear": np.zeros(1, np.int64)})
    with pytest.raises(ValueError, match=r"the observation 'gear' holds float64 numbers .* Discrete\(3\) does not"):
        flat.encode({"arm": np.zeros((1, 2, 3)), "gear": np.array([0.5])})


@pytest.mark.parametrize("space", [MIXED, SMALL_IMAGES, VECTORS], ids=["mixed", "image", "vectors"])
def test_the_flat_extractor_computes_what_sb3s_does(space: spaces.Dict) -> None:
    model = dqn_on(space)
    tensors, _ = model.policy.obs_to_tensor(draw(space, 20))
    seen = model.observation_space
    preprocessed: Any = preprocess_obs(tensors, seen)
    assert isinstance(seen, spaces.Dict)
    flat = FlatExtractor(model.q_net.features_extractor)
    expected = model.q_net.features_extractor(preprocessed)
    torch.testing.assert_close(flat(side_by_side(preprocessed)), expected)
    torch.testing.assert_close(flat(preprocessed), expected)


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [MIXED, SMALL_IMAGES, VECTORS], ids=["mixed", "image", "vectors"])
def test_a_spiking_q_network_at_many_timesteps_is_sb3s(space: spaces.Dict) -> None:
    dqn = dqn_on(space)
    observations = draw(space, 8)
    with torch.no_grad():
        expected = dqn.q_net(dqn.policy.obs_to_tensor(observations)[0])
        errors = []
        for timesteps in (6, 60, 600):
            agent = SpikingDQN.from_ann(
                dqn, venv(space), timesteps, percentile=100.0, leak=1.0, persistent=False, **STUDENT
            )
            batch, vectorized = agent.q_net.flat.batch(observations)  # type: ignore[union-attr]
            assert vectorized
            q, _ = agent.q_net(agent.q_net.as_tensor(batch))
            errors.append((q - expected).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02 * expected.abs().max().item()


def test_vectors_alone_run_event_driven_and_images_do_not() -> None:
    assert SpikingDQN.from_ann(dqn_on(VECTORS), venv(VECTORS), 2, **STUDENT).q_net._events is not None
    assert SpikingDQN.from_ann(dqn_on(SMALL_IMAGES), venv(SMALL_IMAGES), 2, **STUDENT).q_net._events is None


def test_predict_takes_batches_and_one_bare_observation_as_sb3_does() -> None:
    agent, dqn = SpikingDQN.from_ann(dqn_on(), venv(), 2, **STUDENT), dqn_on()
    observations = draw(MIXED, 5)  # channels last
    actions, state = agent.predict(observations, deterministic=True)
    assert actions.shape == dqn.predict(observations)[0].shape == (5,)
    assert all(len(carry) == 5 for carry in state)
    for i in range(5):
        bare = {key: part[i] for key, part in observations.items()}
        action, one = agent.predict(bare, deterministic=True)
        assert np.shape(action) == np.shape(dqn.predict(bare)[0]) == ()
        assert action == actions[i]
        for carry, all_carries in zip(one, state, strict=True):
            np.testing.assert_allclose(carry[0], all_carries[i], atol=1e-5)
    tensors, _ = dqn.policy.obs_to_tensor(observations)
    np.testing.assert_array_equal(agent.policy(tensors).numpy(), actions)  # SB3's own way to call a policy
    with pytest.raises(ValueError, match="must be a dict of"):
        agent.predict({**observations, "more": np.zeros(5)})
    with pytest.raises(ValueError, match="the observation 'arm' does not fit"):
        agent.predict({**observations, "arm": np.zeros((5, 7))})


class OwnExtractor(BaseFeaturesExtractor):
    """One of a user's own, that takes a dict."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, 8)
        self.arm, self.gear = nn.Linear(6, 5), nn.Linear(3, 3)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        arm = torch.relu(self.arm(observations["arm"].flatten(1)))
        return torch.cat([self.gear(observations["gear"]), arm], 1)


def test_an_extractor_of_a_users_own_converts() -> None:
    dqn = dqn_on(VECTORS, policy_kwargs={"net_arch": [12], "features_extractor_class": OwnExtractor})
    agent = SpikingDQN.from_ann(dqn, venv(VECTORS), 600, percentile=100.0, leak=1.0, **STUDENT)
    observations = draw(VECTORS, 8)
    with torch.no_grad():
        expected = dqn.q_net(dqn.policy.obs_to_tensor(observations)[0])
        q, _ = agent.q_net(agent.q_net.as_tensor(observations))
    assert (q - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_flattening_extractor_is_refused() -> None:
    from snn_rl.rl import MlpPolicy

    with pytest.raises(ValueError, match="such as SB3's CombinedExtractor, got FlattenExtractor"):
        SpikingDQN(MlpPolicy, venv(VECTORS))


@pytest.mark.parametrize(("algorithm", "actions"), [(DQN, spaces.Discrete(3)), (PPO, spaces.Box(-1, 1, (2,)))])
def test_relu_networks_convert(algorithm: Any, actions: spaces.Space[Any]) -> None:
    policy_kwargs = {**SMALL, "activation_fn": nn.ReLU}
    model = algorithm("MultiInputPolicy", venv(MIXED, actions), policy_kwargs=policy_kwargs, device="cpu")
    actor = actor_of(model.policy)
    assert actor.converts
    flat = side_by_side(preprocess_obs(model.policy.obs_to_tensor(draw(MIXED, 6))[0], model.observation_space))  # type: ignore[arg-type]
    assert to_spiking(actor.network, flat)(flat)[0].shape == (6, actor.head.size)


def test_sac_converts_and_tanh_does_not() -> None:
    actions = spaces.Box(-1, 1, (2,))
    sac = SAC("MultiInputPolicy", venv(MIXED, actions), buffer_size=10, policy_kwargs={**SMALL}, device="cpu")
    assert actor_of(sac.policy).converts
    tanh = A2C("MultiInputPolicy", venv(), policy_kwargs={**SMALL, "activation_fn": nn.Tanh}, device="cpu")
    assert not actor_of(tanh.policy).converts


# --- replay -------------------------------------------------------------------------------------------------------


def test_windows_are_what_was_played() -> None:
    agent = SpikingDQN.from_ann(dqn_on(), venv(n=2), 1, learning_starts=1000, **STUDENT)
    agent.learn(60)
    assert agent.env is not None
    buffer, flat = agent.replay_buffer, agent.q_net.flat
    assert buffer is not None
    assert flat is not None
    envs = agent.env.unwrapped.envs  # type: ignore[attr-defined]
    shown = [env.shown for env in envs]
    np.random.seed(1)
    windows = buffer.sample_windows(32, 6)
    decoded = flat.decode(windows.observations.flatten(0, 1))
    frames = {key: part.unflatten(0, (6, 32)).numpy() for key, part in decoded.items()}
    for b in range(32):
        timelines = [
            (i, t)
            for i, timeline in enumerate(shown)
            for t, observation in enumerate(timeline)
            if np.array_equal(observation["camera"].transpose(2, 0, 1), frames["camera"][0, b])
        ]
        ((i, t),) = timelines  # random pixels tell each observation from all others
        for step in range(6):
            for key, part in frames.items():
                expected = shown[i][t + step][key]
                expected = expected.transpose(2, 0, 1) if key == "camera" else expected
                np.testing.assert_array_equal(part[step, b], expected)
                assert part.dtype == MIXED[key].dtype
        starts = [t + step in envs[i].starts for step in range(6)]
        assert windows.episode_start[:, b].tolist() == starts
    assert windows.episode_start.any()


def test_sb3s_dqn_samples_dicts_of_it() -> None:
    model = dqn_on(replay_buffer_class=SequenceReplayBuffer, batch_size=8)
    before = model.policy.parameters_to_vector()
    model.learn(60)
    assert not np.array_equal(before, model.policy.parameters_to_vector())


def test_samples_are_normalised_as_sb3_does() -> None:
    env = VecNormalize(venv(SMALL_IMAGES, n=1), norm_obs_keys=["arm"])
    for _ in range(5):
        env.reset()
    buffer = SequenceReplayBuffer(100, env.observation_space, env.action_space, "cpu", n_envs=1)
    play = [draw(SMALL_IMAGES, 1, seed) for seed in range(12)]
    for before, after in pairwise(play):
        buffer.add(before, after, np.zeros(1), np.zeros(1), np.zeros(1, bool), [{}])
    windows = buffer.sample_windows(1, 12, env)  # all that is stored
    decoded = buffer.flat.decode(windows.observations[:, 0])  # type: ignore[union-attr]
    expected: Any = [env.normalize_obs(observation) for observation in play]
    np.testing.assert_array_equal(decoded["camera"].numpy(), np.concatenate([e["camera"] for e in expected]))
    np.testing.assert_array_equal(decoded["arm"].float().numpy(), np.concatenate([e["arm"] for e in expected]))


def test_nan_in_a_part_is_named() -> None:
    buffer = SequenceReplayBuffer(100, VECTORS, spaces.Discrete(2), "cpu")
    good, bad = draw(VECTORS, 1), draw(VECTORS, 1)
    bad["arm"][0, 1, 1] = np.nan
    with pytest.raises(ValueError, match="the observation 'arm' of environment 0 holds NaN or infinity"):
        buffer.add(good, bad, np.zeros(1), np.zeros(1), np.zeros(1, bool), [{}])
    assert buffer.size() == 0
    with pytest.raises(ValueError, match="frame_stack must be 1 for Dict observations, got 2"):
        SequenceReplayBuffer(100, VECTORS, spaces.Discrete(2), "cpu", frame_stack=2)


# --- learning -----------------------------------------------------------------------------------------------------


def test_spiking_dqn_learns_a_dict_environment() -> None:
    space = spaces.Dict(arm=spaces.Box(-1, 1, (1,), np.float32), gear=spaces.Discrete(3))
    agent = SpikingDQN(
        "MultiInputPolicy",
        venv(space, spaces.Discrete(2), n=4),
        learning_rate=3e-3,
        learning_starts=100,
        buffer_size=4000,
        train_freq=1,
        gamma=0.0,
        target_update_interval=50,
        exploration_fraction=0.5,
        policy_kwargs={"net_arch": [32], "timesteps": 2},
        seed=0,
        device="cpu",
    )
    assert agent.policy.features_extractor_class is CombinedExtractor
    agent.learn(3000)
    assert evaluate(agent, venv(space, spaces.Discrete(2)), 10).mean > 8  # of 9; a guess gets 4.5


def test_frames_that_sb3_stacks_in_a_dict_are_stored_whole() -> None:
    env = VecFrameStack(venv(SMALL_IMAGES), 3, channels_order="last")
    agent = SpikingDQN("MultiInputPolicy", env, policy_kwargs={**SMALL}, buffer_size=200, seed=0, device="cpu")
    assert agent.observation_space["camera"].shape == (9, 36, 40)  # type: ignore[index]
    agent.learn(60)
    buffer = agent.replay_buffer
    assert buffer is not None
    assert buffer.frame_stack == 1
    windows = buffer.sample_windows(4, 3)
    images = agent.q_net.flat.decode(windows.observations.flatten(0, 1))["camera"].unflatten(0, (3, 4))  # type: ignore[union-attr]
    follows = ~windows.episode_start[1:]
    assert follows.any()
    torch.testing.assert_close(images[1:][follows][:, :6], images[:-1][follows][:, 3:])  # each moves on by a frame


def test_spiking_dqn_goes_on_after_saving(tmp_path: Path) -> None:
    agent = SpikingDQN.from_ann(dqn_on(), venv(), 2, **STUDENT)
    agent.learn(40)
    agent.save(tmp_path / "model.zip")
    agent.save_replay_buffer(tmp_path / "replay.pkl")
    loaded = SpikingDQN.load(tmp_path / "model.zip", env=venv(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "replay.pkl")
    observations = draw(MIXED, 4)
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0], agent.predict(observations, deterministic=True)[0]
    )
    loaded.learn(40)
    fewer = SpikingDQN.from_parent(loaded, venv(), 1, **{k: v for k, v in STUDENT.items() if k != "calibration_steps"})
    fewer.teacher = dqn_on()
    fewer.collect(loaded, 80)
    fewer.keep_rates(loaded)
    fewer.distil(2)


def normalised_ppo(space: spaces.Dict = SMALL_IMAGES, **kwargs: Any) -> tuple[PPO, VecNormalize]:
    env = VecNormalize(venv(space), norm_obs_keys=["arm"], clip_obs=1.5)
    model = ppo_in(env, **kwargs)
    env.obs_rms["arm"].mean = np.arange(6.0).reshape(2, 3) / 5  # type: ignore[index]
    env.obs_rms["arm"].var = np.arange(1.0, 7.0).reshape(2, 3)  # type: ignore[index]
    env.training = False
    return model, env


def test_a_student_of_a_normalised_ppo_sees_raw_observations(tmp_path: Path) -> None:
    ppo, env = normalised_ppo()
    student = Student.from_ann(ppo, venv(SMALL_IMAGES), 600, percentile=100.0, leak=1.0, persistent=False, **STUDENT)
    assert student.env is not None
    played = student.env.unwrapped.envs[0].shown[:30]  # type: ignore[attr-defined]  # its calibration data
    observations = {key: np.stack([one[key] for one in played]) for key in SMALL_IMAGES.spaces}
    normal: Any = env.normalize_obs(observations)
    logits = ppo.policy.get_distribution(ppo.policy.obs_to_tensor(normal)[0]).distribution.logits  # type: ignore[union-attr]
    expected = (logits - logits.mean(1, keepdim=True)).detach()  # SB3's are normalised to sum to 1
    raw = {**observations, "camera": observations["camera"].transpose(0, 3, 1, 2)}
    with torch.no_grad():
        out, _ = student.net(student.net.as_tensor(raw))
    assert (out - out.mean(1, keepdim=True) - expected).abs().max() < 0.02 * expected.abs().max()
    labels, _ = teacher_of(ppo).label(raw)
    np.testing.assert_allclose(labels - labels.mean(1, keepdims=True), expected, atol=1e-5)
    np.testing.assert_array_equal(labels.argmax(1), ppo.predict(normal, deterministic=True)[0])
    statistics = student.policy.statistics
    assert statistics is not None
    assert isinstance(statistics.mean, dict)
    np.testing.assert_array_equal(statistics.mean["arm"], np.arange(6.0).reshape(2, 3) / 5)

    save_policy(student, tmp_path / "policy.safetensors", {})
    loaded = load_policy(tmp_path / "policy.safetensors")
    np.testing.assert_array_equal(loaded.predict(observations)[0], student.predict(observations, deterministic=True)[0])
    again = loaded.policy.statistics
    assert again is not None
    assert isinstance(again.var, dict)
    np.testing.assert_array_equal(again.var["arm"], np.arange(1.0, 7.0).reshape(2, 3))
    assert (again.clip, again.epsilon) == (statistics.clip, statistics.epsilon) == (1.5, env.epsilon)


def test_a_student_learns_what_its_teacher_does() -> None:
    ppo, _ = normalised_ppo(net_arch=[8])
    student = Student.from_ann(ppo, venv(SMALL_IMAGES), 2, learning_rate=5e-3, **STUDENT)
    student.collect(student.teacher, 200)
    first = student.distil(5)
    assert student.distil(200) < 0.7 * first
    student.learn(20)
    pruned = Student.from_parent(
        student, venv(SMALL_IMAGES), 1, **{k: v for k, v in STUDENT.items() if k != "calibration_steps"}
    )
    pruned.collect(student, 60)
    pruned.keep_rates(student)
    pruned.distil(2)
    measured = evaluate(pruned, venv(SMALL_IMAGES), 4)
    assert len(measured.returns) == 4
    assert measured.activity is not None
    arm, hidden, cnn = 6, 8, 8
    dense_behind = hidden * (arm + cnn) + 3 * hidden
    layers = list(measured.activity.layers.values())
    convolutions = measured.activity.ann_ops - dense_behind  # NatureCNN's and its linear layer
    first_conv = 32 * 8 * 9 * (3 * 8 * 8)  # of 36 x 40 pixels by a kernel of 8 with stride 4
    second, third, linear = 64 * 3 * 3 * (32 * 4 * 4), 64 * 1 * 1 * (64 * 3 * 3), 8 * 64
    assert convolutions == first_conv + second + third + linear
    additions = layers[0] * second + layers[1] * third + layers[2] * linear
    additions += layers[3] * cnn * hidden + layers[4] * hidden * 3
    assert measured.activity.snn_ops == pytest.approx(first_conv + arm * hidden + additions)


def test_a_fresh_student_of_a_tanh_teacher() -> None:
    ppo, _ = normalised_ppo(activation_fn=nn.Tanh)
    options = {k: v for k, v in STUDENT.items() if k != "calibration_steps"}
    fresh = Student.fresh(ppo, venv(SMALL_IMAGES), [16], **options)
    assert fresh.policy.features_extractor_class is CombinedExtractor
    fresh.collect(fresh.teacher, 100)
    fresh.distil(3)
    spiking = Student.from_ann(fresh, venv(SMALL_IMAGES), 2, **STUDENT)
    assert spiking.timesteps == 2
    assert spiking.policy.statistics is not None
    spiking.collect(spiking.teacher, 60)
    spiking.distil(2)


def test_a_dict_in_another_order_is_refused() -> None:
    """The keys' order is that of the columns behind the features extractor."""
    other = spaces.Dict(OrderedDict(reversed(list(VECTORS.spaces.items()))))
    assert other == VECTORS
    with pytest.raises(ValueError, match=r"of \['gear', 'arm'\] in this order, but .* \['arm', 'gear'\]"):
        Student.from_ann(dqn_on(VECTORS), venv(other), 2, **STUDENT)


# --- policy files -------------------------------------------------------------------------------------------------


def test_a_policy_file_holds_a_dict(tmp_path: Path) -> None:
    agent = SpikingDQN.from_ann(dqn_on(), venv(), 3, **STUDENT)
    save_policy(agent, tmp_path / "policy.safetensors", {})
    loaded = load_policy(tmp_path / "policy.safetensors")
    assert loaded.observation_space == agent.observation_space
    assert isinstance(loaded.observation_space, spaces.Dict)
    assert list(loaded.observation_space.spaces) == list(MIXED.spaces)  # in this order
    state, theirs = None, None
    for seed in range(4):
        observations = draw(MIXED, 3, seed)
        actions, state = loaded.predict(observations, state)
        expected, theirs = agent.predict(observations, theirs, deterministic=True)
        np.testing.assert_array_equal(actions, expected)
    for ours, carry in zip(state or (), theirs or (), strict=True):
        np.testing.assert_array_equal(ours, carry)
    assert evaluate(loaded, venv(), 4).activity == evaluate(agent, venv(), 4).activity


def test_an_ann_of_a_dict_in_a_policy_file(tmp_path: Path) -> None:
    ppo, env = normalised_ppo()
    save_policy(ppo, tmp_path / "policy.safetensors", {})
    loaded = load_policy(tmp_path / "policy.safetensors")
    observations = draw(SMALL_IMAGES, 30)
    expected, _ = ppo.predict(env.normalize_obs(observations), deterministic=True)
    np.testing.assert_array_equal(loaded.predict(observations)[0], expected)
    student = Student.from_ann(loaded, venv(SMALL_IMAGES), 2, **STUDENT)  # by the file's statistics
    assert student.policy.statistics is not None
    np.testing.assert_array_equal(student.policy.statistics.mean["arm"], np.arange(6.0).reshape(2, 3) / 5)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Dict(a=spaces.Dict(b=VECTOR)), r"no Dict in a Dict, got \['a'\]"),
        (spaces.Dict(a=spaces.Text(3)), "knows Box, Discrete, MultiDiscrete, MultiBinary and Dict spaces, not Text"),
        (spaces.Dict({f"k{i}": spaces.Discrete(2) for i in range(129)}), "1 to 128 parts"),
        (spaces.Dict(a=spaces.Box(0, 1, (2**23,)), b=spaces.Box(0, 1, (2**23 + 1,))), "16,777,216 entries, got"),
    ],
    ids=["nested", "text", "many", "large"],
)
def test_dicts_that_a_file_cannot_hold(space: spaces.Dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_space(space)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features_extractor_kwargs": {"cnn_output_dim": 2**40}}, "do not fit"),
        ({"features_extractor_kwargs": {"cnn_output_dim": "8"}}, "must be integers >= 1"),
        ({"features_extractor_kwargs": {"unknown": 8}}, "unknown"),
        ({"features_extractor": "FlattenExtractor", "features_extractor_kwargs": {}}, "takes a dict"),
        ({"observation_space": {"type": "Dict", "spaces": [["a", {"type": "Discrete", "n": 2}]] * 2}}, "its own key"),
        ({"observation_space": {"type": "Dict", "spaces": []}}, "1 to 128 parts"),
        ({"observation_space": {"type": "Dict", "spaces": [["a.b", {"type": "Discrete", "n": 2}]]}}, "another key"),
        ({"statistics": {"clip": 1.0, "epsilon": 0.0, "keys": ["wheels"]}}, "wheels"),
        ({"statistics": {"clip": 1.0, "epsilon": 0.0, "keys": ["nothing"]}}, "nothing"),
        ({"statistics": {"clip": 1.0, "epsilon": 0.0}}, "keys"),
    ],
)
def test_descriptions_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from snn_rl.rl.policy_file import FORMAT

    path = tmp_path / "policy.safetensors"
    save_policy(SpikingDQN.from_ann(dqn_on(), venv(), 1, **STUDENT), path, {})
    with safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        description = json.loads(file.metadata()[FORMAT])
    save_file(weights, path, metadata={FORMAT: json.dumps({**description, **change})})
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (spaces.Dict(b=VECTOR), r"the observations 'a' must not be a Dict in a Dict, got Dict\('b'"),
        (spaces.Tuple([VECTOR]), "the observations 'a' must be Box, Discrete, MultiDiscrete or MultiBinary, got Tuple"),
        (spaces.Text(4), "the observations 'a' must be Box, Discrete, MultiDiscrete or MultiBinary, got Text"),
        (spaces.Graph(VECTOR, None), "the observations 'a' must be Box, .*, got Graph"),
        (spaces.Box(0, 1, ()), "the observations 'a' must have an axis, got Box"),
        (spaces.Box(0, 1, (0,)), "the observations 'a' must have an entry, got Box"),
        (spaces.Discrete(3, start=1), "the observations 'a' must count from 0 on, got Discrete"),
        (spaces.MultiDiscrete([2, 3], start=[0, 1]), "the observations 'a' must count from 0 on, got MultiDiscrete"),
        (spaces.MultiDiscrete([[2, 3]]), "the observations 'a' must have one axis, got MultiDiscrete"),
    ],
)
def test_parts_that_it_cannot_observe(part: spaces.Space[Any], message: str) -> None:
    space = spaces.Dict(a=part, arm=VECTOR)
    with pytest.raises(UnsupportedSpaceError, match=message) as caught:
        SpikingDQN("MultiInputPolicy", Env(space, spaces.Discrete(2)))
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedSpaceError, match=message):
        Student.fresh(dqn_on(VECTORS), Env(space, spaces.Discrete(2)))


@pytest.mark.parametrize("key", ["a.b", "", "items", "training"])
def test_keys_that_cannot_name_a_layer(key: str) -> None:
    with pytest.raises(UnsupportedSpaceError, match="must have another key"):
        check_observation_space(spaces.Dict({key: VECTOR}))
    with pytest.raises(UnsupportedSpaceError, match="must have a part, got an empty Dict"):
        check_observation_space(spaces.Dict())


def test_images_of_both_layouts_are_refused() -> None:
    """SB3 transposes all images of a Dict, and raises an error for one that needs none."""
    space = spaces.Dict(a=IMAGE, b=spaces.Box(0, 255, (3, 36, 40), np.uint8))
    with pytest.raises(
        UnsupportedSpaceError, match=r"first in all, or last in all, got first: {'a': False, 'b': True}"
    ):
        SpikingDQN("MultiInputPolicy", Env(space, THREE))


def test_statistics_of_parts() -> None:
    """As VecNormalize does: given keys alone, in double precision, clipped."""
    _, env = normalised_ppo()
    statistics = Statistics.of(env)
    assert statistics is not None
    observations = draw(SMALL_IMAGES, 10)
    flat = flat_dict(SMALL_IMAGES)
    assert flat is not None
    parts = normalizer_of(statistics)(flat.decode(torch.from_numpy(flat.encode(observations))))
    expected: Any = env.normalize_obs(observations)
    np.testing.assert_array_equal(parts["arm"].numpy(), expected["arm"])
    np.testing.assert_array_equal(parts["camera"].numpy(), observations["camera"])
    assert parts["camera"].dtype == torch.uint8


def test_a_teacher_with_an_lstm_labels_dicts() -> None:
    recurrent_ppo = pytest.importorskip("sb3_contrib").RecurrentPPO
    model = recurrent_ppo(
        "MultiInputLstmPolicy", venv(SMALL_IMAGES), n_steps=8, batch_size=8, policy_kwargs={**SMALL}, device="cpu"
    )
    randomise(model.policy)
    env = venv(SMALL_IMAGES)
    options = {k: v for k, v in STUDENT.items() if k != "calibration_steps"}
    student = Student.fresh(model, env, [16], **options)
    student.collect(student.teacher, 40)
    assert student.replay_buffer is not None
    labels = student.replay_buffer.labels
    # SB3's own, frame by frame, of what the first environment showed
    shown = student.env.unwrapped.envs[0].shown[:9]  # type: ignore[union-attr, attr-defined]
    state, start = None, np.ones(1, dtype=bool)
    for i, one in enumerate(shown):
        obs = {key: part[None] for key, part in one.items()}
        action, state = model.predict(obs, state, start, deterministic=True)
        start = np.zeros(1, dtype=bool)
        assert labels[0, i].argmax() == action[0]
    assert len({labels[0, i].argmax() for i in range(9)}) > 1
