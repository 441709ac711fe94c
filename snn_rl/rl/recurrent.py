"""What learners with a stateful network share: acting with it, a teacher's labels, gradients on windows of play."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from snn_rl.core.activity import count_spikes, spikes_per_neuron
from snn_rl.core.network import SpikingNetwork, State
from snn_rl.rl.actions import check_same_spaces, checked_actions, exploration_rate, random_actions
from snn_rl.rl.captured import CapturedGradient, gradient
from snn_rl.rl.heads import kind_of
from snn_rl.rl.network import NumpyState, StatefulNetwork
from snn_rl.rl.policy import StatefulPolicy
from snn_rl.rl.policy_file import save_policy
from snn_rl.rl.replay import SequenceReplayBuffer, Windows, frame_stack_of
from snn_rl.rl.teacher import Observations, Player, Teacher, named, normalizes, statistics_of, teacher_of

SelfLearner = TypeVar("SelfLearner", bound="RecurrentLearner")

SPIKES_EVERY = 100  # updates: how often spikes are counted for the log, which is slower than not to


class RecurrentLearner(OffPolicyAlgorithm):
    """An off-policy algorithm of SB3's whose policy has a state. Its subclasses say what is learnt, in `_loss`.

    The state is committed where the transition is stored, so that it stays aligned with the last observation.
    """

    policy: StatefulPolicy
    exploration_rate: float
    replay_buffer: SequenceReplayBuffer | None
    sequence_length: int  # frames of a window that are trained on
    burn_in: int  # frames before them that only warm the membranes up, without gradient
    tail: int = 0  # frames behind them
    spike_weight: float  # of the spikes per neuron and frame, a loss that saves energy
    max_grad_norm: float

    def _begin(self) -> None:
        """Attributes that SB3's constructor may already need."""
        self._teacher: Teacher | None = None
        self.distilled = 0  # updates that `distil` has made
        # Of whoever acts, aligned with `_last_obs`: its state (the membranes of this agent) before it sees that.
        self._last_state: Any = None
        self._next_state: Any = None  # after it was seen; committed with the transition
        self._teacher_state: Any = None  # likewise, of the teacher
        self._next_teacher_state: Any = None
        self._labels: np.ndarray | None = None  # of `_last_obs`, stored with the transition
        self._pending = False  # an action was chosen, and its transition is not stored yet
        self._exploration: np.random.Generator | None = None
        self._captured: tuple[tuple[Any, ...], CapturedGradient] | None = None
        self._actor: Player | None = None  # who acts in place of this agent, while `collect` runs

    @property
    def _needs_teacher(self) -> bool:
        """Whether nothing is learnt from the agent's own play without one."""
        return True

    @property
    def net(self) -> StatefulNetwork:
        """The network that is trained."""
        return self.policy.net

    @property
    def timesteps(self) -> int | None:
        """Micro-steps per frame; None of an ordinary network."""
        return self.net.timesteps

    @property
    def window_length(self) -> int:
        """Frames per sampled window."""
        return self.burn_in + self.sequence_length + self.tail

    def _setup_model(self) -> None:
        self.optimize_memory_usage = False  # whatever `load` was given: SB3 would truncate the last trajectory
        if self.replay_buffer is None and self.env is not None:
            self.replay_buffer_kwargs = {"frame_stack": frame_stack_of(self.env), **self.replay_buffer_kwargs}
        saved = self._exploration  # of a loaded agent, unless `load` was given a seed
        super()._setup_model()  # calls set_random_seed
        # An own generator: drawing from numpy's global one would tie the agent to whatever else draws from it.
        if saved is not None:
            self._exploration = saved
        elif self._exploration is None:  # no seed: one draw, so that SB3's global `set_random_seed` decides
            self._exploration = np.random.default_rng(np.random.randint(2**32, dtype=np.uint32))

    def _check_windows(self) -> None:
        """Raise ValueError where the replay cannot hold a window."""
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
        env = maybe_make_env(env, verbose)
        if isinstance(env.observation_space, spaces.Dict):  # whose parts SB3's wrappers fail on
            cls._check_spaces(env.observation_space, env.action_space)
        env = cls._wrap_env(env, verbose)
        cls._check_spaces(env.observation_space, env.action_space)
        return env

    @classmethod
    @abstractmethod
    def _check_spaces(cls, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        """Raise UnsupportedSpaceError for spaces that the algorithm cannot learn in."""

    @classmethod
    def _pruned(
        cls: type[SelfLearner], parent: RecurrentLearner, env: GymEnv | str, timesteps: int, **kwargs: Any
    ) -> SelfLearner:
        """An agent at fewer ``timesteps`` than its spiking ``parent``, with its network, policy and teacher.

        Raises:
            ValueError: ``timesteps`` that are not fewer, spaces that are not the parent's, or other layers.
        """
        assert parent.timesteps is not None
        if parent.timesteps == 1:
            raise ValueError("the parent is at 1 timestep already, and there are no fewer")
        if not 1 <= timesteps < parent.timesteps:
            raise ValueError(f"timesteps must lie in [1, {parent.timesteps - 1}], below the parent's, got {timesteps}")
        env = cls._checked_env(env, kwargs.get("verbose", 0))
        check_same_spaces(env, parent)
        policy_kwargs = {**parent.policy_kwargs, **(kwargs.pop("policy_kwargs", None) or {}), "timesteps": timesteps}
        model = cls(type(parent.policy), env, policy_kwargs=policy_kwargs, **kwargs)
        try:
            model.net.network.load_state_dict(parent.net.network.state_dict())
        except RuntimeError as error:
            raise ValueError("the layers are the parent's: leave net_arch and the like out of policy_kwargs") from error
        model.teacher = parent.teacher
        return model

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
        """Actions and membranes, as `StatefulPolicy.predict`; random at `exploration_rate` unless ``deterministic``.

        Each environment draws for itself, and the network always runs: a random action must not freeze the membranes.
        """
        actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        if not deterministic:
            batch = np.reshape(actions, (-1, *(self.action_space.shape or ())))  # one bare observation has one action
            actions = self._explore(batch, self.exploration_rate).reshape(np.shape(actions))
        return actions, state

    def _explore(self, actions: np.ndarray, rate: float) -> np.ndarray:
        """``actions`` (n_envs, ...), each replaced at the ``rate`` by a random one."""
        assert self._exploration is not None
        random = random_actions(self.action_space, len(actions), self._exploration)
        replaced = self._exploration.random(len(actions)) < rate
        return np.where(replaced.reshape(-1, *[1] * (actions.ndim - 1)), random, actions)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self._needs_teacher and self._teacher is None and self._actor is None:  # said before the first step
            raise ValueError("distillation needs a teacher: assign an agent to `.teacher`")
        if self._pending:  # a callback has stopped between a step and its storage: the environments have moved on
            self._pending, self._last_obs, self._labels = False, None, None
        if (reset_num_timesteps or self._last_obs is None) and self.replay_buffer is not None:
            self.replay_buffer.open[:] = False  # the next observation begins an episode, whatever it looks like
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        assert self._last_episode_starts is not None
        if self._last_episode_starts.all():  # the environments were just reset, perhaps another number of them
            self._last_state = self._teacher_state = None
        return result

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        actor: Player = self if self._actor is None else self._actor
        assert isinstance(self._last_obs, np.ndarray | dict)
        self._pending = True
        starts, teacher = self._last_episode_starts, self._teacher
        if teacher is not None:
            seen = self._as_seen_by(teacher, self._last_obs)
            self._labels, self._next_teacher_state = teacher.label(seen, self._teacher_state, starts)
            if not np.isfinite(self._labels).all():
                raise ValueError(
                    "the teacher's output holds NaN or infinity: its weights are damaged, or it was trained on other "
                    "observations"
                )
        if actor is teacher:
            assert self._labels is not None
            actions = teacher.head.actions(self._labels)
        else:
            seen = self._as_seen_by(actor, self._last_obs)
            actions, self._next_state = self._greedy(actor, seen, self._last_state, starts)
        actions = self._explore(actions, 1.0 if self.num_timesteps < learning_starts else exploration_rate(actor))
        return actions, actions

    def _as_seen_by(self, agent: Player, obs: Observations) -> Observations:
        """``obs``, the last of a ``VecNormalize``, as they were before it for an agent that normalises them itself."""
        if self._vec_normalize_env is None or not normalizes(agent):
            return obs
        original = self._vec_normalize_env.get_original_obs()
        assert isinstance(original, np.ndarray | dict)
        return original

    def _greedy(
        self, actor: Player, obs: Observations, state: Any, episode_start: np.ndarray | None
    ) -> tuple[np.ndarray, Any]:
        """An actor's greedy actions (n_envs, ...), checked before an environment takes them, and its state after."""
        greedy, state = actor.predict(obs, state, episode_start, deterministic=True)
        return checked_actions(greedy, self.action_space, self.n_envs, named(actor)), state

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
        if self._labels is not None:
            assert isinstance(replay_buffer, SequenceReplayBuffer)
            replay_buffer.label(self._labels)
            self._labels = None
        self._pending = False
        # Here, where `_last_obs` moves on, and not earlier: a callback may stop the collection in between.
        self._last_state, self._teacher_state = self._next_state, self._next_teacher_state
        self._last_episode_starts = dones

    def _play(self, actor: Player, steps: int) -> Iterator[Observations]:
        """Observations (n_envs, ...) of another agent's epsilon-greedy play, ``steps`` in all, from fresh episodes."""
        assert self.env is not None
        obs, state, episode_start = self.env.reset(), None, np.ones(self.n_envs, dtype=bool)
        for _ in range(-(-steps // self.n_envs)):
            assert isinstance(obs, np.ndarray | dict)
            yield obs
            actions, state = self._greedy(actor, self._as_seen_by(actor, obs), state, episode_start)
            obs, _, episode_start, _ = self.env.step(self._explore(actions, exploration_rate(actor)))

    def collect(self, actor: Player, steps: int, callback: MaybeCallback = None) -> None:
        """Store ``steps`` environment steps of another agent's epsilon-greedy play in this agent's replay buffer.

        A freshly converted network's own play is worthless as replay; a stage starts from its parent's instead.

        The actor is whatever has the ``predict`` of SB3's algorithms: any of them, a `LoadedPolicy`, a `Teacher`
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
                f"got {named(actor)}"
            )
        if self.env is None:
            raise ValueError("collect needs an environment; call set_env, or pass env to load")
        assert self.replay_buffer is not None
        check_same_spaces(self, actor, "this agent", "the actor has")
        if self._vec_normalize_env is None and not normalizes(actor) and statistics_of(actor) is not None:
            actor = teacher_of(actor)  # which normalises what it sees here as it is
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

    # --- learning

    @property
    def teacher(self) -> Teacher | None:
        """The agent that labels what is played; None at first, and never saved with the agent.

        Assign a `Teacher`, an agent of SB3 or sb3-contrib of any algorithm, a spiking agent, or an SB3 policy. It
        labels what is played from then on. Raises ValueError for anything else, for one of other spaces, and for one
        whose outputs mean something else than this agent's.
        """
        return self._teacher

    @teacher.setter
    def teacher(self, teacher: object) -> None:
        if teacher is not None:
            teacher = teacher_of(teacher, self.observation_space)
            check_same_spaces(self, teacher, "this agent", "the teacher has")
            ours, theirs = kind_of(self.policy.head), kind_of(teacher.head)
            if ours != theirs:
                raise ValueError(f"this agent's outputs are {ours}, but the teacher's are {theirs}; use Student.fresh")
        self._teacher = teacher
        self._labels = None
        self._last_obs = None  # its state begins with an episode

    def _update(
        self, loss: Callable[[Windows], Tensor], key: tuple[Any, ...], batch_size: int, *, log_spikes: bool = False
    ) -> float:
        """One gradient step of ``loss`` on ``batch_size`` fresh windows; returns the loss.

        ``key`` is all that ``loss`` depends on beside the windows and the weights.
        """
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        windows = self.replay_buffer.sample_windows(batch_size, self.window_length, env=self._vec_normalize_env)
        if self.device.type == "cuda" and not log_spikes:  # counting needs the layers run one by one
            value, norm = self._captured_gradient(loss, key, windows)(windows)
        else:
            network = self.net.network
            spiking = log_spikes and isinstance(network, SpikingNetwork)
            with count_spikes(network) if spiking else nullcontext() as counter:  # type: ignore[arg-type]
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
        """What the optimiser trains."""
        return list(self.net.network.parameters())

    def _captured_gradient(
        self, loss: Callable[[Windows], Tensor], key: tuple[Any, ...], windows: Windows
    ) -> CapturedGradient:
        """The gradient of ``loss`` as a CUDA graph, captured anew where an option or the place of a weight changed."""
        held = (
            *key, self.spike_weight, self.burn_in, self.sequence_length, self.max_grad_norm,
            self.net.timesteps, self.net.persistent,
            *(tensor.shape for tensor in windows),
            *(weight.data_ptr() for weight in self.policy.parameters()),
        )  # fmt: skip
        if self._captured is None or self._captured[0] != held:
            self._captured = None  # its memory first
            self._captured = held, CapturedGradient(loss, self._learning, self.max_grad_norm, windows)
        return self._captured[1]

    def _why_not_finite(self, windows: Windows, loss: float) -> str:
        observations = windows.observations
        if (flat := self.net.flat) is not None:
            observations = torch.cat(
                [part.double().flatten() for part in flat.decode(observations.flatten(0, 1)).values()]
            )
        for name, values in (("observations", observations), ("rewards", windows.rewards)):
            if not torch.isfinite(values).all():
                return f"the replayed {name} hold NaN or infinity in update {self._n_updates}: repair the environment"
        for name, parameter in self.policy.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the weights {name} hold NaN or infinity in update {self._n_updates}: load a good checkpoint"
        rate = self.policy.optimizer.param_groups[0]["lr"]
        return f"the loss is {loss} in update {self._n_updates}: train with a learning rate below {rate:g}"

    def _record(self, losses: list[float]) -> None:
        """Log an update's loss, thresholds and leaks."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", float(np.mean(losses)))
        network = self.net.network
        for name, lif in network.lif_layers.items() if isinstance(network, SpikingNetwork) else ():
            self.logger.record(f"threshold/{name}", lif.threshold.item())
            self.logger.record(f"leak/{name}", lif.leak.item())

    def _unroll(self, net: StatefulNetwork, windows: Windows) -> tuple[Tensor, State]:
        """Outputs of the trained frames, (sequence_length, batch, size), and the state behind them."""
        state = None
        if self.burn_in and net.timesteps is not None:
            with torch.no_grad():
                burn_in = windows.observations[: self.burn_in]
                _, state = net.unroll(burn_in, None, windows.episode_start[: self.burn_in])
        return net.unroll(self._trained(windows.observations), state, self._trained(windows.episode_start))

    def _unroll_learning(self, windows: Windows) -> tuple[Tensor, State, Tensor]:
        """`_unroll` of the network that is trained, and what its spikes cost."""
        network = self.net.network
        counted = self.spike_weight and isinstance(network, SpikingNetwork)
        with spikes_per_neuron(network) if counted else nullcontext() as spikes:  # type: ignore[arg-type]
            out, state = self._unroll(self.net, windows)
        cost = out.new_zeros(()) if spikes is None else self.spike_weight * spikes.mean()
        return out, state, cost

    def _trained(self, x: Tensor) -> Tensor:
        """The frames of a window that are trained on, of a tensor (window_length, batch, ...)."""
        return x[self.burn_in : self.burn_in + self.sequence_length]

    def _distillation_loss(self, windows: Windows, out: Tensor) -> Tensor:
        """The head's loss against the teacher's labels."""
        labels, mask = self._trained(windows.labels), self._trained(windows.labelled)
        return self.policy.head.loss(out, labels, mask)

    def distil(
        self,
        gradient_steps: int,
        learning_rate: Schedule | None = None,
        after_update: Callable[[], object] = lambda: None,
    ) -> float:
        """Learn the teacher's labels of replayed windows; returns the mean loss of the last tenth of the updates.

        The loss is the head's, at weight 1, and what ``spike_weight`` adds to it. ``learning_rate`` is a schedule over
        these steps; without one, the rate is where the agent's own stands. ``after_update`` is called after each of
        them.

        Raises:
            ValueError: ``gradient_steps`` below 1, or a replay that holds no labels.
        """
        if gradient_steps < 1:
            raise ValueError(f"gradient_steps must be >= 1, got {gradient_steps}")
        self.check_labelled()
        schedule = learning_rate or (lambda _: self.lr_schedule(self._current_progress_remaining))

        def loss(windows: Windows) -> Tensor:
            out, _, cost = self._unroll_learning(windows)
            return self._distillation_loss(windows, out) + cost

        losses = []
        for step in range(gradient_steps):
            update_learning_rate(self.policy.optimizer, schedule(1 - step / gradient_steps))
            losses.append(self._update(loss, ("distil",), self.batch_size))
            self.distilled += 1
            after_update()
        return float(np.mean(losses[-max(1, gradient_steps // 10) :]))

    def check_labelled(self) -> None:
        """Raise ValueError where the replay holds nothing that a teacher has labelled."""
        assert self.replay_buffer is not None
        if not self.replay_buffer.labelled.any():
            raise ValueError(
                "nothing in the replay is labelled by a teacher: assign one to `.teacher`, then collect play"
            )

    def keep_rates(self, parent: RecurrentLearner, windows: int = 64) -> None:
        """Take the network of a ``parent`` at more micro-steps, with thresholds at which each layer fires as often.

        As `snn_rl.prune_timesteps`, on ``windows`` of replayed play. Raises ValueError where the replay holds none, or
        for a parent that does not spike.
        """
        assert self.replay_buffer is not None
        assert self.timesteps is not None
        if not isinstance(parent, RecurrentLearner) or parent.timesteps is None:
            raise ValueError(f"keep_rates takes a spiking agent, got {named(parent)}")
        sampled = self.replay_buffer.sample_windows(windows, self.window_length, env=self._vec_normalize_env)
        pruned = parent.net.pruned(self.timesteps, sampled.observations, sampled.episode_start)
        self.net.network.load_state_dict(pruned.state_dict())

    @classmethod
    def load(cls: type[SelfLearner], *args: Any, **kwargs: Any) -> SelfLearner:
        """SB3's ``load``, for files that you trust: a ``model.zip`` is unpickled, and so can run code of its writer.

        What comes from elsewhere is loaded by `snn_rl.load_policy`, from a ``policy.safetensors``, which runs none.

        Exploration goes on where the saved agent stopped. With ``seed=`` it starts anew, as SB3's does.
        """
        if kwargs.get("seed") is not None:
            kwargs["_exploration"] = None  # SB3 sets attributes of `kwargs` in place of those saved
        return super().load(*args, **kwargs)

    def save(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """SB3's zip, to train on; or where ``path`` ends in ``.safetensors`` the policy file, to share and run."""
        if str(path).endswith(".safetensors"):
            save_policy(self, path, {})
        else:
            super().save(path, *args, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        own = ["_teacher", "_teacher_state", "_next_teacher_state", "_actor", "_captured", "_labels"]
        return [*super()._excluded_save_params(), *own]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": None}  # a copy has weights of its own
