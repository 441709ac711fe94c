"""The ANN stage of an agent: SB3's own DQN, or one that was trained elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.dqn.policies import DQNPolicy

from snn_rl.base.files import atomic
from snn_rl.rl import Actor, ConvExtractor, SequenceReplayBuffer, actor_of, teacher_of
from snn_rl.rl.dead_units import without_dead_units
from snn_rl.rl.environments import without_normalization
from snn_rl.rl.heads import QValues
from snn_rl.rl.network import layers_of
from snn_rl.rl.policy_file import check_storable, load_policy
from snn_rl.rl.replay import frame_stack_of
from snn_rl.rl.spaces import same_order
from snn_rl.rl.statistics import Statistics
from snn_rl.rl.teacher import Observations, statistics_of
from snn_rl.rl.zips import read_zip
from snn_rl.runs._run import History, Run, channels_last
from snn_rl.runs.agent_training import AgentTraining
from snn_rl.runs.recipe import AnnConfig, Recipe, SnnConfig
from snn_rl.runs.stages import Stage
from snn_rl.runs.task import Checkpoints, Measured

LOG = logging.getLogger(__name__)
ANN_FILES = "the zip of an SB3 DQN or the policy.safetensors of an ANN"


class Ann(AgentTraining):
    """Trained by DQN."""

    algorithm = DQN
    model: DQN

    def environment(self) -> VecEnv:
        return self.run.normalized_env(self.stage, self.run.recipe.num_envs, 0)

    def new(self, env: VecEnv) -> DQN:
        return new_ann(self.run, env)

    @property
    def budget(self) -> int:
        return self.run.recipe.ann.env_steps

    @property
    def average_updates(self) -> float:
        ann = self.run.recipe.ann
        return ann.average_steps / ann.train_every * ann.gradient_steps

    def done(self) -> str:
        return f"{self.model.num_timesteps} steps"

    def train(self, checkpoints: Checkpoints) -> None:
        self.learn(checkpoints)

    def export(self) -> Measured:
        if self.run.recipe.ann.drop_dead_units:
            whole, self.model = self.model, without_dead_units(self.model, self._own_play())
            before, after = (sum(p.numel() for p in m.q_net.parameters()) for m in (whole, self.model))
            LOG.info("%s without its dead units: %s of %s weights stay", self.stage.name, f"{after:,}", f"{before:,}")
        normalize = self.model.get_vec_normalize_env()
        if normalize is not None:
            with atomic(self.run.normalization) as temporary:
                normalize.save(str(temporary))
        return super().export()

    def _own_play(self) -> Iterator[Observations]:
        """Observations (n_envs, ...) of its epsilon-greedy play, such as fills the replay of the stage behind it.

        Those that it was trained in a ``VecNormalize`` for are normalised.
        """
        run, model = self.run, self.model
        statistics = statistics_of(model)
        config, n_envs = run.recipe.snn, run.recipe.num_envs
        exploration = np.random.default_rng(run.first_seed)
        env = run.student_env(self.stage)
        try:
            obs = env.reset()
            for _ in range(-(-config.parent_steps // n_envs)):
                assert isinstance(obs, np.ndarray | dict)
                obs = obs if statistics is None else statistics.normalize(obs)
                yield obs
                greedy, _ = model.predict(obs, deterministic=True)
                random = exploration.integers(int(model.action_space.n), size=n_envs)  # type: ignore[attr-defined]
                obs, *_ = env.step(np.where(exploration.random(n_envs) < config.parent_eps, random, greedy))
        finally:
            env.close()


class GivenAnn(Ann):
    """Trained elsewhere: it takes the ANN stage's place."""

    is_trained = False

    def __init__(self, run: Run, stage: Stage, model: DQN) -> None:
        super().__init__(run, stage)
        self.model = model

    def begin(self) -> None:
        self.history = History(extra_steps=self.model.num_timesteps, extra_updates=self.model._n_updates)


def new_ann(this: Run, env: VecEnv) -> DQN:
    """The ANN stage's algorithm: SB3's DQN."""
    config, network = this.recipe.ann, this.recipe.network
    policy_kwargs: dict[str, Any] = {
        "net_arch": list(network.net_arch),
        "optimizer_kwargs": adam(config),
    }
    if network.convolutions:
        policy_kwargs["features_extractor_class"] = ConvExtractor
        policy_kwargs["features_extractor_kwargs"] = extractor_kwargs(this.recipe)
    alias = "CnnPolicy" if network.convolutions else "MlpPolicy"
    model = DQN(
        "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else alias,
        env,
        learning_rate=LinearSchedule(config.learning_rate, config.final_learning_rate, 1.0),
        buffer_size=config.buffer_size,
        learning_starts=config.learning_starts,
        batch_size=config.batch_size,
        gamma=config.gamma,
        train_freq=config.train_every // this.recipe.num_envs,
        gradient_steps=config.gradient_steps,
        # SB3's own algorithm on a memory that keeps each frame once
        replay_buffer_class=SequenceReplayBuffer,
        replay_buffer_kwargs={"frame_stack": frame_stack_of(env), "n_steps": config.n_steps, "gamma": config.gamma},
        target_update_interval=config.target_update_every,
        exploration_fraction=min(1.0, config.exploration_steps / config.env_steps),
        exploration_final_eps=config.exploration_eps,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs=policy_kwargs,
        seed=this.first_seed,
        device=this.device,
    )
    return channels_last(model)


def extractor_kwargs(recipe: Recipe) -> dict[str, Any]:
    return {"features_dim": recipe.network.features_dim, "convolutions": recipe.network.convolutions}


def adam(config: AnnConfig | SnnConfig) -> dict[str, Any]:
    return {"eps": config.adam_eps, "fused": True}  # one pass over all parameters


def load_ann(this: Run, stage: Stage, path: Path) -> DQN:
    """The DQN in ``path``, checked against the environment of the ANN stage, ``stage``."""
    if not path.is_file():
        raise ValueError(f"no file at {path}; --ann takes {ANN_FILES}")
    env = this.normalized_env(stage, 1, 0)
    normalize = unwrap_vec_normalize(env)
    try:
        actor, statistics, (steps, updates) = _read_file(this, path, env)
        if statistics is None and normalize is not None and normalize.norm_obs:
            raise ValueError(
                f"{path} holds no statistics of observations, which make_env of {this.recipe.name} normalizes; give "
                "the policy.safetensors that save_policy writes of the agent and its VecNormalize"
            )
        env = without_normalization(env) if statistics is None else statistics.around(without_normalization(env))
        if not isinstance(actor.head, QValues):
            raise ValueError(
                f"{path} holds no DQN; --ann takes {ANN_FILES}. snn-rl spike takes agents of any algorithm"
            )
        kwargs = {
            "net_arch": list(actor.net_arch),
            "features_extractor_class": actor.features_extractor_class,
            "features_extractor_kwargs": actor.features_extractor_kwargs,
            "normalize_images": actor.normalize_images,
        }
        if actor.activation is not None:
            kwargs["activation_fn"] = actor.activation
        gamma, eps = this.recipe.ann.gamma, this.recipe.ann.exploration_eps
        model = DQN(DQNPolicy, env, gamma=gamma, buffer_size=1, policy_kwargs=kwargs, device=this.device)
        model.exploration_rate = eps  # as a training leaves it
        for q_net in (model.q_net, model.q_net_target):
            layers_of(q_net.features_extractor, q_net.q_net).load_state_dict(actor.network.state_dict())
        check_storable(model)
        model.num_timesteps, model._n_updates = steps, updates
    except ValueError as error:
        named = str(error).startswith(str(path))
        raise ValueError(str(error) if named else f"{path} cannot take the ANN stage's place: {error}") from error
    finally:
        env.close()
    return model


def _read_file(this: Run, path: Path, env: VecEnv) -> tuple[Actor, Statistics | None, tuple[int, int]]:
    """The actor, the statistics by which its observations are normalised, and the steps and updates of its training.

    These are 0 where the file does not tell them.
    """
    if path.suffix != ".safetensors":
        agent = read_zip(path, env.observation_space, env.action_space, device=this.device)
        return actor_of(agent.policy), None, (agent.num_timesteps, agent.n_updates)
    loaded = load_policy(path, this.device)
    recipe = loaded.metadata["provenance"].get("recipe")
    source = f"is of the recipe {recipe!r}, trained" if recipe else "was trained"
    for name in ("observation_space", "action_space"):
        ours, theirs = getattr(loaded, name), getattr(env, name)
        if ours != theirs or not same_order(ours, theirs):
            raise ValueError(f"{path} {source} with {name} {ours}, but {this.recipe.name} has {theirs}")
    teacher = teacher_of(loaded)
    if teacher.actor is None:
        raise ValueError(f"{path} holds a spiking agent; --ann takes an ANN: {ANN_FILES}")
    return teacher.actor, teacher.statistics, (0, 0)
