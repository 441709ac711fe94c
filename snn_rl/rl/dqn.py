"""`SpikingDQN`: SB3's DQN with a recurrent, spiking Q-network. What is its own is the temporal-difference loss."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor
from torch.nn import functional as F

from snn_rl.core.convert import DEFAULT_LEAK, DEFAULT_PERCENTILE
from snn_rl.core.network import State
from snn_rl.rl.actions import check_same_spaces
from snn_rl.rl.losses import n_step_returns
from snn_rl.rl.network import layers_of
from snn_rl.rl.policy import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    SpikingDQNPolicy,
    SpikingQNetwork,
    StatefulPolicy,
    check_forwards,
)
from snn_rl.rl.recurrent import SPIKES_EVERY, RecurrentLearner
from snn_rl.rl.replay import SequenceReplayBuffer, Windows
from snn_rl.rl.spaces import check_spaces
from snn_rl.rl.starts import convert_into, spread_into
from snn_rl.rl.teacher import StackedTeacher, frames_of, named, statistics_of

SelfSpikingDQN = TypeVar("SelfSpikingDQN", bound="SpikingDQN")


class SpikingDQN(RecurrentLearner, DQN):
    """DQN whose Q-network spikes; its membranes persist from frame to frame and are cleared where an episode starts.

    Takes SB3's DQN arguments, with these differences:

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` (of Dict observations) or a subclass of
            `SpikingDQNPolicy`; ``policy_kwargs`` also take ``timesteps``, ``leak``, ``leak_reset`` and ``persistent``.
        batch_size: windows per update (not transitions).
        optimize_memory_usage: changes nothing. The replay stores each frame once in any case, and nothing is truncated.
        sequence_length: frames of a window that are trained on.
        burn_in: frames before them that only warm the membranes up, without gradient.
        n_steps: of the n-step return inside a window.
        td_weight: weight of the temporal-difference loss.
        distillation_weight: of `distillation_loss` against the labels of ``self.teacher``, if it has one.
        spike_weight: of the spikes per neuron and frame (summed over the micro-steps), a loss that saves energy.

    Targets are double-Q (van Hasselt et al. 2016); online and target network burn in separately, each under its own
    weights, from silence (Kapturowski et al. 2019). Other differences from SB3's DQN:

    - Updates begin once every environment has stored ``burn_in + sequence_length + n_steps`` frames, however small
      ``learning_starts`` is.
    - The replay is a `SequenceReplayBuffer`, for any ``n_steps``. It holds timelines of frames, not the arrays
      ``observations``, ``rewards`` and ``dones`` of SB3's buffers. `HerReplayBuffer` is refused.
    - Actions or observations that do not count from 0 are refused (`check_spaces`).
    - Batch-norm is folded into the weights when the network is built, so its statistics do not move with training.
      The Q-network has one ``network`` in place of ``features_extractor`` and ``q_net``.
    - Exploration draws from a generator of its own, once for each environment. ``seed``, `set_random_seed` and
      ``load(..., seed=)`` seed it; without a seed it follows numpy's global seed. A loaded agent goes on where the
      saved one stopped.

    Raises:
        UnsupportedSpaceError: a space that `check_spaces` refuses; a ValueError, and an AssertionError as in SB3.
        ValueError: an argument out of range, or a network that cannot be converted.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
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
        distillation_weight: float = 1.0,
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
        if not spike_weight >= 0:
            raise ValueError(f"spike_weight must be >= 0, got {spike_weight}")
        self._begin()
        self.sequence_length, self.burn_in = sequence_length, burn_in
        self.td_weight, self.distillation_weight, self.spike_weight = td_weight, distillation_weight, spike_weight
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
        if self.replay_buffer is None and self.env is not None:
            size = int(self.action_space.n)  # type: ignore[attr-defined]
            self.replay_buffer_kwargs = {**self.replay_buffer_kwargs, "label_size": size}
        n_steps, self.n_steps = self.n_steps, 1  # as above
        super()._setup_model()
        self.n_steps = n_steps
        self._check_windows()

    @classmethod
    def _check_spaces(cls, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        check_spaces(observation_space, action_space)

    @property
    def tail(self) -> int:  # type: ignore[override]
        """Frames of a window that only bootstrap the n-step returns of those before them."""
        return self.n_steps if self.td_weight else 0

    # --- learning

    def train(self, gradient_steps: int, batch_size: int = 8) -> None:
        """Update the Q-network on ``gradient_steps`` batches of windows."""
        assert self.replay_buffer is not None
        if not self.replay_buffer.holds_windows(self.window_length):
            return
        if not self.td_weight:
            self.check_labelled()
        self._update_learning_rate(self.policy.optimizer)
        losses = []
        for _ in range(gradient_steps):
            log_spikes = self._n_updates % SPIKES_EVERY == 0
            losses.append(self._update(self._loss, self._loss_key, batch_size, log_spikes=log_spikes))
        self._record(losses)

    @property
    def _needs_teacher(self) -> bool:
        return not self.td_weight

    @property
    def _distils(self) -> bool:
        return self.distillation_weight > 0 and (self.teacher is not None or self._needs_teacher)

    @property
    def _loss_key(self) -> tuple[Any, ...]:
        """All that `_loss` depends on beside the windows and the weights."""
        return "dqn", self._distils, self.td_weight, self.distillation_weight, self.gamma, self.n_steps

    def _loss(self, windows: Windows) -> Tensor:
        q_t, state, cost = self._unroll_learning(windows)
        if self.td_weight:
            cost = cost + self.td_weight * self._td_loss(windows, q_t, state)
        if self._distils:
            cost = cost + self.distillation_weight * self._distillation_loss(windows, q_t)
        return cost

    def _append_tail(self, q_net: SpikingQNetwork, windows: Windows, q_t: Tensor, state: State) -> Tensor:
        """``q_t`` and, behind it, the Q-values of the n frames that only bootstrap; without gradient."""
        trained = self.burn_in + self.sequence_length
        with torch.no_grad():
            q_tail, _ = q_net.unroll(windows.observations[trained:], state, windows.episode_start[trained:])
            return torch.cat([q_t, q_tail])

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
        the agent has the DQN's layers, but starts from new weights (`snn_rl.core.spread`), to be taught by it. The DQN,
        or a `StackedTeacher` of it, becomes the agent's ``teacher``.

        Raises:
            ValueError: no DQN or one that spikes, a Q-network with a forward of its own (dueling, masked), spaces of
                ``env`` that are not its, or a network that cannot be converted.
        """
        _check_ann(dqn)
        check_forwards(dqn.policy)
        normalize = unwrap_vec_normalize(env) if isinstance(env, VecEnv) else None
        if statistics_of(dqn) is not None and (normalize is None or not normalize.norm_obs):
            raise ValueError(
                "the DQN was trained on normalized observations; pass its VecNormalize as env, or make it spike by "
                "Student.from_ann, whose policy holds the statistics"
            )
        if calibration_steps < 1:
            raise ValueError(f"calibration_steps must be >= 1, got {calibration_steps}")
        env = cls._checked_env(env, kwargs.get("verbose", 0))
        frames = frames_of(dqn.observation_space, env.observation_space)
        player: DQN | StackedTeacher = dqn
        if frames is not None and frames > 1:
            player = StackedTeacher(dqn, env.observation_space)
        check_same_spaces(env, player)
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
        batches = (model.q_net.preprocess(model.q_net.as_tensor(obs)) for obs in model._play(player, calibration_steps))
        if isinstance(player, StackedTeacher):
            spread_into(model.q_net, batches)
        else:
            ann = layers_of(dqn.q_net.features_extractor, dqn.q_net.q_net)
            convert_into(model.q_net, ann, batches, percentile, leak=leak, leak_reset=leak_reset)
        model.q_net_target.load_state_dict(model.q_net.state_dict())
        model.teacher = player
        return model

    @classmethod
    def from_parent(
        cls: type[SelfSpikingDQN], parent: SpikingDQN, env: GymEnv | str, timesteps: int, **kwargs: Any
    ) -> SelfSpikingDQN:
        """Temporal pruning: the weights, thresholds and leaks of ``parent`` at fewer micro-steps, to be trained on.

        ``kwargs`` are this class's own arguments; gamma and the network's options are the parent's. The parent's
        teacher becomes this agent's. `collect` the parent's play, then `keep_rates` lowers the thresholds.

        Raises:
            ValueError: a parent that does not spike, ``timesteps`` that are not fewer, or spaces that are not its.
        """
        _check_spiking(parent, "from_parent")
        model = cls._pruned(parent, env, timesteps, **{"gamma": parent.gamma, **kwargs})
        model.q_net_target.load_state_dict(model.q_net.state_dict())
        return model

    def keep_rates(self, parent: RecurrentLearner, windows: int = 64) -> None:
        _check_spiking(parent, "keep_rates")
        super().keep_rates(parent, windows)
        self.q_net_target.load_state_dict(self.q_net.state_dict())

    def distil(self, *args: Any, **kwargs: Any) -> float:
        """As `RecurrentLearner.distil`; ends with the target network equal to the online one."""
        loss = super().distil(*args, **kwargs)
        self.q_net_target.load_state_dict(self.q_net.state_dict())
        return loss


def _check_ann(agent: object) -> None:
    """Check that `SpikingDQN.from_ann` can convert the agent, as far as its type says."""
    policy = getattr(agent, "policy", None)
    if isinstance(policy, StatefulPolicy) and policy.net.timesteps is not None:
        raise ValueError("the agent spikes already; from_parent of its class takes it to fewer timesteps")
    if isinstance(agent, DQN):
        return
    if isinstance(policy, BasePolicy):
        hint = "; Student.from_ann takes agents of other algorithms, and policy files"
    else:
        hint = "; DQN.load makes one of an SB3 zip"
    raise ValueError(f"from_ann takes a stable_baselines3.DQN, got {named(agent)}{hint}")


def _check_spiking(agent: object, method: str) -> None:
    if isinstance(agent, SpikingDQN):
        return
    got, way_out = named(agent), "of an ANN, SpikingDQN.from_ann makes one"
    policy = getattr(agent, "policy", None)
    if isinstance(policy, SpikingDQNPolicy):
        got, way_out = "one that DQN.load has loaded", "load it by SpikingDQN.load"
    elif isinstance(agent, RecurrentLearner):
        way_out = "of a Student, Student.from_parent takes it"
    elif isinstance(policy, StatefulPolicy) and policy.net.timesteps is not None:  # a LoadedPolicy
        way_out = "load the agent's SB3 zip by SpikingDQN.load"
    raise ValueError(f"{method} takes a SpikingDQN, got {got}; {way_out}")
