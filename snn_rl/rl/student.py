"""`Student`: an agent that learns from a teacher alone, whatever the teacher's algorithm and the kind of actions."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor

from snn_rl.rl.network import NumpyState
from snn_rl.rl.policy import AgentPolicy
from snn_rl.rl.recurrent import SPIKES_EVERY, RecurrentLearner
from snn_rl.rl.replay import SequenceReplayBuffer, Windows
from snn_rl.rl.spaces import check_observation_space

SelfStudent = TypeVar("SelfStudent", bound="Student")


class Student(RecurrentLearner):
    """An SB3 algorithm that knows no rewards: it learns what its ``teacher`` would have done where it plays itself.

    A spiking stage is policy distillation (Rusu et al. 2016) on the student's own play (Ross et al. 2011, DAgger). The
    teacher labels each observation as it is played, `head` compares the student's outputs with the labels, and
    gradients flow through windows of consecutive frames, whose first ``burn_in`` frames only warm the membranes up.

    Args:
        policy: `AgentPolicy` (the default). ``policy_kwargs`` are its arguments.
        env, learning_rate, buffer_size, train_freq, gradient_steps, seed, device ...: as in SB3's DQN.
        batch_size: windows per update.
        exploration_rate: share of random actions in the student's own play.
        sequence_length: frames of a window that are trained on.
        burn_in: frames before them, without gradient.
        spike_weight: of the spikes per neuron and frame (summed over the micro-steps), a loss that saves energy.

    Raises:
        ValueError: an argument out of range, or a network that cannot be converted.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"AgentPolicy": AgentPolicy}
    policy: AgentPolicy

    def __init__(
        self,
        policy: str | type[AgentPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 50_000,
        batch_size: int = 32,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        exploration_rate: float = 0.0,
        max_grad_norm: float = 10.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        sequence_length: int = 16,
        burn_in: int = 4,
        spike_weight: float = 0.0,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("sequence_length", sequence_length, 1),
            ("burn_in", burn_in, 0),
            ("spike_weight", spike_weight, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if not 0 <= exploration_rate <= 1:
            raise ValueError(f"exploration_rate must lie in [0, 1], got {exploration_rate}")
        self._begin()
        self.sequence_length, self.burn_in, self.spike_weight = sequence_length, burn_in, spike_weight
        self.exploration_rate, self.max_grad_norm = exploration_rate, max_grad_norm
        if env is not None:  # a loaded agent may have none
            env = self._checked_env(env, verbose)
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts=0,
            batch_size=batch_size,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            replay_buffer_class=SequenceReplayBuffer,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            sde_support=False,
            support_multi_env=True,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if self.env is not None and self.replay_buffer is None:
            from snn_rl.rl.heads import head_of

            size = head_of(self.policy_kwargs["head"], self.action_space).size
            self.replay_buffer_kwargs = {**self.replay_buffer_kwargs, "label_size": size}
        super()._setup_model()
        self._check_windows()

    @classmethod
    def _check_spaces(cls, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        check_observation_space(observation_space)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: NumpyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, NumpyState]:
        """Actions and membranes, as `StatefulPolicy.predict`; with random ones among them unless ``deterministic``."""
        actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        if not deterministic and self.exploration_rate:
            batch = actions[None] if actions.shape == self.action_space.shape else actions
            actions = self._explore(batch, self.exploration_rate).reshape(actions.shape)
        return actions, state

    def train(self, gradient_steps: int, batch_size: int = 32) -> None:
        """Update the network on ``gradient_steps`` batches of windows."""
        assert self.replay_buffer is not None
        if not self.replay_buffer.holds_windows(self.window_length):
            return
        self.check_labelled()
        self._update_learning_rate(self.policy.optimizer)
        losses = []
        for _ in range(gradient_steps):
            log_spikes = self._n_updates % SPIKES_EVERY == 0
            losses.append(self._update(self._loss, ("student",), batch_size, log_spikes=log_spikes))
        self._record(losses)

    def _loss(self, windows: Windows) -> Tensor:
        out, _, cost = self._unroll_learning(windows)
        return self._distillation_loss(windows, out) + cost

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
