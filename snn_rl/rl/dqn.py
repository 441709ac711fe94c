"""`SpikingDQN`: SB3's DQN with a recurrent, spiking Q-network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor, nn
from torch.nn import functional as F

from snn_rl.core.activity import count_spikes, spikes_per_neuron
from snn_rl.core.convert import DEFAULT_LEAK, DEFAULT_PERCENTILE, to_spiking
from snn_rl.core.network import State
from snn_rl.core.plain import evaluation_copy
from snn_rl.core.spread import scale_currents, spread_first_synapse
from snn_rl.rl.captured import CapturedGradient, gradient
from snn_rl.rl.losses import distillation_loss, n_step_returns
from snn_rl.rl.policy import (
    CnnPolicy,
    MlpPolicy,
    NumpyState,
    SpikingDQNPolicy,
    SpikingQNetwork,
    check_forwards,
    q_network_ann,
)
from snn_rl.rl.replay import SequenceReplayBuffer, Windows, frame_stack_of
from snn_rl.rl.spaces import check_spaces, in_one_line
from snn_rl.rl.teacher import Player, StackedTeacher, frames_of

SelfSpikingDQN = TypeVar("SelfSpikingDQN", bound="SpikingDQN")

SPIKES_EVERY = 100  # updates: how often spikes are counted for the log, which is slower than not to


class SpikingDQN(DQN):
    """DQN whose Q-network spikes; its membranes persist from frame to frame and are cleared where an episode starts.

    Takes SB3's DQN arguments, with these differences:

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"`` or a subclass of `SpikingDQNPolicy`; ``policy_kwargs`` also take
            ``timesteps``, ``leak``, ``leak_reset`` and ``persistent``.
        batch_size: windows per update (not transitions).
        optimize_memory_usage: changes nothing. The replay stores each frame once in any case, and nothing is truncated.
        sequence_length: frames of a window that are trained on.
        burn_in: frames before them that only warm the membranes up, without gradient.
        n_steps: of the n-step return inside a window.
        td_weight: weight of the temporal-difference loss.
        distillation_weight: of `distillation_loss` against the Q-values of ``self.teacher``, on the same windows.
        distillation_temperature: of its softmax, in medians of the teacher's spread between best and worst action.
        spike_weight: of the spikes per neuron and frame (summed over the micro-steps), a loss that saves energy.

    Targets are double-Q (van Hasselt et al. 2016); online and target network burn in separately, each under its own
    weights, from silence (Kapturowski et al. 2019). Other differences from SB3's DQN:

    - Updates begin once every environment has stored ``burn_in + sequence_length + n_steps`` frames, however small
      ``learning_starts`` is.
    - The replay is a `SequenceReplayBuffer`, for any ``n_steps``. It holds timelines of frames, not the arrays
      ``observations``, ``rewards`` and ``dones`` of SB3's buffers. `HerReplayBuffer` is refused.
    - Dict observations are refused, as are actions or observations that do not count from 0 (`check_spaces`).
    - Batch-norm is folded into the weights when the network is built, so its statistics do not move with training.
      The Q-network has one ``network`` in place of ``features_extractor`` and ``q_net``.
    - Exploration draws from a generator of its own, once for each environment. ``seed``, `set_random_seed` and
      ``load(..., seed=)`` seed it; without a seed it follows numpy's global seed. A loaded agent goes on where the
      saved one stopped.

    Raises:
        UnsupportedSpaceError: a space that `check_spaces` refuses; a ValueError, and an AssertionError as in SB3.
        ValueError: an argument out of range, or a network that cannot be converted.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy, "CnnPolicy": CnnPolicy}
    policy: SpikingDQNPolicy
    q_net: SpikingQNetwork
    q_net_target: SpikingQNetwork
    replay_buffer: SequenceReplayBuffer | None

    def __init__(
        self,
        policy: str | type[SpikingDQNPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 8,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        target_update_interval: int = 10_000,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        max_grad_norm: float = 10,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        sequence_length: int = 8,
        burn_in: int = 8,
        td_weight: float = 1.0,
        distillation_weight: float = 0.0,
        distillation_temperature: float = 0.5,
        spike_weight: float = 0.0,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("n_steps", n_steps, 1),
            ("sequence_length", sequence_length, 1),
            ("burn_in", burn_in, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if replay_buffer_class is not None and not issubclass(replay_buffer_class, SequenceReplayBuffer):
            raise ValueError(
                f"replay_buffer_class must be a SequenceReplayBuffer, which keeps windows, got {replay_buffer_class}"
            )
        if td_weight < 0 or distillation_weight < 0 or td_weight + distillation_weight == 0:
            raise ValueError(
                "td_weight and distillation_weight must be >= 0 and not both 0, "
                f"got {td_weight} and {distillation_weight}"
            )
        if not distillation_temperature > 0:
            raise ValueError(f"distillation_temperature must be > 0, got {distillation_temperature}")
        if not spike_weight >= 0:
            raise ValueError(f"spike_weight must be >= 0, got {spike_weight}")
        self.sequence_length = sequence_length
        self.burn_in = burn_in
        self.td_weight = td_weight
        self.distillation_weight = distillation_weight
        self.distillation_temperature = distillation_temperature
        self.spike_weight = spike_weight
        self._teacher: DQN | StackedTeacher | None = None
        self.distilled = 0  # updates that `distill` has made
        # Of whoever acts, aligned with `_last_obs`: its state (the membranes of this agent) before it sees that.
        self._last_state: Any = None
        self._next_state: Any = None  # after it was seen; committed with the transition
        self._exploration: np.random.Generator | None = None
        self._captured: tuple[tuple[Any, ...], CapturedGradient] | None = None
        self._actor: Player | None = None  # who acts in place of this agent, while `collect` runs
        if env is not None:  # a loaded agent may have none
            env = self._checked_env(env, verbose)
        elif _init_setup_model:
            raise ValueError("env must be an environment or the id of one, got None")
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            replay_buffer_class=replay_buffer_class or SequenceReplayBuffer,
            replay_buffer_kwargs=replay_buffer_kwargs,
            n_steps=1,  # SB3 warns of any other beside a buffer class; set below
            target_update_interval=target_update_interval,
            exploration_fraction=exploration_fraction,
            exploration_initial_eps=exploration_initial_eps,
            exploration_final_eps=exploration_final_eps,
            max_grad_norm=max_grad_norm,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.n_steps = n_steps
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, SpikingDQNPolicy):  # of a zip that another algorithm has saved, too
            theirs = f"{self.policy_class.__module__}.{self.policy_class.__name__}"
            raise ValueError(
                f"SpikingDQN needs a SpikingDQNPolicy, got {theirs}; "
                "load an ANN by stable_baselines3.DQN.load and convert it by SpikingDQN.from_ann"
            )
        self.optimize_memory_usage = False  # whatever `load` was given: SB3 would truncate the last trajectory
        if self.replay_buffer is None and self.env is not None:
            self.replay_buffer_kwargs = {"frame_stack": frame_stack_of(self.env), **self.replay_buffer_kwargs}
        n_steps, self.n_steps = self.n_steps, 1
        saved = self._exploration  # of a loaded agent, unless `load` was given a seed
        super()._setup_model()  # calls set_random_seed
        self.n_steps = n_steps
        # An own generator: drawing from numpy's global one would tie the agent to whatever else draws from it.
        if saved is not None:
            self._exploration = saved
        elif self._exploration is None:  # no seed: one draw, so that SB3's global `set_random_seed` decides
            self._exploration = np.random.default_rng(np.random.randint(2**32, dtype=np.uint32))
        if self.replay_buffer is not None:
            slots = self.window_length + self.replay_buffer.frame_stack - 1
            if self.replay_buffer.buffer_size < slots:
                raise ValueError(
                    f"buffer_size must be >= {slots * self.n_envs} for windows of burn_in + sequence_length + n_steps "
                    f"= {self.window_length} frames in each of {self.n_envs} environments, got {self.buffer_size}"
                )

    @classmethod
    def _checked_env(cls, env: GymEnv | str, verbose: int) -> VecEnv:
        """The environment as SB3 wraps it (vectorised, images with their channels first), its spaces checked."""
        env = cls._wrap_env(maybe_make_env(env, verbose), verbose)
        check_spaces(env.observation_space, env.action_space)
        return env

    def set_random_seed(self, seed: int | None = None) -> None:
        """SB3's, and the generator that exploration draws from. None changes nothing."""
        super().set_random_seed(seed)
        if seed is not None:
            self._exploration = np.random.default_rng(seed)

    # --- acting

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: NumpyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, NumpyState]:
        """Actions and membranes, as `SpikingDQNPolicy.predict`; epsilon-greedy unless ``deterministic``.

        Each environment draws for itself, and the network always runs: a random action must not freeze the membranes.
        """
        actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        return actions if deterministic else self._explore(actions, self.exploration_rate), state

    def _explore(self, actions: np.ndarray, rate: float) -> np.ndarray:
        assert self._exploration is not None
        random = self._exploration.integers(int(self.action_space.n), size=actions.shape)  # type: ignore[attr-defined]
        return np.where(self._exploration.random(actions.shape) < rate, random, actions)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.distillation_weight and self._actor is None:  # said before the first step, not at the first update
            self._check_taught()
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        assert self._last_episode_starts is not None
        if self._last_episode_starts.all():  # the environments were just reset, perhaps another number of them
            self._last_state = None
        return result

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        actor: Player = self if self._actor is None else self._actor
        assert isinstance(self._last_obs, np.ndarray)
        actions, self._next_state = self._greedy(actor, self._last_obs, self._last_state, self._last_episode_starts)
        actions = self._explore(actions, 1.0 if self.num_timesteps < learning_starts else _exploration_rate(actor))
        return actions, actions

    def _greedy(
        self, actor: Player, obs: np.ndarray, state: Any, episode_start: np.ndarray | None
    ) -> tuple[np.ndarray, Any]:
        """An actor's greedy actions (n_envs,), checked before an environment takes them, and its state afterwards."""
        greedy, state = actor.predict(obs, state, episode_start, deterministic=True)
        actions, n = np.asarray(greedy), int(self.action_space.n)  # type: ignore[attr-defined]
        if actions.shape != (len(obs),) or actions.dtype.kind not in "iu" or not ((actions >= 0) & (actions < n)).all():
            raise ValueError(
                f"{_named(actor)} must choose one of the actions 0 to {n - 1} in each of {len(obs)} environments, "
                f"got {' '.join(str(actions).split())[:80]} of {actions.dtype}"
            )
        return actions, state

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        # Here, where `_last_obs` moves on, and not earlier: a callback may stop the collection in between.
        self._last_state = self._next_state
        self._last_episode_starts = dones

    # --- learning

    @property
    def teacher(self) -> DQN | StackedTeacher | None:
        """Whose Q-values a distillation loss regresses on; None at first, and never saved with the agent.

        Assign an SB3 DQN, a `SpikingDQN` or a `StackedTeacher`. Raises ValueError for anything else, and for one of
        other spaces or on another device.
        """
        return self._teacher

    @teacher.setter
    def teacher(self, teacher: DQN | StackedTeacher | None) -> None:
        if teacher is not None:
            if not isinstance(teacher, DQN | StackedTeacher):
                raise ValueError(
                    f"a teacher must be a stable_baselines3.DQN or a StackedTeacher, got {_named(teacher)}"
                )
            if isinstance(teacher, DQN) and isinstance(teacher.policy, SpikingDQNPolicy):
                _check_spiking(teacher, "teacher")
            _check_same_spaces(self, teacher, "this agent", "the teacher has")
            device = _dqn_of(teacher).device
            if device.type != self.device.type:
                raise ValueError(f"the teacher is on {device}, this agent on {self.device}; load both on one device")
            if isinstance(teacher, StackedTeacher):
                teacher.check_burn_in(self.burn_in)
        self._teacher = teacher

    @property
    def window_length(self) -> int:
        """Frames per sampled window: burn-in, training, and the bootstrap of the last n-step return."""
        return self.burn_in + self.sequence_length + self.n_steps

    def train(self, gradient_steps: int, batch_size: int = 8) -> None:
        """Update the Q-network on ``gradient_steps`` batches of ``batch_size`` windows."""
        assert self.replay_buffer is not None
        if not self.replay_buffer.holds_windows(self.window_length):
            return
        if self.distillation_weight:
            self._check_taught()
        self._update_learning_rate(self.policy.optimizer)
        losses = [
            self._update(
                self.td_weight, self.distillation_weight, batch_size, log_spikes=self._n_updates % SPIKES_EVERY == 0
            )
            for _ in range(gradient_steps)
        ]
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", float(np.mean(losses)))
        for name, lif in self.q_net.network.lif_layers.items():
            self.logger.record(f"threshold/{name}", lif.threshold.item())
            self.logger.record(f"leak/{name}", lif.leak.item())

    def _check_taught(self) -> None:
        if self._teacher is None:
            raise ValueError("distillation needs a teacher: assign the ANN or the parent, an agent, to `.teacher`")

    def _update(
        self, td_weight: float, distillation_weight: float, batch_size: int, *, log_spikes: bool = False
    ) -> float:
        """One gradient step on a fresh batch of windows; returns the loss."""
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        windows = self.replay_buffer.sample_windows(batch_size, self.window_length, env=self._vec_normalize_env)

        def loss(windows: Windows) -> Tensor:
            return self._loss(windows, td_weight, distillation_weight)

        if self.device.type == "cuda" and not log_spikes:  # counting needs the layers run one by one
            value, norm = self._captured_gradient(loss, (td_weight, distillation_weight), windows)(windows)
        else:
            with count_spikes(self.q_net.network) if log_spikes else nullcontext() as counter:
                value, norm = (x.item() for x in gradient(loss, windows, self._learning, self.max_grad_norm))
            for name, rate in counter.rates().items() if counter is not None else ():
                self.logger.record_mean(f"spike_rate/{name}", rate)
        if not (math.isfinite(value) and math.isfinite(norm)):  # before the step, which would spoil every weight
            raise ValueError(self._why_not_finite(windows, value))
        self.policy.optimizer.step()
        self._n_updates += 1
        return value

    @property
    def _learning(self) -> list[nn.Parameter]:
        """What the optimiser trains: the target network keeps no gradient."""
        return list(self.q_net.parameters())

    def _captured_gradient(
        self, loss: Callable[[Windows], Tensor], weights: tuple[float, float], windows: Windows
    ) -> CapturedGradient:
        """The gradient of ``loss`` as a CUDA graph, captured anew where an option or the place of a weight changed."""
        networks: list[nn.Module] = [self.q_net, self.q_net_target]
        if self.teacher is not None:
            networks.append(_dqn_of(self.teacher).q_net)
        held = (
            *weights, self.spike_weight, self.distillation_temperature, self.gamma, self.n_steps,
            self.burn_in, self.sequence_length, self.max_grad_norm,
            self.teacher,  # itself: where it is still held, no other can have come to stand in its memory
            *((q.network.timesteps, q.persistent) for q in networks if isinstance(q, SpikingQNetwork)),
            *(tensor.shape for tensor in windows),
            *(weight.data_ptr() for network in networks for weight in network.parameters()),
        )  # fmt: skip
        if self._captured is None or self._captured[0] != held:
            self._captured = None  # its memory first
            self._captured = held, CapturedGradient(loss, self._learning, self.max_grad_norm, windows)
        return self._captured[1]

    def _why_not_finite(self, windows: Windows, loss: float) -> str:
        for name, values in (("observations", windows.observations), ("rewards", windows.rewards)):
            if not torch.isfinite(values).all():
                return f"the replayed {name} hold NaN or infinity in update {self._n_updates}: repair the environment"
        for name, parameter in self.policy.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the weights {name} hold NaN or infinity in update {self._n_updates}: load a good checkpoint"
        rate = self.policy.optimizer.param_groups[0]["lr"]
        return f"the loss is {loss} in update {self._n_updates}: train with a learning rate below {rate:g}"

    def _loss(self, windows: Windows, td_weight: float, distillation_weight: float) -> Tensor:
        with spikes_per_neuron(self.q_net.network) if self.spike_weight else nullcontext() as spikes:
            q_t, state = self._unroll(self.q_net, windows)
        loss = q_t.new_zeros(())
        if td_weight:
            loss = loss + td_weight * self._td_loss(windows, q_t, state)
        if distillation_weight:
            loss = loss + distillation_weight * self._distillation_loss(windows, q_t)
        if spikes is not None:
            loss = loss + self.spike_weight * spikes.mean()
        return loss

    def _unroll(self, q_net: SpikingQNetwork, windows: Windows) -> tuple[Tensor, State]:
        """Q-values of the trained frames, (sequence_length, batch, actions), and the state behind them."""
        state = None
        if self.burn_in:
            with torch.no_grad():
                burn_in = windows.observations[: self.burn_in]
                _, state = q_net.unroll(burn_in, None, windows.episode_start[: self.burn_in])
        return q_net.unroll(self._trained(windows.observations), state, self._trained(windows.episode_start))

    def _append_tail(self, q_net: SpikingQNetwork, windows: Windows, q_t: Tensor, state: State) -> Tensor:
        """``q_t`` and, behind it, the Q-values of the n frames that only bootstrap; without gradient."""
        trained = self.burn_in + self.sequence_length
        with torch.no_grad():
            q_tail, _ = q_net.unroll(windows.observations[trained:], state, windows.episode_start[trained:])
            return torch.cat([q_t, q_tail])

    def _trained(self, x: Tensor) -> Tensor:
        """The frames of a window that are trained on, of a tensor (window_length, batch, ...)."""
        return x[self.burn_in : self.burn_in + self.sequence_length]

    def _td_loss(self, windows: Windows, q_t: Tensor, state: State) -> Tensor:
        """Huber loss of double-Q, n-step targets on the frames behind the burn-in where an action was taken."""
        with torch.no_grad():
            # (sequence_length + n, batch, actions)
            target = self._append_tail(self.q_net_target, windows, *self._unroll(self.q_net_target, windows))
            best = self._append_tail(self.q_net, windows, q_t, state).argmax(dim=-1, keepdim=True)
            bootstrap = target.gather(-1, best).squeeze(-1)
            r_t, slot, discount = n_step_returns(windows, self.burn_in, self.sequence_length, self.n_steps, self.gamma)
            target_t = r_t + discount * bootstrap.gather(0, slot)
        q_a_t = q_t.gather(-1, self._trained(windows.actions).unsqueeze(-1)).squeeze(-1)  # (sequence_length, batch)
        loss = F.smooth_l1_loss(q_a_t, target_t, reduction="none")
        acted = self._trained(windows.acted)
        return (loss * acted).sum() / acted.sum().clamp(min=1)

    def _distillation_loss(self, windows: Windows, q_t: Tensor) -> Tensor:
        """`distillation_loss` against the teacher, which sees each window from silence as this agent does."""
        assert self.teacher is not None
        _dqn_of(self.teacher).policy.set_training_mode(False)  # as it was evaluated: a loaded DQN is in training mode
        with torch.no_grad():
            if isinstance(self.teacher, StackedTeacher):
                teacher_t = self.teacher.q_values(windows, self.burn_in, self.sequence_length)
            elif isinstance(self.teacher, SpikingDQN):
                teacher_t, _ = self._unroll(self.teacher.q_net, windows)
            else:
                obs = self._trained(windows.observations)
                teacher_t = self.teacher.q_net(obs.flatten(0, 1)).unflatten(0, obs.shape[:2])
        return distillation_loss(q_t, teacher_t, self._trained(windows.acted), self.distillation_temperature)

    # --- a stage's start: from an ANN, from a parent's play

    @classmethod
    def from_ann(
        cls: type[SelfSpikingDQN],
        dqn: DQN,
        env: GymEnv | str,
        timesteps: int = 5,
        *,
        percentile: float = DEFAULT_PERCENTILE,
        leak: float = DEFAULT_LEAK,
        leak_reset: bool = False,
        persistent: bool = True,
        calibration_steps: int = 1000,
        **kwargs: Any,
    ) -> SelfSpikingDQN:
        """Convert a trained SB3 DQN, calibrated on ``calibration_steps`` observations of its own play in ``env``.

        ``kwargs`` are this class's own arguments; gamma and the network's options are the DQN's.

        Where ``env`` shows one frame and the DQN was trained on a stack of them, its first synapse has no counterpart:
        the agent has the DQN's layers, but starts from new weights (`snn_rl.core.spread`), to be taught by it. Such
        an agent's ``teacher``, and the actor of its first `collect`, is a `StackedTeacher`.

        Raises:
            ValueError: no DQN or one that spikes, a Q-network with a forward of its own (dueling, masked), spaces of
                ``env`` that are not its, or a network that cannot be converted.
        """
        _check_ann(dqn)
        check_forwards(dqn.policy)
        if calibration_steps < 1:
            raise ValueError(f"calibration_steps must be >= 1, got {calibration_steps}")
        env = cls._checked_env(env, kwargs.get("verbose", 0))
        frames = frames_of(dqn.observation_space, env.observation_space)
        stacked = frames is not None and frames > 1
        _check_same_spaces(env, StackedTeacher(dqn, env.observation_space) if stacked else dqn)
        policy_kwargs = {
            "net_arch": dqn.policy.net_arch,
            "activation_fn": dqn.policy.activation_fn,
            "features_extractor_class": dqn.policy.features_extractor_class,
            "features_extractor_kwargs": dqn.policy.features_extractor_kwargs,
            "normalize_images": dqn.policy.normalize_images,
            "optimizer_class": dqn.policy.optimizer_class,
            "optimizer_kwargs": dqn.policy.optimizer_kwargs,
            "timesteps": timesteps,
            "leak": leak,
            "leak_reset": leak_reset,
            "persistent": persistent,
            **(kwargs.pop("policy_kwargs", None) or {}),
        }
        kwargs.setdefault("gamma", dqn.gamma)
        model = cls(SpikingDQNPolicy, env, policy_kwargs=policy_kwargs, **kwargs)
        player = StackedTeacher(dqn, model.observation_space) if stacked else dqn
        batches = (
            preprocess_obs(
                torch.as_tensor(obs, device=model.device),
                model.observation_space,
                normalize_images=dqn.policy.normalize_images,
            )
            for obs in model._play(player, calibration_steps)
        )
        if stacked:
            samples = torch.cat(list(batches))  # type: ignore[arg-type]
            spread_first_synapse(model.q_net.network, samples)
            scale_currents(model.q_net.network, samples)
            model.q_net_target.load_state_dict(model.q_net.state_dict())
            return model
        network = to_spiking(
            evaluation_copy(q_network_ann(dqn.q_net)).to(model.device),
            batches,  # type: ignore[arg-type]
            percentile,
            timesteps,
            leak=leak,
            leak_reset=leak_reset,
        )
        try:
            model.q_net.network.load_state_dict(network.state_dict())
        except RuntimeError as error:
            raise ValueError(
                "the layers of the Q-network are not those that its policy's net_arch and features extractor describe, "
                "so a policy cannot be built for them; convert the network itself by snn_rl.to_spiking"
            ) from error
        model.q_net_target.load_state_dict(model.q_net.state_dict())
        return model

    @classmethod
    def from_parent(
        cls: type[SelfSpikingDQN], parent: SpikingDQN, env: GymEnv | str, timesteps: int, **kwargs: Any
    ) -> SelfSpikingDQN:
        """Temporal pruning: the weights, thresholds and leaks of ``parent`` at fewer micro-steps, to be trained on.

        ``kwargs`` are this class's own arguments; gamma and the network's options are the parent's. `collect` its play,
        then `keep_rates` lowers the thresholds.

        Raises:
            ValueError: a parent that does not spike, ``timesteps`` that are not fewer, or spaces that are not its.
        """
        _check_spiking(parent, "from_parent")
        if parent.timesteps == 1:
            raise ValueError("the parent is at 1 timestep already, and there are no fewer")
        if not 1 <= timesteps < parent.timesteps:
            raise ValueError(f"timesteps must lie in [1, {parent.timesteps - 1}], below the parent's, got {timesteps}")
        env = cls._checked_env(env, kwargs.get("verbose", 0))
        _check_same_spaces(env, parent)
        policy_kwargs = {**parent.policy_kwargs, **(kwargs.pop("policy_kwargs", None) or {}), "timesteps": timesteps}
        policy = type(parent.policy)
        model = cls(policy, env, policy_kwargs=policy_kwargs, **{"gamma": parent.gamma, **kwargs})
        try:
            model.q_net.load_state_dict(parent.q_net.state_dict(), strict=True)
        except RuntimeError as error:
            raise ValueError("the layers are the parent's: leave net_arch and the like out of policy_kwargs") from error
        model.q_net_target.load_state_dict(model.q_net.state_dict())
        return model

    @property
    def timesteps(self) -> int:
        """Micro-steps per frame."""
        return self.q_net.network.timesteps

    def _play(self, actor: Player, steps: int) -> Iterator[np.ndarray]:
        """Observations (n_envs, ...) of another agent's epsilon-greedy play, ``steps`` in all, from fresh episodes."""
        assert self.env is not None
        obs, state, episode_start = self.env.reset(), None, np.ones(self.n_envs, dtype=bool)
        for _ in range(-(-steps // self.n_envs)):
            assert isinstance(obs, np.ndarray)
            yield obs
            actions, state = self._greedy(actor, obs, state, episode_start)
            obs, _, episode_start, _ = self.env.step(self._explore(actions, _exploration_rate(actor)))

    def collect(self, actor: Player, steps: int, callback: MaybeCallback = None) -> None:
        """Store ``steps`` environment steps of another agent's epsilon-greedy play in this agent's replay buffer.

        A freshly converted network's own play is worthless as replay; a stage starts from its parent's instead.

        The actor is whatever has the ``predict`` of SB3's algorithms: any of them, a `LoadedPolicy`, a `StackedTeacher`
        or an object of your own (`Player`). It acts with ``deterministic=True``, and this agent replaces its actions by
        random ones at the actor's ``exploration_rate``. Of an actor without that attribute, the rate is 0. The actor
        gets back the state that it returned, of whatever type. ``callback`` is called as by SB3's ``learn``.

        Raises:
            ValueError: ``steps`` below 1, an agent without environment, something that has no ``predict``, an actor of
                other spaces (before the first step), or invalid actions (before an environment takes them).
        """
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        if isinstance(actor, type) or not callable(getattr(actor, "predict", None)):
            raise ValueError(
                "collect takes an agent that has SB3's predict(observation, state, episode_start, deterministic), "
                f"got {_named(actor)}"
            )
        if self.env is None:
            raise ValueError("collect needs an environment; call set_env, or pass env to load")
        assert self.replay_buffer is not None
        _check_same_spaces(self, actor, "this agent", "the actor has")
        self._last_obs = None  # start from fresh episodes, which are the actor's alone
        self._actor = actor
        try:
            _, called = self._setup_learn(steps, callback, reset_num_timesteps=False)
            self.collect_rollouts(
                self.env,
                called,
                TrainFreq(-(-steps // self.n_envs), TrainFrequencyUnit.STEP),
                self.replay_buffer,
            )
        finally:
            self._actor = None
            self._current_progress_remaining = 1.0  # the learning rate's schedule is this agent's, and has not begun
            self._last_obs = None  # and hand over at an episode start: the actor's state is not this agent's
            self._last_state = self._next_state = None  # nor is it to be saved with this agent

    def keep_rates(self, parent: SpikingDQN, windows: int = 64) -> None:
        """Take the network of a ``parent`` at more micro-steps, with thresholds at which each layer fires as often.

        As `snn_rl.prune_timesteps`, on ``windows`` of replayed play. Raises ValueError where the replay holds none.
        """
        _check_spiking(parent, "keep_rates")
        assert self.replay_buffer is not None
        sampled = self.replay_buffer.sample_windows(windows, self.window_length, env=self._vec_normalize_env)
        pruned = parent.q_net.pruned(self.q_net.network.timesteps, sampled.observations, sampled.episode_start)
        self.q_net.network.load_state_dict(pruned.state_dict())
        self.q_net_target.load_state_dict(self.q_net.state_dict())

    def distill(
        self,
        gradient_steps: int,
        learning_rate: Schedule | None = None,
        after_update: Callable[[], object] = lambda: None,
    ) -> float:
        """Regress on ``self.teacher``'s Q-values over replayed windows; returns the mean loss of the last tenth.

        The loss is `distillation_loss`, at weight 1, and what ``spike_weight`` adds to it.

        ``learning_rate`` is a schedule over these steps; without one, the rate is where the agent's own stands.
        ``after_update`` is called after each of them. Ends with the target network equal to the online one. Raises
        ValueError where no teacher is set.
        """
        self._check_taught()
        if gradient_steps < 1:
            raise ValueError(f"gradient_steps must be >= 1, got {gradient_steps}")
        schedule = learning_rate or (lambda _: self.lr_schedule(self._current_progress_remaining))
        losses = []
        for step in range(gradient_steps):
            update_learning_rate(self.policy.optimizer, schedule(1 - step / gradient_steps))
            losses.append(self._update(0.0, 1.0, self.batch_size))
            self.distilled += 1
            after_update()
        self.q_net_target.load_state_dict(self.q_net.state_dict())
        return float(np.mean(losses[-max(1, gradient_steps // 10) :]))

    @classmethod
    def load(cls: type[SelfSpikingDQN], *args: Any, **kwargs: Any) -> SelfSpikingDQN:
        """SB3's ``load``, for files that you trust: a ``model.zip`` is unpickled, and so can run code of its writer.

        What comes from elsewhere is loaded by `snn_rl.load_policy`, from a ``policy.safetensors``, which runs none.

        Exploration goes on where the saved agent stopped. With ``seed=`` it starts anew, as SB3's does.
        """
        if kwargs.get("seed") is not None:
            kwargs["_exploration"] = None  # SB3 sets attributes of `kwargs` in place of those saved
        return super().load(*args, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_teacher", "_actor", "_captured"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": None}  # a copy has weights of its own


def _check_ann(agent: object) -> None:
    """Check that `SpikingDQN.from_ann` can convert the agent, as far as its type says."""
    policy = getattr(agent, "policy", None)
    if isinstance(policy, SpikingDQNPolicy):
        raise ValueError("the agent spikes already; SpikingDQN.from_parent takes it to fewer timesteps")
    if isinstance(agent, DQN):
        return
    if isinstance(policy, DQNPolicy):  # a LoadedPolicy: DQN.load cannot read its file
        hint = (
            ", which only plays; load the agent's SB3 zip by DQN.load, or build a DQN of the same layers and copy the "
            "weights by dqn.q_net.load_state_dict(loaded.policy.q_net.state_dict())"
        )
    elif isinstance(agent, BaseAlgorithm):
        hint = ", whose network is no DQN's; collect takes it as an actor"
    else:
        hint = "; DQN.load makes one of an SB3 zip"
    raise ValueError(f"from_ann takes a stable_baselines3.DQN, got {_named(agent)}{hint}")


def _check_spiking(agent: object, method: str) -> None:
    if isinstance(agent, SpikingDQN):
        return
    got, way_out = _named(agent), "of an ANN, SpikingDQN.from_ann makes one"
    if isinstance(getattr(agent, "policy", None), SpikingDQNPolicy):
        if isinstance(agent, DQN):
            got, way_out = "one that DQN.load has loaded", "load it by SpikingDQN.load"
        else:  # a LoadedPolicy
            way_out = "load the agent's SB3 zip by SpikingDQN.load"
    raise ValueError(f"{method} takes a SpikingDQN, got {got}; {way_out}")


def _check_same_spaces(
    ours: Any, theirs: Any, we: str = "the environment", they: str = "the agent was trained on"
) -> None:
    """Check the spaces of an environment or agent against those of another agent, which may have none (a `Player`)."""
    for name in ("observation_space", "action_space"):
        has, wants = getattr(ours, name), getattr(theirs, name, None)
        if wants is None or has == wants:
            continue
        way_out = "build it as for that agent's training"
        if name == "observation_space" and (frames_of(wants, has) or 1) > 1:
            way_out = "StackedTeacher lets a DQN on a stack of frames act on one"
        raise ValueError(f"{we}'s {name} is {in_one_line(has)}, but {they} {in_one_line(wants)}; {way_out}")


def _exploration_rate(actor: Player) -> float:
    return float(getattr(actor, "exploration_rate", 0.0))


def _named(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"


def _dqn_of(agent: DQN | StackedTeacher) -> DQN:
    return agent.dqn if isinstance(agent, StackedTeacher) else agent
