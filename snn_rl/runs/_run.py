"""An agent's run: its environments, its seeds and its models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from snn_rl.base.files import atomic
from snn_rl.base.progress import one_line
from snn_rl.rl.environments import without_normalization
from snn_rl.rl.evaluation import Agent, Evaluation, evaluate
from snn_rl.rl.heads import QValues
from snn_rl.rl.preferences import as_preferences
from snn_rl.rl.restarts import RestartingVecEnv
from snn_rl.rl.statistics import read_vecnormalize
from snn_rl.rl.teacher import Teacher, teacher_of
from snn_rl.runs import task
from snn_rl.runs.given import Given
from snn_rl.runs.recipe import SEEDS_PER_RUN, Recipe
from snn_rl.runs.stages import Stage

MODEL = "model.zip"
BEST = "best.zip"  # the best checkpoint on validation episodes so far
CHECKPOINT = "checkpoint.zip"
NORMALIZATION = "vecnormalize.pkl"


@dataclass(frozen=True)
class Run(task.Run):
    """One training of a recipe: where, with which seed, on which device."""

    recipe: Recipe
    given: Given | None = None  # the teacher, where it was trained elsewhere

    memory_fields = "buffer_size, batch_size or num_envs"

    def env(self, stage: Stage, num_envs: int, seeds_from: int) -> VecEnv:
        return without_normalization(self.normalized_env(stage, num_envs, seeds_from))

    def normalized_env(self, stage: Stage, num_envs: int, seeds_from: int) -> VecEnv:
        """As `env`, inside the recipe's ``VecNormalize``, where it has one."""
        return self.recipe.build_training_env(num_envs, seeds_from + self.first_seed, **self.env_kwargs(stage))

    def training_env(self, stage: Stage) -> VecEnv:
        """Of a stage's training: all of its environments, without a ``VecNormalize``."""
        return self.env(stage, self.recipe.num_envs, 0) if stage.timesteps is None else self.student_env(stage)

    def student_env(self, stage: Stage) -> VecEnv:
        """What spiking stages are trained in, half of it starting anew every so often, as ``stage`` sees it."""
        n_envs, every = self.recipe.num_envs, self.recipe.snn.restart_every
        if not every:
            return self.env(stage, n_envs, 0)
        half = n_envs // 2
        return RestartingVecEnv(self.env(stage, n_envs - half, 0), self.env(stage, half, n_envs - half), every)

    @property
    def first_seed(self) -> int:
        """Of this run's range of seeds: the training environments' and the generators'."""
        return self.seed * SEEDS_PER_RUN

    def env_kwargs(self, stage: Stage) -> dict[str, Any]:
        ann = self.recipe.ann_env_kwargs if stage.timesteps is None else {}
        return {**self.recipe.env_kwargs, **ann}

    def ann(self) -> DQN:
        """What the ANN stage has trained."""
        ann = self.load(DQN, self.directory / "ann" / MODEL)
        assert isinstance(ann, DQN)
        if self.normalization.is_file():
            ann.statistics = read_vecnormalize(self.normalization, ann.observation_space)  # type: ignore[attr-defined]
        return ann

    @property
    def normalization(self) -> Path:
        """What the ``VecNormalize`` of the ANN's training has saved, where it had one."""
        return self.directory / "ann" / NORMALIZATION

    def teacher(self, env: VecEnv) -> Teacher:
        """Who labels what is played in ``env``, a stage's environment: the ANN, or the agent that was given."""
        if self.given is not None:
            teacher = self.given.load(env, self.device)
            if not isinstance(teacher.head, QValues):
                return teacher
            played_in = self.recipe.build_env(self.recipe.num_envs, self.first_seed)  # the same play at every stage
            try:
                return as_preferences(teacher, played_in)
            finally:
                played_in.close()
        return teacher_of(self.ann(), env.observation_space)

    def is_taught(self, stage: str) -> bool:
        """Whether the stage of this name is a learner of ours, and not the teacher itself."""
        return stage != ("ann" if self.given is None else "teacher")

    def evaluate(self, agent: Agent, env: VecEnv, episodes: int) -> Evaluation:
        limit = self.recipe.max_episode_steps
        return evaluate(agent, env, episodes, max_episode_steps=limit, progress_bar=self.progress_bar)

    def load(self, algorithm: type[OffPolicyAlgorithm], path: Path, env: VecEnv | None = None) -> Any:
        """A model of this run. Raises ValueError, with what to remove to have it trained again, for a damaged one."""
        remove = path.parent if path.name == MODEL else path  # a finished stage's, which is finished without it
        try:
            return channels_last(algorithm.load(path, env=env, device=self.device))
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, AssertionError) as error:
            raise ValueError(
                f"{path} is not a readable {algorithm.__name__} ({one_line(error)}); remove {remove}"
            ) from error


Learner = TypeVar("Learner", bound=OffPolicyAlgorithm)


@dataclass
class History(task.History):
    """What a stage has seen, kept beside its checkpoint."""

    curve: dict[str, list[float]] = field(default_factory=lambda: {"env_steps": [], "returns": []})
    extra_steps: int = 0  # environment steps of the parent's play that the replay holds
    extra_updates: int = 0


def save_model(model: OffPolicyAlgorithm, path: Path) -> None:
    """Write a model that a run goes on from, with the present statistics of its ``VecNormalize``.

    They are in the same file as the weights that they belong to, so that a kill cannot part them. A finished stage's
    model is without them, as SB3 saves it.
    """
    with atomic(path) as temporary:
        model.save(temporary, include=["_vec_normalize_env"])


def channels_last(model: Learner) -> Learner:
    """The memory format in which convolutions are fastest; a spiking network has it from its conversion."""
    model.policy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
