"""`SpikingDQN` as a user of SB3 drives it, and its parts against independent computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy
from torch import nn
from torch.nn import functional as F

from snn_rl import SpikingDQN
from snn_rl.core.activity import count_spikes
from snn_rl.rl import SequenceReplayBuffer
from tests.rl.test_losses import random_windows

TINY: dict[str, Any] = {
    "buffer_size": 2_000,
    "learning_starts": 60,
    "batch_size": 4,
    "sequence_length": 4,
    "burn_in": 2,
    "n_steps": 2,
    "train_freq": 4,
    "seed": 0,
    "device": "cpu",
    "policy_kwargs": {"net_arch": [16], "timesteps": 3},
}


def cartpole(n_envs: int = 1, seed: int = 0) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs, seed=seed)


def model(n_envs: int = 1, **kwargs: Any) -> SpikingDQN:
    return SpikingDQN("MlpPolicy", cartpole(n_envs), **{**TINY, **kwargs})


def parameters(agent: DQN) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.q_net.parameters()]).clone()


# --- acting


def test_predict_carries_the_membranes_from_frame_to_frame() -> None:
    agent = model()
    obs = np.random.default_rng(0).normal(size=(4, 3, 4)).astype(np.float32)
    state = None
    for t in range(4):
        _, state = agent.predict(obs[t], state, np.zeros(3, dtype=bool), deterministic=True)
    with torch.no_grad():
        _, expected = agent.q_net.unroll(torch.as_tensor(obs))
    assert state is not None
    for ours, theirs in zip(state, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_episode_start_clears_only_its_environment() -> None:
    agent = model()
    obs = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    _, state = agent.predict(obs, deterministic=True)
    _, mixed = agent.predict(obs, state, np.array([False, True, False]), deterministic=True)
    _, kept = agent.predict(obs, state, deterministic=True)
    _, fresh = agent.predict(obs, deterministic=True)
    for m, k, f in zip(mixed, kept, fresh, strict=True):
        np.testing.assert_allclose(m[[0, 2]], k[[0, 2]])
        np.testing.assert_allclose(m[1], f[1], rtol=1e-6, atol=1e-7)
        assert not np.allclose(k[1], f[1])


def test_resting_weights_are_played_event_by_event() -> None:
    """The same actions and membranes as of an agent whose layers are watched, and so run one by one."""
    agent, watched = model(), model()
    watched.policy.load_state_dict(agent.policy.state_dict())
    for lif in watched.q_net.network.lif_layers.values():
        lif.register_forward_hook(lambda *_: None)
    obs = np.random.default_rng(0).normal(size=(40, 2, 4)).astype(np.float32)
    states: list[Any] = [None, None]
    for t, frame in enumerate(obs):
        starts = np.array([t % 7 == 0, False])
        actions = []
        for k, who in enumerate((agent, watched)):
            action, states[k] = who.predict(frame, states[k], starts, deterministic=True)
            actions.append(action)
        np.testing.assert_array_equal(*actions)
        for ours, theirs in zip(*states, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    events = agent.q_net._events
    assert events is not None
    assert events._layout is not None  # it was used
    assert watched.q_net._events is not None
    assert watched.q_net._events._layout is None


def test_acting_between_trainings_uses_the_weights_as_they_are() -> None:
    """With the fused optimiser of the recipes, for so few environments that frames are run event by event."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"timesteps": 2, "net_arch": [16], "optimizer_kwargs": {"fused": True}}}
    agent = SpikingDQN("MlpPolicy", "CartPole-v1", **kwargs, learning_starts=50, learning_rate=1e-2, seed=0)
    agent.learn(400)
    q_net = agent.q_net
    q_net.set_training_mode(False)
    observation = torch.tensor([[0.1, -0.2, 0.3, 0.05]])
    for vector in (None, np.linspace(-1, 1, len(agent.policy.parameters_to_vector()), dtype=np.float32)):
        if vector is not None:
            agent.policy.load_from_vector(vector)
        for _ in range(12):  # until weights have rested
            played, _ = q_net.act(observation, None, None)
            with torch.no_grad():
                np.testing.assert_allclose(played, q_net(observation)[0].numpy(), rtol=1e-4, atol=1e-5)


def test_observations_in_any_memory_order_are_taken() -> None:
    agent = SpikingDQN("MlpPolicy", "CartPole-v1", seed=0)
    observation = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    actions, _ = agent.predict(observation[:, ::-1])
    expected, _ = agent.predict(observation[:, ::-1].copy())
    np.testing.assert_array_equal(actions, expected)


def test_one_bare_observation_gives_one_bare_action() -> None:
    agent = model()
    action, state = agent.predict(np.zeros(4, dtype=np.float32), deterministic=True)
    assert np.shape(action) == ()
    assert agent.action_space.contains(action)
    assert state[0].shape[0] == 1


def test_exploration_draws_per_environment_and_never_freezes_the_membranes() -> None:
    agent = model()
    agent.exploration_rate = 0.5
    obs = np.ones((2000, 4), dtype=np.float32)
    greedy, expected = agent.predict(obs, deterministic=True)
    actions, state = agent.predict(obs, deterministic=False)
    # half of the environments explore, half of those draw the other of two actions
    assert 0.2 < (actions != greedy).mean() < 0.3
    for ours, theirs in zip(state, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_exploration_does_not_touch_numpys_global_generator() -> None:
    agent = model()
    agent.exploration_rate = 1.0
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    agent.predict(np.ones((5, 4), dtype=np.float32))
    assert np.random.rand() == expected


def test_cleared_membranes_forget() -> None:
    agent = model(policy_kwargs={**TINY["policy_kwargs"], "persistent": False})
    obs = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    _, first = agent.predict(obs, deterministic=True)
    _, second = agent.predict(obs, first, deterministic=True)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_reset_returns_is_not_an_observation() -> None:
    with pytest.raises(ValueError, match="the observation is a tuple: a gymnasium environment's reset"):
        model().predict(gym.make("CartPole-v1").reset())  # type: ignore[arg-type]


def test_bad_states_are_named() -> None:
    agent = model()
    _, state = agent.predict(np.zeros((3, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="state must hold 2 environments, as the observation does, got 3"):
        agent.predict(np.zeros((2, 4), dtype=np.float32), state)
    with pytest.raises(ValueError, match="episode_start must hold 3 flags, one per environment, got 2"):
        agent.predict(np.zeros((3, 4), dtype=np.float32), state, np.zeros(2))


class Recorder(BaseCallback):
    """What the agent saw, at every step of collection."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...] | None]] = []

    def _on_step(self) -> bool:
        agent: Any = self.model
        self.seen.append((agent._last_obs.copy(), agent._last_episode_starts.copy(), agent._last_state))
        return True


def test_the_state_of_collection_stays_aligned_with_the_observations() -> None:
    agent = model(2, learning_starts=10_000, exploration_initial_eps=1.0)  # acts at random, never learns
    recorder = Recorder()
    agent.learn(240, callback=recorder)
    assert any(start.any() for _, start, _ in recorder.seen[1:]), "no episode ended"
    state = None
    for t, (obs, start, had) in enumerate(recorder.seen):
        if t == 0:
            assert start.all()
            assert had is None
        else:
            assert had is not None
            for ours, theirs in zip(had, state, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        _, state = agent.predict(obs, state, start, deterministic=True)


class StopAt(BaseCallback):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.num_timesteps < self.steps


def test_a_callback_that_stops_collection_leaves_state_and_observation_together() -> None:
    agent = model(learning_starts=10_000)
    recorder = Recorder()
    agent.learn(500, callback=[recorder, StopAt(37)])  # type: ignore[list-item]
    obs, _, state = recorder.seen[-1]
    np.testing.assert_array_equal(agent._last_obs, obs)
    assert agent._last_state is not None
    assert state is not None
    for ours, theirs in zip(agent._last_state, state, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_evaluation_in_the_middle_of_training_changes_nothing() -> None:
    def trained(callback: BaseCallback | None) -> torch.Tensor:
        agent = model()
        agent.learn(300, callback=callback)
        return parameters(agent)

    class Evaluate(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls % 50 == 0:
                evaluate_policy(self.model, env, 2)
            return True

    env = cartpole(2, seed=9)
    assert torch.equal(trained(None), trained(Evaluate()))


# --- learning


def test_the_td_loss_by_hand() -> None:
    agent = model(gamma=0.9)
    torch.manual_seed(1)
    for p in agent.q_net_target.parameters():
        p.data += 0.05 * torch.randn_like(p)
    w = random_windows(agent.window_length, 6)
    w = w._replace(terminated=w.terminated & False)
    with torch.no_grad():
        # the whole window in one piece: burn-in is the same computation without gradient
        q, _ = agent.q_net.unroll(w.observations, None, w.episode_start)
        q_target, _ = agent.q_net_target.unroll(w.observations, None, w.episode_start)
    losses = []
    for b in range(6):
        for t in range(2, 6):
            if not w.acted[t, b]:
                continue
            total, weight, at = 0.0, 1.0, t
            while at < t + 2 and w.acted[at, b]:
                total, weight, at = total + weight * w.rewards[at, b].item(), weight * 0.9, at + 1
            target = total + weight * q_target[at, b, q[at, b].argmax()].item()
            losses.append(F.smooth_l1_loss(q[t, b, w.actions[t, b]], torch.tensor(target)).item())
    assert agent._loss(w).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_gradients_flow_through_the_trained_frames_only() -> None:
    agent = model()
    w = random_windows(agent.window_length, 6)
    w.observations.requires_grad_()
    agent._loss(w).backward()
    gradient = w.observations.grad
    assert gradient is not None
    moved = gradient.abs().sum(dim=(1, 2)) > 0
    assert moved[2:6].all()  # sequence
    assert not moved[:2].any()  # burn-in
    assert not moved[6:].any()  # bootstrap


def test_learning_moves_every_parameter() -> None:
    agent = model(learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in agent.q_net.named_parameters()}
    agent.learn(400)
    assert agent._n_updates > 50
    for name, p in agent.q_net.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} did not learn"


def test_it_learns_a_task_that_needs_memory() -> None:
    class Recall(gym.Env):
        """A cue, then blanks: only the action that repeats the cue at the end is rewarded."""

        observation_space = spaces.Box(-1, 1, (2,), np.float32)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed)
            self.cue, self.t = int(self.np_random.integers(2)), 0
            return np.array([1 if self.cue else -1, 0], dtype=np.float32), {}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            self.t += 1
            last = self.t == 3
            obs = np.array([0, 1 if self.t == 2 else 0], dtype=np.float32)
            return obs, float(last and action == self.cue), last, False, {}

    def score(persistent: bool) -> float:
        agent = SpikingDQN(
            "MlpPolicy",
            DummyVecEnv([Recall]),
            learning_rate=3e-3,
            buffer_size=4_000,
            learning_starts=200,
            batch_size=16,
            sequence_length=6,
            burn_in=0,
            train_freq=4,
            gamma=0.9,
            exploration_fraction=0.5,
            target_update_interval=100,
            policy_kwargs={"net_arch": [32], "timesteps": 2, "persistent": persistent},
            seed=0,
            device="cpu",
        )
        agent.learn(3_000)
        return float(evaluate_policy(agent, VecMonitor(DummyVecEnv([Recall])), 60)[0])

    assert score(persistent=True) > 0.95
    assert score(persistent=False) < 0.75  # chance is 0.5


@pytest.mark.parametrize("what", ["rewards", "observations", "weights", "loss"])
def test_what_is_not_finite_stops_training_before_it_spoils_the_weights(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = model()
    agent.learn(100)
    assert agent.replay_buffer is not None
    message = f"the replayed {what} hold NaN or infinity in update {agent._n_updates}: repair"
    if what == "rewards":
        agent.replay_buffer.slot_rewards[:] = np.nan
    elif what == "observations":
        agent.replay_buffer.frames[:] = np.inf
    elif what == "weights":
        message = r"the weights q_net\.\S+ hold NaN or infinity in update"
        with torch.no_grad():
            next(agent.q_net.parameters()).view(-1)[0] = np.nan
    else:
        message = "the loss is inf in update .*: train with a learning rate below 0.0001"
        original = agent._loss
        monkeypatch.setattr(agent, "_loss", lambda windows: original(windows) * 1e39)
    before = parameters(agent)
    with pytest.raises(ValueError, match=message):
        agent.train(1, 4)
    torch.testing.assert_close(parameters(agent), before, equal_nan=True)


def test_nothing_is_learnt_before_a_window_is_stored() -> None:
    agent = model(4, learning_starts=0)
    before = parameters(agent)
    agent.learn((agent.window_length - 4) * 4)  # train_freq is 4 steps of all environments
    assert agent._n_updates == 0
    assert torch.equal(parameters(agent), before)


# --- SB3's own surroundings


def test_sb3_callbacks(tmp_path: Path) -> None:
    agent = model(2, tensorboard_log=str(tmp_path / "tb"))
    stop = StopTrainingOnRewardThreshold(1.0)
    evaluation = EvalCallback(
        cartpole(2, seed=5), callback_on_new_best=stop, eval_freq=50, n_eval_episodes=2, verbose=0
    )
    checkpoints = CheckpointCallback(20, str(tmp_path / "checkpoints"), save_replay_buffer=True)
    agent.learn(1_000, callback=[evaluation, checkpoints], log_interval=1)  # type: ignore[list-item]
    assert agent.num_timesteps == 100  # stopped at the first evaluation
    assert len(list((tmp_path / "checkpoints").glob("*.zip"))) == 2
    assert list((tmp_path / "tb").rglob("events*"))


def test_tensorboard_shows_rates_thresholds_and_leaks(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent = model(tensorboard_log=str(tmp_path))
    agent.learn(400, log_interval=1)
    events = EventAccumulator(str(next(tmp_path.iterdir()))).Reload()
    layers = list(agent.q_net.network.lif_layers)
    expected = {f"{key}/{layer}" for key in ("spike_rate", "threshold", "leak") for layer in layers}
    expected |= {"rollout/ep_rew_mean", "rollout/exploration_rate", "train/loss", "time/fps"}
    assert expected <= set(events.Tags()["scalars"])
    last = events.Scalars(f"threshold/{layers[0]}")[-1].value
    assert last == pytest.approx(agent.q_net.network.lif_layers[layers[0]].threshold.item(), abs=0.05)


@pytest.mark.filterwarnings("ignore:rich is experimental")  # tqdm says so of the bar that SB3 chose
def test_progress_bar() -> None:
    agent = model()
    agent.learn(60, progress_bar=True)
    assert agent.num_timesteps == 60


def test_vec_normalize_and_frame_stack() -> None:
    env = VecNormalize(VecFrameStack(cartpole(2), 3))
    agent = SpikingDQN("MlpPolicy", env, **TINY)
    agent.learn(400)
    assert agent._n_updates > 0
    buffer = agent.replay_buffer
    assert buffer is not None
    assert buffer.frame_stack == 3
    assert torch.isfinite(parameters(agent)).all()


def test_save_load_and_continue(tmp_path: Path) -> None:
    agent = model(2)
    agent.learn(200)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "replay")
    loaded = SpikingDQN.load(tmp_path / "agent", env=cartpole(2), device="cpu")
    loaded.load_replay_buffer(tmp_path / "replay")
    obs = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.testing.assert_array_equal(agent.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    assert torch.equal(parameters(agent), parameters(loaded))
    assert (loaded.sequence_length, loaded.burn_in, loaded.n_steps) == (4, 2, 2)
    assert loaded.q_net.network.timesteps == 3
    assert isinstance(loaded.replay_buffer, SequenceReplayBuffer)
    before, updates = parameters(loaded), loaded._n_updates
    loaded.learn(200, reset_num_timesteps=False)
    assert loaded.num_timesteps == 400
    assert loaded._n_updates > updates
    assert not torch.equal(parameters(loaded), before)


def test_set_env_of_another_copy() -> None:
    agent = model(2)
    agent.learn(100)
    agent.set_env(cartpole(2, seed=77))
    agent.learn(100, reset_num_timesteps=False)
    assert agent.num_timesteps == 208  # whole trainings of 4 steps of 2 environments


def test_cnn_policy_learns_from_images() -> None:
    class Image(gym.Env):
        observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        action_space = spaces.Discrete(3)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed)
            self.t = 0
            return self.observation_space.sample(), {}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            self.t += 1
            return self.observation_space.sample(), 1.0, False, self.t >= 9, {}

    agent = SpikingDQN("CnnPolicy", VecFrameStack(DummyVecEnv([Image]), 4, "first"), **{**TINY, "policy_kwargs": {}})
    assert isinstance(agent.policy.features_extractor_class, type)
    assert agent.policy.features_extractor_class is NatureCNN
    agent.learn(90)
    assert agent._n_updates > 0
    assert agent.replay_buffer is not None
    assert agent.replay_buffer.frames.shape[2:] == (1, 36, 36)


# --- from an ANN


@pytest.fixture(scope="module")
def ann() -> DQN:
    return trained()


def trained() -> DQN:
    dqn = DQN("MlpPolicy", cartpole(), policy_kwargs={"net_arch": [32, 32]}, learning_starts=50, seed=0, device="cpu")
    return dqn.learn(300)


def test_from_ann_converts_and_keeps_the_q_values(ann: DQN) -> None:
    agent = SpikingDQN.from_ann(
        ann, cartpole(2), timesteps=500, percentile=100.0, leak=1.0, **{**TINY, "policy_kwargs": {}}
    )
    obs = torch.as_tensor(np.array([cartpole(1, seed=s).reset()[0] for s in range(20)]))
    with torch.no_grad():
        q, _ = agent.q_net(obs)
        expected = ann.q_net(obs)
    assert (q - expected).abs().max() < 0.05 * expected.abs().max()
    assert agent.gamma == ann.gamma
    before = parameters(ann)
    agent.learn(200)
    assert torch.equal(parameters(ann), before)


def test_from_ann_refuses_another_environment(ann: DQN) -> None:
    with pytest.raises(ValueError, match=r"the environment's observation_space is .*, but the agent was trained on"):
        SpikingDQN.from_ann(ann, gym.make("Acrobot-v1"), **{**TINY, "policy_kwargs": {}})


def test_from_ann_refuses_an_activation_that_cannot_spike() -> None:
    dqn = DQN("MlpPolicy", cartpole(), policy_kwargs={"net_arch": [8], "activation_fn": nn.Tanh}, device="cpu")
    with pytest.raises(ValueError, match=r"cannot convert node 'mlp_1' \(Tanh\)"):
        SpikingDQN.from_ann(dqn, cartpole(), **{**TINY, "policy_kwargs": {}})


def test_collect_stores_the_parents_play_and_hands_over_clean(ann: DQN) -> None:
    agent = SpikingDQN.from_ann(ann, cartpole(2), **{**TINY, "policy_kwargs": {}})
    ann.exploration_rate = 0.0
    agent.collect(ann, 200)
    buffer = agent.replay_buffer
    assert buffer is not None
    for i in range(2):
        held = slice(0, buffer.count[i])
        obs, acted = buffer.frames[i, held], buffer.acted[i, held]
        assert acted.sum() == 100
        greedy, _ = ann.predict(obs[acted], deterministic=True)
        np.testing.assert_array_equal(buffer.slot_actions[i, held][acted], greedy)
    assert agent._last_obs is None  # the next call of learn starts new episodes


def test_collect_leaves_the_learning_rate_at_its_start(ann: DQN) -> None:
    schedule = LinearSchedule(1e-2, 1e-4, 1.0)
    agent = SpikingDQN.from_ann(ann, cartpole(2), **{**TINY, "policy_kwargs": {}, "learning_rate": schedule})
    agent.teacher = ann
    agent.collect(ann, 200)
    agent.distil(1)
    assert agent.policy.optimizer.param_groups[0]["lr"] == 1e-2


def test_the_parent_explores_in_each_environment_for_itself(ann: DQN) -> None:
    agent = SpikingDQN.from_ann(ann, cartpole(8), **{**TINY, "policy_kwargs": {}})
    ann.exploration_rate = 0.5
    agent.collect(ann, 2_000)
    buffer = agent.replay_buffer
    assert buffer is not None
    # From the last action back, as many steps of every environment: 0 where it was the greedy one.
    off = np.zeros((8, 200), dtype=bool)
    for i in range(8):
        held = slice(0, buffer.count[i])
        acted = buffer.acted[i, held]
        greedy, _ = ann.predict(buffer.frames[i, held][acted], deterministic=True)
        off[i] = (buffer.slot_actions[i, held][acted] != greedy)[-200:]
    # A random action is the greedy one every other time. Drawn once for all environments, as SB3's predict draws,
    # half of the steps would have none off, and the others half of eight.
    assert off.mean() == pytest.approx(0.25, abs=0.05)
    assert (off.sum(0) == 0).mean() < 0.2


def test_the_teacher_is_not_changed_by_teaching(ann: DQN, tmp_path: Path) -> None:
    ann.save(tmp_path / "ann.zip")
    loaded = DQN.load(tmp_path / "ann.zip", device="cpu")
    loaded.policy.set_training_mode(True)  # as a loaded DQN's network is
    agent = SpikingDQN.from_ann(ann, cartpole(2), **{**TINY, "policy_kwargs": {}}, distillation_weight=1.0)
    before = parameters(loaded)
    agent.teacher = loaded
    agent.collect(ann, 200)
    agent.distil(1)
    assert loaded.q_net.training
    assert torch.equal(parameters(loaded), before)


def test_exploration_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    agent = model(2)
    agent.exploration_rate = 1.0
    obs = np.zeros((2, 4), dtype=np.float32)
    agent.predict(obs)
    agent.save(tmp_path / "agent.zip")
    expected = [agent.predict(obs)[0].tolist() for _ in range(20)]
    loaded = SpikingDQN.load(tmp_path / "agent.zip", device="cpu")
    assert [loaded.predict(obs)[0].tolist() for _ in range(20)] == expected


def test_the_callers_arguments_are_left_alone() -> None:
    kwargs: dict[str, Any] = {}
    model(replay_buffer_kwargs=kwargs)
    assert kwargs == {}


def test_distillation_brings_the_network_to_its_teacher(ann: DQN) -> None:
    kwargs = {**TINY, "policy_kwargs": {}, "learning_rate": 1e-3, "batch_size": 16}
    agent = SpikingDQN.from_ann(ann, cartpole(2), timesteps=2, distillation_weight=1.0, td_weight=0.0, **kwargs)
    assert agent.teacher is not None
    with pytest.raises(ValueError, match=r"nothing in the replay is labelled by a teacher: assign one to `.teacher`"):
        agent.distil(1)
    ann.exploration_rate = 0.3
    agent.collect(ann, 600)
    first = agent.distil(5)
    last = agent.distil(200)
    assert last < 0.5 * first
    for online, target in zip(agent.q_net.parameters(), agent.q_net_target.parameters(), strict=True):
        assert torch.equal(online, target)


def test_distillation_follows_its_own_schedule_and_leaves_the_agents_alone(ann: DQN) -> None:
    kwargs = {**TINY, "policy_kwargs": {}, "learning_rate": 1e-4}
    agent = SpikingDQN.from_ann(ann, cartpole(2), timesteps=2, distillation_weight=1.0, td_weight=0.0, **kwargs)
    agent.collect(ann, 200)
    rates = []
    step = agent.policy.optimizer.step
    agent.policy.optimizer.step = lambda: (rates.append(agent.policy.optimizer.param_groups[0]["lr"]), step())  # type: ignore[method-assign]
    agent.distil(4, lambda remaining: 1e-2 * remaining)
    agent.distil(2)
    agent.train(1, 4)
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3, 1e-4, 1e-4, 1e-4])


def test_a_spike_weight_saves_spikes(ann: DQN) -> None:
    rate = {}
    for weight in (0.0, 1.0):
        kwargs = {**TINY, "policy_kwargs": {}, "learning_rate": 3e-3, "batch_size": 16, "spike_weight": weight}
        agent = SpikingDQN.from_ann(ann, cartpole(2), timesteps=3, distillation_weight=1.0, td_weight=0.0, **kwargs)
        agent.collect(ann, 300)
        agent.distil(100)
        with count_spikes(agent.q_net.network) as counter:
            agent.q_net.network(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
        rate[weight] = sum(counter.rates().values())
    assert rate[1.0] < 0.7 * rate[0.0]


def test_a_spiking_parent_can_teach(ann: DQN, tmp_path: Path) -> None:
    kwargs = {**TINY, "policy_kwargs": {}}
    parent = SpikingDQN.from_ann(ann, cartpole(2), timesteps=3, **kwargs)
    child = SpikingDQN(
        "MlpPolicy",
        cartpole(2),
        distillation_weight=1.0,
        **{**kwargs, "policy_kwargs": {**parent.policy_kwargs, "timesteps": 2}},
    )
    child.policy.load_state_dict(parent.policy.state_dict(), strict=True)
    child.teacher = parent
    child.collect(parent, 100)
    assert child.distil(3) > 0
    child.save(tmp_path / "child.zip")
    assert SpikingDQN.load(tmp_path / "child.zip", device="cpu").teacher is None  # it would be saved with it


# --- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be >= 1, got 0"),
        ({"burn_in": -1}, "burn_in must be >= 0, got -1"),
        ({"n_steps": 0}, "n_steps must be >= 1, got 0"),
        ({"td_weight": 0.0, "distillation_weight": 0.0}, "not both 0"),
        ({"td_weight": -1.0}, "must be >= 0 and not both 0, got -1.0 and 1.0"),
        ({"spike_weight": -0.1}, "spike_weight must be >= 0, got -0.1"),
        ({"spike_weight": float("nan")}, "spike_weight must be >= 0, got nan"),
        ({"policy_kwargs": {"timesteps": 0}}, "timesteps must be an integer >= 1, got 0"),
        ({"policy_kwargs": {"leak": 2.0}}, r"leak must lie in \[0, 1\], got 2.0"),
        ({"policy_kwargs": {"activation_fn": nn.Tanh}}, "cannot convert node"),
        ({"replay_buffer_class": dict}, "replay_buffer_class must be a SequenceReplayBuffer"),
        (
            {"buffer_size": 7},
            r"buffer_size must be >= 8 for windows of burn_in \+ sequence_length \+ n_steps = 8 frames in each of 1",
        ),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


def test_a_continuous_action_space_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DQN needs a Discrete action space.*Box"):
        SpikingDQN("MlpPolicy", gym.make("Pendulum-v1"), **TINY)
    with pytest.raises(ValueError, match=r"DQN needs a Discrete action space.*Box"):
        SpikingDQN("MlpPolicy", "Pendulum-v1", **TINY)


def test_a_parent_hands_all_but_its_timesteps_on() -> None:
    ann = trained()  # not the one of the other tests, which may have changed how it explores
    kwargs = {**TINY, "policy_kwargs": {}}
    parent = SpikingDQN.from_ann(ann, cartpole(2), timesteps=3, leak=0.7, persistent=False, **kwargs)
    with torch.no_grad():
        parent.q_net.network.lif_layers["mlp_1"].raw_threshold.fill_(0.6)
    child = SpikingDQN.from_parent(parent, cartpole(2), 2, **kwargs)
    assert (child.timesteps, child.gamma, child.q_net.persistent) == (2, parent.gamma, False)
    assert torch.equal(parameters(child), parameters(parent))
    for online, target in zip(child.q_net.parameters(), child.q_net_target.parameters(), strict=True):
        assert torch.equal(online, target)  # whatever the parent's target was
    child.teacher = ann
    child.collect(parent, 200)
    child.keep_rates(parent)
    torch.testing.assert_close(child.q_net_target.state_dict(), child.q_net.state_dict(), rtol=0, atol=0)
    assert child.q_net.network.lif_layers["mlp_1"].threshold < 0.6  # fewer micro-steps to fire as often in
    child.distil(2)
    assert not torch.equal(parameters(child), parameters(parent))


def test_what_is_no_parent_is_named(ann: DQN, tmp_path: Path) -> None:
    kwargs = {**TINY, "policy_kwargs": {}}
    agent = SpikingDQN.from_ann(ann, cartpole(2), timesteps=2, **kwargs)
    for timesteps in (0, 2, 3):
        with pytest.raises(ValueError, match=rf"timesteps must lie in \[1, 1\], below the parent's, got {timesteps}"):
            SpikingDQN.from_parent(agent, cartpole(2), timesteps, **kwargs)
    with pytest.raises(ValueError, match=r"from_parent takes a SpikingDQN, got a DQN; of an ANN, SpikingDQN.from_ann"):
        SpikingDQN.from_parent(ann, cartpole(2), 1, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_rates takes a SpikingDQN, got a DQN"):
        agent.keep_rates(ann)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the environment's observation_space is .*, but the agent was trained on"):
        SpikingDQN.from_parent(agent, gym.make("Acrobot-v1"), 1, **kwargs)
    with pytest.raises(ValueError, match=r"the agent spikes already; from_parent of its class takes it to fewer"):
        SpikingDQN.from_ann(agent, cartpole(2), **kwargs)
    with pytest.raises(ValueError, match="leave net_arch and the like out of policy_kwargs"):
        SpikingDQN.from_parent(agent, cartpole(2), 1, **{**kwargs, "policy_kwargs": {"net_arch": [8]}})
    at_1 = SpikingDQN.from_parent(agent, cartpole(2), 1, **{**kwargs, "policy_kwargs": None})
    with pytest.raises(ValueError, match="the parent is at 1 timestep already, and there are no fewer"):
        SpikingDQN.from_parent(at_1, cartpole(2), 1, **kwargs)
    agent.save(tmp_path / "agent.zip")
    with pytest.warns(UserWarning, match="n_steps=2"):
        not_ours = DQN.load(tmp_path / "agent.zip", device="cpu")
    with pytest.raises(ValueError, match=r"one that DQN.load has loaded; load it by SpikingDQN.load"):
        SpikingDQN.from_parent(not_ours, cartpole(2), 1, **kwargs)  # type: ignore[arg-type]
    for other in (tmp_path / "ann.zip", PPO("MlpPolicy", cartpole(), n_steps=8, batch_size=8, device="cpu")):
        with pytest.raises(ValueError, match=rf"from_ann takes a stable_baselines3.DQN, got a {type(other).__name__}"):
            SpikingDQN.from_ann(other, cartpole(2), **kwargs)  # type: ignore[arg-type]


def test_an_anns_zip_is_no_spiking_agents(ann: DQN, tmp_path: Path) -> None:
    ann.save(tmp_path / "ann.zip")
    message = (
        r"needs a SpikingDQNPolicy, got stable_baselines3.dqn.policies.DQNPolicy; load an ANN by stable_baselines3"
    )
    with pytest.raises(ValueError, match=message):
        SpikingDQN.load(tmp_path / "ann.zip", device="cpu")
    with pytest.raises(ValueError, match=message):
        SpikingDQN(DQNPolicy, cartpole())  # type: ignore[arg-type]
