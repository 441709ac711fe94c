"""`Student`: an agent that learns from a teacher alone, whatever the teacher's algorithm and the kind of actions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor

from snn_rl.rl.actions import check_same_spaces
from snn_rl.rl.heads import head_of, kind_of
from snn_rl.rl.policy import AgentPolicy
from snn_rl.rl.recurrent import SPIKES_EVERY, RecurrentLearner
from snn_rl.rl.replay import SequenceReplayBuffer, Windows
from snn_rl.rl.spaces import check_action_space, check_observation_space
from snn_rl.rl.starts import convert_into, spread_into
from snn_rl.rl.teacher import StackedTeacher, Teacher, named, teacher_of

SelfStudent = TypeVar("SelfStudent", bound="Student")


class Student(RecurrentLearner):
    """An SB3 algorithm that knows no rewards: it learns what its ``teacher`` would have done where it plays itself.

    A spiking stage is policy distillation (Rusu et al. 2016) on the student's own play (Ross et al. 2011, DAgger). The
    teacher labels each observation as it is played, `head` compares the student's outputs with the labels, and
    gradients flow through windows of consecutive frames, whose first ``burn_in`` frames only warm the membranes up.

    Args:
        policy: `AgentPolicy`, or its alias "AgentPolicy". ``policy_kwargs`` are its arguments, of which ``head`` and
            ``net_arch`` must be given. `fresh`, `from_ann` and `from_parent` build them.
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
        gradient_steps: int = 2,
        exploration_rate: float = 0.04,
        max_grad_norm: float = 10.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        sequence_length: int = 8,
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
        if _init_setup_model and not {"head", "net_arch"} <= (policy_kwargs or {}).keys():
            raise ValueError(
                "policy_kwargs must say head and net_arch; Student.fresh, from_ann and from_parent take them from a "
                "teacher"
            )
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
            size = head_of(self.policy_kwargs["head"], self.action_space).size
            self.replay_buffer_kwargs = {**self.replay_buffer_kwargs, "label_size": size}
        super()._setup_model()
        self._check_windows()

    @classmethod
    def _checked_env(cls, env: GymEnv | str, verbose: int) -> VecEnv:
        env = super()._checked_env(env, verbose)
        normalize = unwrap_vec_normalize(env)
        if normalize is not None and normalize.norm_obs:
            raise ValueError(
                "a Student takes observations as the environment gives them, and its policy holds the statistics of "
                "its teacher; take VecNormalize off"
            )
        return env

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """SB3's. Raises ValueError for an environment that the constructor would refuse."""
        super().set_env(self._checked_env(env, self.verbose), force_reset)

    @classmethod
    def _check_spaces(cls, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        check_observation_space(observation_space)
        check_action_space(action_space)

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

    # --- a stage's start

    @classmethod
    def fresh(
        cls: type[SelfStudent],
        teacher: object,
        env: GymEnv | str,
        net_arch: Sequence[int] = (256, 256),
        timesteps: int | None = None,
        *,
        calibration_steps: int = 1000,
        policy_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SelfStudent:
        """A network with new weights, to be taught by a ``teacher`` whose own does not convert.

        Without ``timesteps`` it is an ordinary one of ReLUs, which `from_ann` converts once it has learnt. With
        ``timesteps`` it spikes from the start, and its first synapse is drawn so that its neurons can remember
        (`snn_rl.core.spread`): for a student that has to remember what its teacher sees. ``calibration_steps`` of the
        teacher's play say what that sees.

        ``kwargs`` are this class's own arguments. The teacher is set.

        Raises:
            ValueError: something that cannot be a teacher (`teacher_of`), or spaces of ``env`` that are not its.
        """
        env = cls._checked_env(env, kwargs.get("verbose", 0))
        taught_by = teacher_of(teacher, env.observation_space)
        check_same_spaces(env, taught_by)
        options = {
            "head": kind_of(taught_by.head),
            "net_arch": list(net_arch),
            "statistics": taught_by.statistics,
            "timesteps": timesteps,
            **(policy_kwargs or {}),
        }
        if is_image_space(env.observation_space):
            options.setdefault("features_extractor_class", NatureCNN)
        elif isinstance(env.observation_space, spaces.Dict):
            options.setdefault("features_extractor_class", CombinedExtractor)
        if timesteps is None:
            kwargs = {"sequence_length": 1, "burn_in": 0, **kwargs}
        model = cls(AgentPolicy, env, policy_kwargs=options, **kwargs)
        if timesteps is not None:
            spread_into(model.net, model._calibration(taught_by, calibration_steps))
        model.teacher = taught_by
        return model

    def _calibration(self, teacher: Teacher, steps: int) -> Iterator[Tensor]:
        """Preprocessed observations of a teacher's play."""
        for obs in self._play(teacher, steps):
            yield self.net.preprocess(self.net.as_tensor(obs))

    @classmethod
    def from_ann(
        cls: type[SelfStudent],
        ann: object,
        env: GymEnv | str,
        timesteps: int = 5,
        *,
        percentile: float = 99.0,
        leak: float = 0.75,
        leak_reset: bool = False,
        persistent: bool = True,
        calibration_steps: int = 1000,
        policy_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SelfStudent:
        """Convert a trained agent whose network has ReLUs, calibrated on ``calibration_steps`` of its own play.

        ``ann`` is an agent or a policy of SB3 or sb3-contrib, an ordinary `Student` (`fresh`), or a `Teacher`. It
        becomes the teacher. ``kwargs`` are this class's own arguments.

        Where ``env`` shows one frame and the agent was trained on a stack of them, its first synapse has no
        counterpart: the student has the agent's layers, but starts from new weights (`snn_rl.core.spread`).

        Raises:
            ValueError: an agent that cannot be a teacher or whose network does not convert, or spaces of ``env`` that
                are not its.
        """
        if calibration_steps < 1:
            raise ValueError(f"calibration_steps must be >= 1, got {calibration_steps}")
        env = cls._checked_env(env, kwargs.get("verbose", 0))
        taught_by = teacher_of(ann, env.observation_space)
        check_same_spaces(env, taught_by)
        source = taught_by.teacher if isinstance(taught_by, StackedTeacher) else taught_by
        actor = source.actor
        if actor is None or not (actor.converts or source is not taught_by):
            raise ValueError(
                f"the network of {named(ann)} does not convert: it needs hidden layers with ReLUs and no memory; teach "
                "a new one first, by Student.fresh"
            )
        options = {
            "head": kind_of(actor.head),
            "net_arch": list(actor.net_arch),
            "features_extractor_class": actor.features_extractor_class,
            "features_extractor_kwargs": actor.features_extractor_kwargs,
            "normalize_images": actor.normalize_images,
            "statistics": source.statistics,
            "timesteps": timesteps,
            "leak": leak,
            "leak_reset": leak_reset,
            "persistent": persistent,
            **(policy_kwargs or {}),
        }
        model = cls(AgentPolicy, env, policy_kwargs=options, **kwargs)
        batches = model._calibration(taught_by, calibration_steps)
        if source is not taught_by:
            spread_into(model.net, batches)
        else:
            convert_into(model.net, actor.network, batches, percentile, leak=leak, leak_reset=leak_reset)
        model.teacher = taught_by
        return model

    @classmethod
    def from_parent(
        cls: type[SelfStudent], parent: Student, env: GymEnv | str, timesteps: int, **kwargs: Any
    ) -> SelfStudent:
        """Temporal pruning: the weights, thresholds and leaks of ``parent`` at fewer micro-steps, to be trained on.

        ``kwargs`` are this class's own arguments. The parent's teacher becomes this agent's. `collect` the parent's
        play, then `keep_rates` lowers the thresholds.

        Raises:
            ValueError: a parent that does not spike, ``timesteps`` that are not fewer, or spaces that are not its.
        """
        if not isinstance(parent, Student) or parent.timesteps is None:
            raise ValueError(f"from_parent takes a spiking Student, got {named(parent)}; Student.from_ann makes one")
        return cls._pruned(parent, env, timesteps, **kwargs)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
