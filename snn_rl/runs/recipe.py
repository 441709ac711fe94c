"""Recipes: all that an agent's training depends on, as frozen dataclasses. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

from snn_rl.base.fields import amount, check_fields, count, fraction, percent, positive, real, switch
from snn_rl.base.limits import MAX_EPISODE_STEPS, MAX_TIMESTEPS
from snn_rl.base.progress import one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from stable_baselines3.common.vec_env import VecEnv

# Disjoint ranges, a thousand environments apart for each run: what is reported was never trained or selected on.
VALIDATION_SEEDS = 500_000_000
TEST_SEEDS = 1_000_000_000
SEEDS_PER_RUN = 1_000

SMOKE_STEPS = 1_024  # of a smoke run's ANN
SET_BY_RUN = {"num_envs", "seed"}  # arguments of `make_env` that no recipe sets


# The comment at or above a field is its help on the command line.


@dataclass(frozen=True)
class NetworkConfig:
    """The Q-network: convolutions and a linear layer behind them, or neither, and then linear layers."""

    convolutions: tuple[tuple[int, int, int], ...] = ()  # channels, kernel size and stride of each convolution
    features_dim: int = count(512)  # units of the linear layer behind the convolutions
    net_arch: tuple[int, ...] = (64, 64)  # units of each further linear layer


@dataclass(frozen=True)
class AnnConfig:
    """The ANN stage, which trains an ordinary network with SB3's DQN."""

    env_steps: int = count(50_000)  # environment steps of the stage, at most
    learning_rate: float = amount(1e-4)  # learning rate at the start
    final_learning_rate: float = amount(1e-4)  # learning rate at the end; it changes linearly from the one at the start
    buffer_size: int = count(100_000)  # environment steps that the replay buffer holds
    learning_starts: int = count(1_000, at_least=0)  # steps of random play before training begins
    batch_size: int = count(32)  # transitions per gradient step
    train_every: int = count(8)  # environment steps between trainings
    gradient_steps: int = count(2)  # gradient steps per training
    n_steps: int = count(1)  # rewards that an n-step return adds up
    gamma: float = fraction(0.99)  # discount factor, also of the spiking stages
    target_update_every: int = count(1_000)  # environment steps between updates of the target network
    exploration_steps: int = count(10_000)  # environment steps in which the share of random actions falls from 1
    exploration_eps: float = fraction(0.05)  # share of random actions after that
    adam_eps: float = amount(1e-8)  # epsilon of the Adam optimizer
    max_grad_norm: float = positive(10.0)  # gradients are clipped to this norm
    # validate and keep an exponential average of the weights over about this many environment steps; 0: no average.
    # Greedy play swings from one update to the next, that of an average less
    average_steps: int = count(0, at_least=0)
    # at the end of the stage, remove the units that are active on fewer than 1 in 100 observations
    drop_dead_units: bool = switch(False)


@dataclass(frozen=True)
class SnnConfig:
    """A spiking stage. Its parent is the stage before it. It learns from its parent's play first, then from its own."""

    # the initial threshold is this percentile of the inputs of the ReLU that it replaces
    percentile: float = percent(99.0)
    # initial leak, the factor by which a membrane potential shrinks at each timestep; 1: no leak
    leak: float = fraction(0.9)
    # let the reset leak too: a membrane keeps leak * (potential - threshold * spike) instead of
    # leak * potential - threshold * spike
    leak_reset: bool = switch(False)
    # carry the membrane potentials from frame to frame; otherwise clear them at every frame
    persistent: bool = switch(True)
    parent_steps: int = count(10_000)  # environment steps of the parent's play to learn from
    # share of random actions in the parent's play, which show what follows from a mistake
    parent_eps: float = fraction(0.04)
    distillation_updates: int = count(300, at_least=0)  # gradient steps on the parent's play
    env_steps: int = count(20_000)  # environment steps of the stage's own play, at most
    # divide distillation-updates and env-steps by T, so that stages take equally long
    same_compute: bool = switch(False)
    # lower the thresholds with T, so that neurons fire as often per timestep as before; otherwise lower T alone, as the
    # paper does
    keep_rates: bool = switch(True)
    learning_rate: float = amount(1e-3)  # learning rate at the start, on the parent's play; it falls linearly
    # learning rate at the end of the parent's play; on the stage's own play it falls linearly to a twentieth of this
    play_learning_rate: float = amount(1e-3)
    buffer_size: int = count(50_000)  # environment steps that the replay buffer holds
    batch_size: int = count(16)  # windows of consecutive frames per gradient step
    sequence_length: int = count(16)  # frames of a window that are trained on
    burn_in: int = count(4, at_least=0)  # frames of a window before those, which only warm up the membrane potentials
    train_every: int = count(8)  # environment steps between trainings
    gradient_steps: int = count(4)  # gradient steps per training
    n_steps: int = count(3)  # with rewards: how many an n-step return adds up
    target_update_every: int = count(500)  # with rewards: environment steps between updates of the target network
    exploration_eps: float = fraction(0.04)  # share of random actions in the stage's own play
    # restart half of the training environments after this many of their steps; 0: never
    restart_every: int = count(0, at_least=0)
    rewards: bool = switch(False)  # learn from rewards, too, by SpikingDQN; otherwise from the teacher alone
    td_weight: float = amount(1.0)  # with rewards: weight of the temporal-difference loss
    # with rewards: weight of the distillation loss, which learns the ANN's Q-values
    distillation_weight: float = amount(1.0)
    average_updates: int = count(0, at_least=0)  # as ann.average-steps, but in gradient steps; 0: no average
    spike_weight: float = amount(0.0)  # weight of the spikes per neuron and frame in the loss; higher: less energy
    adam_eps: float = amount(1e-8)  # epsilon of the Adam optimizer
    max_grad_norm: float = positive(10.0)  # gradients are clipped to this norm


@dataclass(frozen=True)
class Recipe:
    """One agent: environment, network, hyperparameters, stages.

    ``ann_env_kwargs`` may let the ANN see a stack of frames (``frame_stack``) where the spiking agent sees one: the ANN
    then teaches, by distillation, what the membranes have to remember.

    Raises:
        ValueError: a schedule that does not decrease, a number out of range, or a value that JSON does not hold.
    """

    name: str
    env_id: str
    make_env: Callable[..., Any] = field(repr=False)  # returns a VecEnv; SB3's own type would import torch
    # arguments of the environment
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    # arguments of the environment in the ANN stage alone, in addition to env-kwargs or instead of them
    ann_env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    num_envs: int = count(8)  # copies of the environment to train in at the same time
    network: NetworkConfig = field(default_factory=NetworkConfig)
    ann: AnnConfig = field(default_factory=AnnConfig)
    snn: SnnConfig = field(default_factory=SnnConfig)
    schedule: tuple[int, ...] = (5, 4, 3, 2, 1)  # timesteps per frame (T) of each spiking stage, in decreasing order
    # environment steps of all spiking stages together, divided equally; None: each stage has snn.env-steps
    total_snn_steps: int | None = count(None)
    target_return: float | None = real(None)  # end a stage early at this mean return on validation; None: never
    validations_at_target: int = count(1)  # how many validations in a row must reach target-return
    validate_every: int = count(5_000)  # environment steps between validations
    validation_episodes: int = count(20)  # episodes per validation
    eval_episodes: int = count(20)  # episodes that a finished stage plays for the results
    # environment steps between checkpoints, in addition to those that are written every minute; None: only these
    checkpoint_every: int | None = count(None)
    # environment steps of the longest episode in validation and evaluation; a longer one stops the training
    max_episode_steps: int = count(MAX_EPISODE_STEPS)
    # CPU threads of torch; None: torch decides. Small networks are faster with 1.
    cpu_threads: int | None = count(None)

    def __post_init__(self) -> None:
        check_plain(self.as_dict())
        check_schedule(self.schedule)
        check_fields(self)
        sizes = [n for convolution in self.network.convolutions for n in convolution]
        if not sizes and not self.network.net_arch:
            raise ValueError("network must have a hidden layer, whose units spike: set network.net_arch")
        for size in (*sizes, *self.network.net_arch):
            if size < 1:
                raise ValueError(f"sizes in network.convolutions and network.net_arch must be >= 1, got {size}")
        for kwargs, prefix in ((self.env_kwargs, "env_kwargs"), (self.ann_env_kwargs, "ann_env_kwargs")):
            if SET_BY_RUN & kwargs.keys():
                raise ValueError(f"{prefix} must not hold num_envs or seed, which the run sets, got {kwargs}")
            frames = kwargs.get("frame_stack", 1)
            if not isinstance(frames, int) or frames < 1:
                raise ValueError(f"{prefix}.frame_stack must be >= 1, got {frames}")
        snn = self.snn
        if snn.rewards and not snn.td_weight and not snn.distillation_weight:
            raise ValueError("snn.td_weight and snn.distillation_weight must not both be 0: nothing would be learnt")
        _check_rates("snn", snn)
        if self.total_snn_steps is not None and self.total_snn_steps < len(self.schedule):
            raise ValueError(
                f"total_snn_steps must be >= {len(self.schedule)}, one for each stage, got {self.total_snn_steps}"
            )
        seen, stacked = (int(kwargs.get("frame_stack", 1)) for kwargs in (self.env_kwargs, self.ann_env_kwargs))
        if stacked > 1 and stacked % seen:
            raise ValueError(
                f"ann_env_kwargs.frame_stack must be a multiple of env_kwargs.frame_stack ({seen}), got {stacked}"
            )
        least = self._least_replay()
        for name, number in (
            ("ann.buffer_size", self.ann.buffer_size),
            ("snn.buffer_size", snn.buffer_size),
            ("snn.parent_steps", snn.parent_steps),
        ):
            if number < least[name]:
                raise ValueError(f"{name} must be >= {least[name]}, a window of each environment, got {number}")
        if max(self.num_envs, self.validation_episodes, self.eval_episodes) > SEEDS_PER_RUN:
            raise ValueError(f"num_envs and the numbers of episodes must be <= {SEEDS_PER_RUN}")
        if snn.restart_every and self.num_envs < 2:
            raise ValueError(f"num_envs must be >= 2, of which snn.restart_every restarts half, got {self.num_envs}")
        for config in (self.ann, self.snn):
            if config.train_every % self.num_envs:
                raise ValueError(
                    f"train_every must be a multiple of num_envs ({self.num_envs}), got {config.train_every}: "
                    "all environments step together"
                )

    def build_env(self, num_envs: int, seed: int, /, **overrides: Any) -> VecEnv:
        """A monitored ``VecEnv`` of the recipe's environment; ``overrides`` go before ``env_kwargs``.

        Observations and rewards are those of the environment itself. If ``make_env`` returns a ``VecNormalize``, it is
        taken off: a policy holds the statistics and normalises its observations itself.

        Images are channels first, as SB3 transposes them. What the environment raises later on becomes a ValueError of
        one line, with the original as its ``__cause__``.

        Raises:
            ValueError: an argument that the environment does not take, or not with this value; another number of
                environments; an environment that cannot be built.
        """
        from snn_rl.rl.environments import without_normalization  # here, where torch is needed anyway

        return without_normalization(self.build_training_env(num_envs, seed, **overrides))

    def build_training_env(self, num_envs: int, seed: int, /, **overrides: Any) -> VecEnv:
        """As `build_env`, inside the ``VecNormalize`` that ``make_env`` puts around it, if it does.

        Raises:
            ValueError: as `build_env`.
        """
        kwargs = {**self.env_kwargs, **overrides}
        shown = str(kwargs)[:200]
        if SET_BY_RUN & kwargs.keys():
            raise ValueError(f"env_kwargs must not hold num_envs or seed, which the caller sets, got {shown}")
        # here, where torch is needed anyway
        from stable_baselines3.common.vec_env import VecEnv

        from snn_rl.rl.environments import named, why

        try:
            env = self.make_env(num_envs, seed=seed, **kwargs)
        except ValueError:
            raise
        except TypeError as error:
            reason = one_line(error).removeprefix("TypeError: ")
            if not kwargs:
                raise ValueError(
                    f"make_env of {self.name} must take (num_envs, *, seed, render_mode=None): {reason}"
                ) from error
            raise ValueError(f"the environment of {self.name} does not take {shown}: {reason}") from error
        except Exception as error:
            given = f" with {shown}" if kwargs else ""
            raise ValueError(f"the environment of {self.name} cannot be built{given}: {why(error)}") from error
        if not isinstance(env, VecEnv) or env.num_envs != num_envs:
            if hasattr(env, "close"):
                env.close()
            got = f"{type(env).__name__} of {getattr(env, 'num_envs', 1)}"
            raise ValueError(f"make_env of {self.name} must return a VecEnv of {num_envs} environments, got a {got}")
        return named(env, f"the environment of {self.name}")

    def _least_replay(self) -> dict[str, int]:
        """The least that fields may be so that the replay holds a window of each environment."""
        seen, stacked = (int(kwargs.get("frame_stack", 1)) for kwargs in (self.env_kwargs, self.ann_env_kwargs))
        snn = self.snn
        window = snn.burn_in + snn.sequence_length + (snn.n_steps if snn.rewards and snn.td_weight else 0)
        distils = (snn.distillation_weight or not snn.rewards) and snn.distillation_updates
        needs_play = distils or (snn.keep_rates and len(self.schedule) > 1)
        return {
            "ann.buffer_size": (max(seen, stacked) + 1)
            * self.num_envs,  # an observation's frames, and one that follows
            "snn.buffer_size": (window + seen - 1) * self.num_envs,
            "snn.parent_steps": (window - 1) * self.num_envs if needs_play else 1,
        }

    def snn_steps(self, timesteps: int) -> int:
        """Environment steps of the stage at ``timesteps``, at most."""
        if self.total_snn_steps is not None:
            return self.total_snn_steps // len(self.schedule)
        return self._share(self.snn.env_steps, timesteps)

    def distillation_updates(self, timesteps: int) -> int:
        """Updates on the parent's play, before the stage at ``timesteps`` plays itself."""
        return self._share(self.snn.distillation_updates, timesteps)

    def _share(self, budget: int, timesteps: int) -> int:
        return -(-budget // timesteps) if self.snn.same_compute else budget

    def smoke(self) -> Recipe:
        """The same stages with budgets of seconds: every line runs, nothing is learnt."""
        replace = dataclasses.replace
        least = self._least_replay()
        ann = replace(
            self.ann,
            env_steps=SMOKE_STEPS,
            learning_starts=256,
            buffer_size=max(2_000, least["ann.buffer_size"]),
            exploration_steps=256,
        )
        snn = replace(
            self.snn,
            parent_steps=max(256, least["snn.parent_steps"]),
            distillation_updates=4,
            env_steps=256,
            buffer_size=max(2_000, least["snn.buffer_size"]),
            restart_every=min(self.snn.restart_every, 8),
        )
        return replace(
            self,
            ann=ann,
            snn=snn,
            total_snn_steps=None,
            validate_every=100_000,
            validation_episodes=2,
            eval_episodes=2,
            checkpoint_every=512,
        )

    @staticmethod
    def is_smoke(config: Mapping[str, Any]) -> bool:
        """Whether ``config``, as `as_dict` returns it, is that of a `smoke` recipe."""
        ann = config.get("ann")
        return isinstance(ann, Mapping) and ann.get("env_steps") == SMOKE_STEPS

    def as_dict(self) -> dict[str, Any]:
        """Every field that JSON can hold: all but the function that builds the environment."""
        config = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del config["make_env"]
        inner = {name: dataclasses.asdict(value) for name, value in config.items() if is_config(value)}
        return {**config, **inner}


# One set of numbers for every teacher and environment.
SPIKING = SnnConfig(
    percentile=99.0,
    leak=0.75,
    parent_steps=8_000,
    distillation_updates=2_000,
    env_steps=40_000,
    gradient_steps=2,
    batch_size=32,
    sequence_length=8,
)
FRESH = SnnConfig(
    parent_steps=16_000,
    parent_eps=0.0,
    distillation_updates=2_000,
    env_steps=16_000,
    gradient_steps=2,
    batch_size=256,
    sequence_length=1,
    burn_in=0,
)


@dataclass(frozen=True)
class SpikeRecipe(Recipe):
    """How a given agent is made to spike. ``network`` is the new one that it teaches where its own does not convert."""

    num_envs: int = count(8)
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(net_arch=(256, 256)))
    snn: SnnConfig = SPIKING
    fresh: SnnConfig = FRESH  # the stage of the new network
    schedule: tuple[int, ...] = (5, 3, 1)
    validate_every: int = count(10_000)
    eval_episodes: int = count(100)
    cpu_threads: int | None = count(1, optional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snn.rewards or self.fresh.rewards:
            raise ValueError("a given agent is made to spike without rewards; leave rewards at False")
        _check_rates("fresh", self.fresh)
        window = self.fresh.burn_in + self.fresh.sequence_length
        if min(self.fresh.parent_steps, self.fresh.buffer_size) < window * self.num_envs:
            raise ValueError(
                f"fresh.parent_steps and fresh.buffer_size must be >= {window * self.num_envs}, a window of each "
                f"environment, got {self.fresh.parent_steps} and {self.fresh.buffer_size}"
            )
        if self.fresh.train_every % self.num_envs:
            raise ValueError(
                f"fresh.train_every must be a multiple of num_envs ({self.num_envs}), got {self.fresh.train_every}"
            )

    def smoke(self) -> SpikeRecipe:
        fresh = dataclasses.replace(
            self.fresh, parent_steps=256, distillation_updates=4, env_steps=256, buffer_size=2_000
        )
        smoke = super().smoke()
        assert isinstance(smoke, SpikeRecipe)
        return dataclasses.replace(smoke, fresh=fresh)


def _check_rates(name: str, config: SnnConfig) -> None:
    """Raises ValueError where the learning rate of the stage's own play is above that of its parent's play."""
    if config.play_learning_rate > config.learning_rate:
        raise ValueError(
            f"{name}.play_learning_rate must be <= {name}.learning_rate ({config.learning_rate:g}), which falls to it, "
            f"got {config.play_learning_rate:g}"
        )


def is_config(value: object) -> TypeGuard[DataclassInstance]:
    """Whether ``value`` is a dataclass, and no class."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def check_schedule(schedule: Sequence[int]) -> None:
    """Raises ValueError where ``schedule`` is no decreasing sequence of timesteps, or begins with too many."""
    if not schedule or any(t < 1 for t in schedule) or any(b >= a for a, b in itertools.pairwise(schedule)):
        raise ValueError(f"schedule must be decreasing timesteps >= 1, such as 5 4 3 2 1, got {schedule}")
    if schedule[0] > MAX_TIMESTEPS:
        raise ValueError(f"timesteps in schedule must be <= {MAX_TIMESTEPS:,}, got {schedule[0]}")


def check_plain(value: Any, name: str = "") -> None:
    """Raises ValueError where ``value``, or one inside it, is not what JSON holds, such as a numpy integer."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_plain(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain(inner, name)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{name} must be a plain Python value, got {value!r} ({type(value).__name__}); convert it")
