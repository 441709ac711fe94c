"""`Student` on tiny teachers of every kind of action, against what SB3 itself computes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize
from torch import nn

from snn_rl import SpikingDQN, Student, to_spiking
from snn_rl.rl import SequenceReplayBuffer, StackedTeacher, actor_of, teacher_of
from snn_rl.rl.heads import head_of, kind_of
from snn_rl.rl.recurrent import random_actions
from snn_rl.rl.teacher import Teacher

BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "bits": spaces.MultiBinary(3),
    "box": BOX,
}


class Walk(gym.Env[np.ndarray, Any]):
    """Observations that wander with the actions, in episodes of 5 to 9 steps, which end or are cut."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space
        self.taken: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(5, 10))
        self.at = self.np_random.normal(size=3).astype(np.float32)
        return self.at, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.taken.append(np.array(action))
        self.left -= 1
        noise = self.np_random.normal(size=3)
        self.at = (0.8 * self.at + 0.1 * np.sum(action) + 0.5 * noise).astype(np.float32)
        over = self.left == 0
        return self.at, float(self.at[0]), over and self.at[1] > 0, over and self.at[1] <= 0, {}


def walks(kind: str, n_envs: int = 2) -> VecEnv:
    env = VecMonitor(DummyVecEnv([lambda: Walk(ACTIONS[kind])] * n_envs))
    env.seed(5)
    return env


def ppo(kind: str, activation: type[nn.Module] = nn.ReLU, algorithm: Any = PPO) -> BaseAlgorithm:
    kwargs = {"net_arch": [24, 16], "activation_fn": activation}
    model = algorithm("MlpPolicy", walks(kind), policy_kwargs=kwargs, n_steps=32, device="cpu", seed=0)
    with torch.no_grad():  # SB3 begins with outputs near 0, whose actions hardly differ
        model.policy.action_net.weight.mul_(100.0)
    return model  # type: ignore[no-any-return]


def sac() -> BaseAlgorithm:
    return SAC("MlpPolicy", walks("box"), policy_kwargs={"net_arch": [24, 16]}, buffer_size=10, device="cpu", seed=0)


def dqn() -> BaseAlgorithm:
    return DQN(
        "MlpPolicy", walks("discrete"), policy_kwargs={"net_arch": [24, 16]}, buffer_size=10, device="cpu", seed=0
    )


TEACHERS: dict[str, tuple[Callable[[], BaseAlgorithm], str]] = {
    "PPO discrete": (lambda: ppo("discrete"), "discrete"),
    "PPO multi-discrete": (lambda: ppo("multi-discrete"), "multi-discrete"),
    "PPO bits": (lambda: ppo("bits"), "bits"),
    "PPO box": (lambda: ppo("box"), "box"),
    "A2C box": (lambda: ppo("box", algorithm=A2C), "box"),
    "SAC": (sac, "box"),
    "DQN": (dqn, "discrete"),
}
SMALL: dict[str, Any] = {
    "buffer_size": 400,
    "batch_size": 8,
    "sequence_length": 4,
    "burn_in": 2,
    "device": "cpu",
    "seed": 0,
}


def student_of(teacher: object, kind: str, timesteps: int = 2, n_envs: int = 2, **kwargs: Any) -> Student:
    return Student.from_ann(teacher, walks(kind, n_envs), timesteps, calibration_steps=60, **{**SMALL, **kwargs})


def parameters(student: Student) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in student.net.network.parameters()]).clone()


# --- labels


def of_sb3(model: Any, obs: np.ndarray) -> np.ndarray:
    """The teacher's outputs as SB3 computes them; distributions as their normalised logits or their mean."""
    policy, tensor = model.policy, torch.as_tensor(obs)
    policy.set_training_mode(False)
    with torch.no_grad():
        if isinstance(model, DQN):
            return policy.q_net(tensor).numpy()  # type: ignore[no-any-return]
        if isinstance(model, SAC):
            return policy.actor.get_action_dist_params(tensor)[0].numpy()  # type: ignore[no-any-return]
        return parts_of(policy.get_distribution(tensor).distribution)


def parts_of(distribution: Any) -> np.ndarray:
    if isinstance(distribution, list):
        return np.concatenate([parts_of(part) for part in distribution], axis=-1)
    if isinstance(distribution, torch.distributions.Normal):
        return distribution.mean.numpy()
    return distribution.logits.numpy()  # type: ignore[no-any-return]


def comparable(labels: np.ndarray, head: Any) -> np.ndarray:
    """Labels as `parts_of` shows them: `Categorical` subtracts a constant from its logits."""
    if kind_of(head) != "logits" or isinstance(head.action_space, spaces.MultiBinary):
        return labels
    parts = torch.as_tensor(labels).split(head.sizes, -1)
    return np.concatenate([part.log_softmax(-1).numpy() for part in parts], axis=-1)


def play(student: Student, steps: int = 90) -> SequenceReplayBuffer:
    """Of its teacher and then of its own, with random actions among them; every step of it is labelled."""
    assert student.teacher is not None
    student.teacher.exploration_rate = student.exploration_rate = 0.2
    student.collect(student.teacher, steps)
    student.learn(steps)
    buffer = student.replay_buffer
    assert buffer is not None
    np.testing.assert_array_equal(buffer.labelled, buffer.acted)  # what an episode showed last is never acted on
    assert buffer.acted.sum() >= 2 * steps
    assert (buffer.episode_start.sum(1) > 10).all()
    return buffer


def timeline(buffer: SequenceReplayBuffer, i: int) -> list[tuple[np.ndarray, bool, np.ndarray]]:
    """Frame (1, ...), whether an episode starts, and label of the labelled slots of one environment, in order."""
    assert buffer.count[i] <= buffer.buffer_size  # nothing was overwritten
    slots = np.flatnonzero(buffer.labelled[i])
    return [(buffer.frames[i, t][None], bool(buffer.episode_start[i, t]), buffer.labels[i, t]) for t in slots]


@pytest.mark.parametrize("name", TEACHERS)
def test_labels_are_the_teachers_outputs_slot_by_slot(name: str) -> None:
    make, kind = TEACHERS[name]
    teacher = make()
    student = student_of(teacher, kind)
    assert student.teacher is not None
    buffer = play(student)
    for i in range(2):
        slots = timeline(buffer, i)
        expected = of_sb3(teacher, np.concatenate([frame for frame, _, _ in slots]))
        labels = comparable(np.array([label for _, _, label in slots]), student.policy.head)
        np.testing.assert_allclose(labels, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_a_recurrent_teacher_labels_with_the_state_of_its_own_lstm(kind: str) -> None:
    kwargs = {"net_arch": [8], "lstm_hidden_size": 8}
    teacher = RecurrentPPO("MlpLstmPolicy", walks(kind), policy_kwargs=kwargs, n_steps=32, device="cpu", seed=0)
    with torch.no_grad():
        teacher.policy.action_net.weight.mul_(100.0)
        for weight in teacher.policy.lstm_actor.parameters():
            weight.mul_(3.0)  # so that what came before shows
    student = Student.fresh(teacher, walks(kind), [16], **SMALL)
    buffer = play(student)
    assert student.teacher is not None
    forgetful = []
    for i in range(2):
        state = [torch.zeros(1, 1, 8)] * 2
        for frame, starts, label in timeline(buffer, i):
            flag, obs = torch.tensor([float(starts)]), torch.as_tensor(frame)
            with torch.no_grad():  # SB3 itself clears the state where an episode starts
                alone, _ = teacher.policy.get_distribution(obs, (state[0], state[1]), torch.ones(1))
                without = parts_of(alone.distribution)  # now, for SB3 fills the same object anew
                distribution, after = teacher.policy.get_distribution(obs, (state[0], state[1]), flag)
            state = list(after)
            shown = comparable(label[None], student.policy.head)
            np.testing.assert_allclose(shown, parts_of(distribution.distribution), rtol=1e-4, atol=1e-4)
            if not starts:
                forgetful.append(np.abs(shown - without).max())
    assert np.median(forgetful) > 0.01  # the state of another frame would show


def test_a_teacher_on_a_stack_labels_with_the_stack_of_its_own() -> None:
    stacked = VecFrameStack(walks("discrete"), 3)
    teacher = DQN("MlpPolicy", stacked, policy_kwargs={"net_arch": [16]}, buffer_size=10, device="cpu", seed=0)
    student = student_of(teacher, "discrete")
    assert isinstance(student.teacher, StackedTeacher)
    assert student.observation_space.shape == (3,)
    buffer = play(student)
    for i in range(2):
        frames: list[np.ndarray] = []
        for frame, starts, label in timeline(buffer, i):
            frames = [np.zeros((1, 3), np.float32)] * 2 if starts else frames
            frames = [*frames[-2:], frame]
            np.testing.assert_allclose(label[None], of_sb3(teacher, np.concatenate(frames, 1)), rtol=1e-4, atol=1e-5)


def test_play_before_a_teacher_was_assigned_is_not_labelled() -> None:
    student = student_of(ppo("discrete"), "discrete")
    teacher, student.teacher = student.teacher, None
    student.collect(student, 40)
    with pytest.raises(ValueError, match=r"nothing in the replay is labelled by a teacher: assign one to `\.teacher`"):
        student.distil(1)
    with pytest.raises(ValueError, match=r"distillation needs a teacher: assign an agent to `\.teacher`"):
        student.learn(40)
    student.teacher = teacher
    student.collect(student, 40)
    buffer = student.replay_buffer
    assert buffer is not None
    assert (buffer.acted.sum(), buffer.labelled.sum()) == (80, 40)


class StopAfter(BaseCallback):
    """The step at which it stops is taken, and not stored."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.n_calls < self.steps


def test_a_callback_that_stops_collection_leaves_teacher_and_replay_together() -> None:
    """The teacher's next label follows from the last one that was stored."""
    kwargs = {"net_arch": [8], "lstm_hidden_size": 8}
    teacher = RecurrentPPO("MlpLstmPolicy", walks("discrete", 1), policy_kwargs=kwargs, device="cpu", seed=0)
    with torch.no_grad():
        teacher.policy.action_net.weight.mul_(100.0)
    student = Student.fresh(teacher, walks("discrete", 1), [16], **SMALL)
    for steps in (13, 9, 30):
        student.learn(1_000, callback=StopAfter(steps), reset_num_timesteps=False)
    buffer = student.replay_buffer
    assert buffer is not None
    assert buffer.labelled.sum() == 12 + 8 + 29
    state: Any = None
    own = teacher_of(teacher)
    for frame, starts, label in timeline(buffer, 0):
        labels, state = own.label(frame, state, np.array([starts]))
        np.testing.assert_allclose(labels[0], label, rtol=1e-5, atol=1e-5)


# --- what it refuses


class Says(Teacher):
    """A teacher that says what it is told, of whatever it sees."""

    def __init__(self, label: list[float], kind: str = "logits", actions: spaces.Space[Any] = ACTIONS["discrete"]):
        self.observation_space, self.action_space = Walk.observation_space, actions
        self.head, self.says = head_of(kind, actions), np.array(label, np.float32)

    def label(self, observation: Any, state: Any = None, episode_start: Any = None) -> tuple[np.ndarray, Any]:
        return np.tile(self.says, (len(observation), 1)), None


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_a_teacher_whose_outputs_are_not_finite_is_refused_before_anything_is_stored(damage: float) -> None:
    student = Student.fresh(Says([0.0, 1.0, damage]), walks("discrete"), [16], **SMALL)
    for act in (lambda: student.collect(student, 40), lambda: student.learn(40)):
        with pytest.raises(
            ValueError, match="the teacher's output holds NaN or infinity: its weights are dam"
        ) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert student.replay_buffer is not None
        assert not student.replay_buffer.count.any()


def test_arguments_and_teachers_that_do_not_fit_are_named() -> None:
    model = ppo("discrete")
    for kwargs, message in (
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be >= 1, got 0"),
        ({"burn_in": -1}, "burn_in must be >= 0, got -1"),
        ({"spike_weight": float("nan")}, "spike_weight must be >= 0, got nan"),
        ({"exploration_rate": 1.5}, r"exploration_rate must lie in \[0, 1\], got 1.5"),
        ({"buffer_size": 10}, r"buffer_size must be >= 12 for windows of .* = 6 frames in each of 2 environments"),
        ({"calibration_steps": 0}, "calibration_steps must be >= 1, got 0"),
        ({"timesteps": 0}, "timesteps must be an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Student.from_ann(model, walks("discrete"), **{"calibration_steps": 20, **SMALL, **kwargs})
    with pytest.raises(ValueError, match=r"the network of a PPO does not convert: .* by Student.fresh"):
        student_of(ppo("discrete", nn.Tanh), "discrete")
    with pytest.raises(ValueError, match=r"environment's action_space is Box\(.*but the agent was trained on Discrete"):
        student_of(model, "box")
    with pytest.raises(ValueError, match=r"the environment's observation_space is .*, but the agent was trained on"):
        Student.fresh(model, "CartPole-v1")
    with pytest.raises(
        ValueError, match="a Student takes observations as the environment gives them, and its policy holds"
    ):
        Student.fresh(model, VecNormalize(walks("discrete")))
    with pytest.raises(ValueError, match="an agent needs Discrete actions from 0 on"):
        Student.fresh(model, Walk(spaces.Discrete(3, start=1)))
    with pytest.raises(ValueError, match="a teacher must be an agent or a policy of stable-baselines3"):
        Student.fresh("ppo.zip", walks("discrete"))
    student = student_of(model, "discrete")
    with pytest.raises(ValueError, match="this agent's outputs are logits, but the teacher's are values"):
        student.teacher = dqn()  # type: ignore[assignment]


# --- acting


def test_predict_is_that_of_sb3s_recurrent_policies() -> None:
    """Against a RecurrentPPO: what it takes, what comes back, and which environments an episode start clears."""
    kwargs = {"net_arch": [8], "lstm_hidden_size": 8}
    theirs = RecurrentPPO("MlpLstmPolicy", walks("box"), policy_kwargs=kwargs, device="cpu", seed=0)
    ours = student_of(ppo("box"), "box")
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    starts = np.array([False, True, False, False])
    for model in (ours, theirs):
        actions, first = model.predict(obs, None, np.ones(4, dtype=bool), deterministic=True)
        assert actions.shape == (4, 2)
        mixed, kept, fresh = (
            model.predict(obs, state, start, deterministic=True)[1]
            for state, start in ((first, starts), (first, None), (None, None))
        )
        axis = 0 if model is ours else 1  # an LSTM's layers come first
        for m, k, f in zip(mixed, kept, fresh, strict=True):
            m, k, f = (np.moveaxis(x, axis, 0) for x in (m, k, f))
            np.testing.assert_allclose(m[~starts], k[~starts], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(m[starts], f[starts], rtol=1e-5, atol=1e-6)
            assert not np.allclose(k[starts], f[starts])
        action, _ = model.predict(obs[0], deterministic=True)
        assert action.shape == (2,)
        assert BOX.contains(action)


@pytest.mark.parametrize("kind", ACTIONS)
def test_sb3s_evaluation_plays_it(kind: str) -> None:
    student = student_of(ppo(kind), kind)
    returns, lengths = evaluate_policy(student, walks(kind), 6, return_episode_rewards=True)
    assert len(returns) == 6
    assert set(lengths) <= {5, 6, 7, 8, 9}


@pytest.mark.parametrize("kind", ACTIONS)
def test_random_actions_are_those_of_the_space_and_drawn_for_each_environment(kind: str) -> None:
    student = student_of(ppo(kind), kind, exploration_rate=0.5)
    obs = np.ones((2_000, 3), np.float32)
    greedy, expected = student.predict(obs, deterministic=True)
    actions, state = student.predict(obs)
    assert actions.shape == greedy.shape
    assert all(student.action_space.contains(np.int64(a) if kind == "discrete" else a) for a in actions[:200])
    for ours, theirs in zip(state, expected, strict=True):  # the network runs all the same
        np.testing.assert_array_equal(ours, theirs)
    changed = (actions != greedy).reshape(2_000, -1).any(axis=1).mean()
    choices = {"discrete": 3, "multi-discrete": 6, "bits": 8, "box": np.inf}[kind]
    assert changed == pytest.approx(0.5 * (1 - 1 / choices), abs=0.05)
    bare, _ = student.predict(obs[0])
    assert np.shape(bare) == student.action_space.shape


def test_random_actions_reach_all_of_the_space() -> None:
    rng = np.random.default_rng(0)
    assert set(random_actions(spaces.Discrete(3), 100, rng).tolist()) == {0, 1, 2}
    several = random_actions(spaces.MultiDiscrete([2, 3]), 200, rng)
    assert {tuple(row) for row in several.tolist()} == {(a, b) for a in range(2) for b in range(3)}
    assert random_actions(spaces.MultiBinary((2, 2)), 50, rng).mean() == pytest.approx(0.5, abs=0.15)
    half_open = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, np.inf], np.float32))
    drawn = random_actions(half_open, 2_000, rng)
    assert drawn.dtype == np.float32
    assert all(half_open.contains(action) for action in drawn)
    np.testing.assert_allclose([drawn[:, 0].min(), drawn[:, 0].max()], [-2.0, 2.0], atol=0.02)
    assert drawn[:, 1].max() > 2.0


@pytest.mark.parametrize("kind", ACTIONS)
def test_the_environment_gets_what_the_replay_holds(kind: str) -> None:
    env = Walk(ACTIONS[kind])
    student = Student.fresh(ppo(kind), env, [16], **SMALL, exploration_rate=0.3)
    student.learn(60)
    buffer = student.replay_buffer
    assert buffer is not None
    held = buffer.slot_actions[0][buffer.acted[0]]
    np.testing.assert_array_equal(held, np.array(env.taken[-60:]).reshape(held.shape))


# --- a stage's start


def test_from_ann_is_to_spiking_of_the_actor() -> None:
    model = ppo("box")
    student = student_of(model, "box", 3, percentile=95.0, leak=0.6)
    env, obs = walks("box"), []
    env.seed(SMALL["seed"])
    frame = env.reset()
    for _ in range(30):  # 60 steps of two environments, by SB3's own predict
        obs.append(torch.as_tensor(np.array(frame)))
        frame, *_ = env.step(model.predict(frame, deterministic=True)[0])  # type: ignore[arg-type]
    actor = actor_of(model.policy)  # type: ignore[arg-type]
    expected = to_spiking(actor.network, torch.cat(obs), 95.0, 3, leak=0.6)
    assert student.net.network.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(student.net.network.state_dict()[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    x = torch.randn(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(student.net(x)[0], expected(x)[0])


@pytest.mark.parametrize("name", TEACHERS)
def test_at_many_timesteps_it_acts_as_its_teacher(name: str) -> None:
    make, kind = TEACHERS[name]
    teacher = make()
    student = Student.from_ann(
        teacher, walks(kind), 400, percentile=100.0, leak=1.0, persistent=False, calibration_steps=300, **SMALL
    )
    obs = 0.5 * np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32)
    ours, _ = student.predict(obs, deterministic=True)
    theirs, _ = teacher.predict(obs, deterministic=True)
    assert ours.dtype == student.action_space.dtype
    if kind == "box":
        assert np.abs(ours - theirs).mean() < 0.05
    else:
        assert (ours == theirs).mean() > 0.95


def test_a_fresh_student_of_a_tanh_teacher_is_an_ordinary_network_that_learns_and_converts() -> None:
    teacher = ppo("discrete", nn.Tanh)
    kwargs = {**SMALL, "sequence_length": 1, "burn_in": 0, "batch_size": 64, "learning_rate": 5e-3}
    ann = Student.fresh(teacher, walks("discrete"), [32], **kwargs)
    assert ann.timesteps is None
    assert isinstance(ann.teacher, Teacher)
    assert [type(layer) for layer in ann.net.network.get_submodule("mlp")] == [nn.Linear, nn.ReLU, nn.Linear]  # type: ignore[arg-type]
    ann.collect(ann.teacher, 300)
    first = ann.distil(5)
    assert ann.distil(300) < 0.2 * first
    spiking = student_of(ann, "discrete", 2)
    assert spiking.timesteps == 2
    assert spiking.policy.net_arch == [32]
    spiking.teacher = teacher  # type: ignore[assignment]
    spiking.collect(teacher, 100)  # type: ignore[arg-type]
    assert spiking.distil(3) >= 0


@pytest.mark.parametrize("name", TEACHERS)
def test_every_kind_of_student_learns_from_its_teacher(name: str) -> None:
    make, kind = TEACHERS[name]
    student = student_of(make(), kind, 2, batch_size=16, learning_rate=5e-3, leak=0.5)
    with torch.no_grad():  # far from what it was converted from
        for weight in student.net.network.parameters():
            if weight.dim() > 1:
                weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
    student.collect(student.teacher, 300)  # type: ignore[arg-type]
    first = student.distil(3)
    assert student.distil(150) < 0.6 * first
    before = parameters(student)
    student.learn(40)
    assert not torch.equal(parameters(student), before)


def test_pruning_hands_on_weights_thresholds_teacher_and_rates() -> None:
    parent = student_of(ppo("discrete"), "discrete", 4, leak=0.6)
    child = Student.from_parent(parent, walks("discrete"), 2, **SMALL)
    assert child.timesteps == 2
    assert child.teacher is parent.teacher
    assert torch.equal(parameters(child), parameters(parent))
    child.collect(parent, 100)
    child.keep_rates(parent)
    layer = next(iter(child.net.network.lif_layers))  # type: ignore[union-attr, arg-type]
    ours, theirs = (s.net.network.lif_layers[layer] for s in (child, parent))  # type: ignore[union-attr, index]
    assert ours.threshold < theirs.threshold  # to fire as often in half of the time
    for bad in (4, 5, 0):
        with pytest.raises(ValueError, match=rf"timesteps must lie in \[1, 3\], below the parent's, got {bad}"):
            Student.from_parent(parent, walks("discrete"), bad, **SMALL)
    last = Student.from_parent(child, walks("discrete"), 1, **SMALL)
    with pytest.raises(ValueError, match="the parent is at 1 timestep already"):
        Student.from_parent(last, walks("discrete"), 1, **SMALL)
    ordinary = Student.fresh(ppo("discrete"), walks("discrete"), [16], **SMALL)
    for other in (ordinary, ppo("discrete"), None):
        with pytest.raises(
            ValueError, match=r"from_parent takes a spiking Student, got .*; Student.from_ann makes one"
        ):
            Student.from_parent(other, walks("discrete"), 1, **SMALL)  # type: ignore[arg-type]
    child.collect(parent, 100)
    with pytest.raises(ValueError, match="keep_rates takes a spiking agent, got a Student"):
        child.keep_rates(ordinary)


# --- saving


@pytest.mark.parametrize("name", ["PPO multi-discrete", "SAC", "DQN"])
def test_save_load_and_go_on(name: str, tmp_path: Path) -> None:
    make, kind = TEACHERS[name]
    teacher = make()
    student = student_of(teacher, kind, 3, exploration_rate=0.25, leak=0.6)
    student.collect(teacher, 60)  # type: ignore[arg-type]
    student.distil(2)
    student.learn(60)
    student.save(tmp_path / "student.zip")
    student.save_replay_buffer(tmp_path / "replay.pkl")
    loaded = Student.load(tmp_path / "student.zip", env=walks(kind), device="cpu")
    loaded.load_replay_buffer(tmp_path / "replay.pkl")
    assert torch.equal(parameters(loaded), parameters(student))
    assert (loaded.timesteps, loaded.distilled, loaded.exploration_rate) == (3, 2, 0.25)
    assert (loaded.sequence_length, loaded.burn_in, loaded.n_envs) == (4, 2, 2)
    obs = np.random.default_rng(0).normal(size=(3, 40, 3)).astype(np.float32)
    states: list[Any] = [None, None]
    for frame in obs:
        acted = []
        for k, who in enumerate((student, loaded)):
            action, states[k] = who.predict(frame, states[k])  # exploring: it goes on where it stopped
            acted.append(action)
        np.testing.assert_array_equal(*acted)
    assert loaded.teacher is None
    loaded.teacher = teacher  # type: ignore[assignment]
    before, updates = parameters(loaded), loaded._n_updates
    loaded.learn(40, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded._n_updates > updates) == (student.num_timesteps + 40, True)
    assert not torch.equal(parameters(loaded), before)
    # an environment that is set later
    alone = Student.load(tmp_path / "student.zip", device="cpu")
    alone.set_env(walks(kind))
    alone.teacher = teacher  # type: ignore[assignment]
    alone.learn(40)
    assert alone._n_updates > updates


# --- statistics


def normalised(kind: str) -> VecNormalize:
    """Observations of other means and scales than their own, as they have been seen by now."""
    env = VecNormalize(walks(kind), clip_obs=1.5)
    env.reset()
    for _ in range(60):
        env.step(np.array([env.action_space.sample() for _ in range(2)]))
    env.obs_rms.mean += [3.0, -2.0, 0.5]
    env.obs_rms.var *= [4.0, 0.25, 1.0]
    env.training = False
    return env


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_a_student_of_a_normalised_teacher_takes_raw_observations(activation: type[nn.Module]) -> None:
    env = normalised("box")
    kwargs = {"net_arch": [24], "activation_fn": activation}
    model = PPO("MlpPolicy", env, policy_kwargs=kwargs, n_steps=32, device="cpu", seed=0)
    with torch.no_grad():
        model.policy.action_net.weight.mul_(100.0)  # type: ignore[operator]
    student = Student.fresh(model, walks("box"), [24], **SMALL)
    raw = 3.0 * np.random.default_rng(2).normal(size=(100, 3)).astype(np.float32)
    seen = student.net.preprocess(torch.as_tensor(raw)).numpy()
    np.testing.assert_array_equal(seen, env.normalize_obs(raw))
    assert (np.abs(seen) == 1.5).any()  # some are clipped
    assert student.teacher is not None
    labelled, _ = student.teacher.predict(raw)
    theirs, _ = model.predict(env.normalize_obs(raw), deterministic=True)
    np.testing.assert_allclose(labelled, theirs, atol=1e-5)
    if activation is nn.ReLU:  # the very weights
        student.net.network.load_state_dict(actor_of(model.policy).network.state_dict())
        np.testing.assert_allclose(student.predict(raw, deterministic=True)[0], theirs, atol=1e-5)
        spiking = student_of(model, "box", 2)
        np.testing.assert_array_equal(spiking.net.preprocess(torch.as_tensor(raw)).numpy(), env.normalize_obs(raw))
    env.obs_rms.mean += 1.0  # the environment's later statistics are not the student's
    np.testing.assert_array_equal(student.net.preprocess(torch.as_tensor(raw)).numpy(), seen)
    buffer = play(student)
    for frame, _, label in timeline(buffer, 0):
        expected, _ = student.teacher.label(frame)
        np.testing.assert_allclose(label, expected[0], atol=1e-5)


def test_in_a_vecnormalize_a_teacher_normalises_no_second_time() -> None:
    """A `SpikingDQN` trains on what VecNormalize shows, as SB3's DQN does; its teacher sees that once, too."""
    env = normalised("discrete")
    teacher = DQN("MlpPolicy", env, policy_kwargs={"net_arch": [16]}, buffer_size=10, device="cpu", seed=0)
    small = {**SMALL, "td_weight": 0.0}
    agent = SpikingDQN.from_ann(teacher, env, 2, calibration_steps=40, **small)
    parent = Student.from_ann(teacher, walks("discrete"), 2, calibration_steps=40, **SMALL)
    for actor in (teacher, agent.teacher, parent):  # by SB3, by the teacher, by one that normalises itself
        agent.replay_buffer.reset()  # type: ignore[union-attr]
        agent.collect(actor, 60)  # type: ignore[arg-type]
        buffer = agent.replay_buffer
        assert buffer is not None
        slots = timeline(buffer, 0)  # the replay holds observations as they were
        raw = np.concatenate([frame for frame, _, _ in slots])
        labels = np.array([label for _, _, label in slots])
        np.testing.assert_allclose(labels, of_sb3(teacher, env.normalize_obs(raw)), rtol=1e-4, atol=1e-5)
        if actor is not parent:
            np.testing.assert_array_equal(buffer.slot_actions[0][buffer.acted[0]], labels.argmax(1))
            continue
        state, greedy = None, []
        for frame, starts, _ in slots:
            action, state = parent.predict(frame, state, np.array([starts]), deterministic=True)
            greedy.append(int(action[0]))
        np.testing.assert_array_equal(buffer.slot_actions[0][buffer.acted[0]], greedy)
