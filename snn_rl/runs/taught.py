"""Stages that a teacher teaches: its parent's play, distillation, and learning on the stage's own play."""

from __future__ import annotations

import logging
from typing import Any

from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from snn_rl.base.progress import bar
from snn_rl.rl import SpikingDQN, Student
from snn_rl.rl.recurrent import RecurrentLearner
from snn_rl.rl.statistics import read_vecnormalize
from snn_rl.rl.teacher import Teacher
from snn_rl.runs._run import MODEL
from snn_rl.runs.agent_training import AgentTraining
from snn_rl.runs.ann import adam
from snn_rl.runs.callbacks import CollectionCallback
from snn_rl.runs.recipe import SnnConfig, SpikeRecipe
from snn_rl.runs.task import Checkpoints

LOG = logging.getLogger(__name__)
DISTILLATION_PIECES = 20
LEAST_UNITS = 32  # of a hidden layer that is converted


def converts(teacher: Teacher) -> bool:
    """Whether a spiking stage starts from the teacher's own network; otherwise that teaches a new one first.

    It must convert, and have no layer so narrow that few spikes would have to say everything.
    """
    actor = teacher.actor
    return actor is not None and actor.converts and all(units >= LEAST_UNITS for units in actor.net_arch)


def student_options(config: SnnConfig, num_envs: int) -> dict[str, Any]:
    """The arguments of a `Student` that learns as ``config`` says in ``num_envs`` environments."""
    return {
        "learning_rate": LinearSchedule(config.play_learning_rate, config.play_learning_rate / 20, 1.0),
        "buffer_size": config.buffer_size,
        "batch_size": config.batch_size,
        "train_freq": max(1, config.train_every // num_envs),
        "gradient_steps": config.gradient_steps,
        "exploration_rate": config.exploration_eps,
        "max_grad_norm": config.max_grad_norm,
        "sequence_length": config.sequence_length,
        "burn_in": config.burn_in,
        "spike_weight": config.spike_weight,
    }


def convert(
    ann: Any,
    env: VecEnv,
    timesteps: int,
    config: SnnConfig,
    options: dict[str, Any],
    algorithm: type[RecurrentLearner] = Student,
) -> Any:
    """The first spiking stage's agent, of an ``ann``, as ``config`` says."""
    return algorithm.from_ann(  # type: ignore[attr-defined]
        ann,
        env,
        timesteps,
        percentile=config.percentile,
        leak=config.leak,
        leak_reset=config.leak_reset,
        persistent=config.persistent,
        policy_kwargs={"optimizer_kwargs": adam(config)},
        **options,
    )


class Taught(AgentTraining):
    """Distilled from the teacher, on its parent's play first and then on its own: an ordinary or a spiking network."""

    algorithm: type[RecurrentLearner] = Student
    model: RecurrentLearner
    parent: RecurrentLearner | Teacher | None = None  # whose play it learns from; None after a kill, until needed

    @property
    def config(self) -> SnnConfig:
        """The numbers of this stage."""
        return self.run.recipe.snn

    @property
    def updates(self) -> int:
        """Of distillation on the parent's play."""
        assert self.stage.timesteps is not None
        return self.run.recipe.distillation_updates(self.stage.timesteps)

    @property
    def budget(self) -> int:
        assert self.stage.timesteps is not None
        return self.run.recipe.snn_steps(self.stage.timesteps)

    @property
    def average_updates(self) -> float:
        return self.config.average_updates

    def done(self) -> str:
        steps, held = self.config.parent_steps, self.history.extra_steps
        if held < steps:
            return f"{held} of {steps} steps of its parent's play"
        return f"{self.model.distilled} updates of distillation and {self.model.num_timesteps} steps"

    def new(self, env: VecEnv) -> RecurrentLearner:
        config, timesteps = self.config, self.stage.timesteps
        teacher = self.run.teacher(env)
        self.parent = parent = self._parent(teacher)
        assert timesteps is not None
        if isinstance(parent, RecurrentLearner) and parent.timesteps is not None:
            model = self.algorithm.from_parent(parent, env, timesteps, **self._options())  # type: ignore[attr-defined]
        else:
            model = convert(self._source(parent), env, timesteps, config, self._options(), self.algorithm)
        model.teacher = teacher
        return model

    def _source(self, parent: RecurrentLearner | Teacher) -> Any:
        """What is converted."""
        return parent

    def _options(self) -> dict[str, Any]:
        run = self.run
        options = student_options(self.config, run.recipe.num_envs)
        return {**options, "seed": run.first_seed, "device": run.device}

    def resumed(self, env: VecEnv) -> None:
        self.model.teacher = self.run.teacher(env)

    def train(self, checkpoints: Checkpoints) -> None:
        self._collect(checkpoints)
        self._distil(checkpoints)
        self.learn(checkpoints)

    def _parent(self, teacher: Teacher) -> RecurrentLearner | Teacher:
        """Who plays what the stage first learns from, and explores as the recipe says."""
        name = self.stage.parent
        assert name is not None
        taught = self.run.is_taught(name)
        algorithm = self.algorithm if name != "ann" else Student
        parent = self.run.load(algorithm, self.run.directory / name / MODEL) if taught else teacher
        parent.exploration_rate = self.config.parent_eps
        return parent

    def _collect(self, checkpoints: Checkpoints) -> None:
        """What is left of the parent's play that fills a stage's replay."""
        run, stage, model, history, config = self.run, self.stage, self.model, self.history, self.config
        left = config.parent_steps - history.extra_steps
        if left <= 0:
            return
        parent = self.parent
        if parent is None:
            assert model.teacher is not None
            parent = self._parent(model.teacher)
        model.set_logger(configure(str(self.folder), []))
        done = config.parent_steps - left
        with bar(run.progress_bar, f"{stage.name}, play of {stage.parent}", config.parent_steps, "step", done) as tick:
            model.collect(parent, left, CollectionCallback(checkpoints, history, left, tick))
        if isinstance(parent, RecurrentLearner) and parent.timesteps is not None and config.keep_rates:
            model.keep_rates(parent)
        history.extra_steps = done + -(-left // run.recipe.num_envs) * run.recipe.num_envs
        model.num_timesteps = 0
        checkpoints.write()

    def _distil(self, checkpoints: Checkpoints) -> None:
        """The rest of a stage's distillation, in pieces. A checkpoint follows each of them."""
        name, model, average, updates = self.stage.name, self.model, self.average, self.updates
        schedule = LinearSchedule(self.config.learning_rate, self.config.play_learning_rate, 1.0)
        model.set_logger(configure(str(self.folder), []))
        if model.distilled >= updates:
            return
        with bar(self.run.progress_bar, f"{name}, distillation", updates, "update", model.distilled) as tick:

            def after_update() -> None:
                if average is not None:
                    average.update()
                tick(1)
                if checkpoints.are_due():
                    checkpoints.write(replay=False)  # the replay stands, and has not changed

            while (done := model.distilled) < updates:
                piece = min(-(-updates // DISTILLATION_PIECES), updates - done)

                def learning_rate(remaining: float, done: int = done, piece: int = piece) -> float:
                    return schedule(1 - (done + (1 - remaining) * piece) / updates)

                loss = model.distil(piece, learning_rate, after_update)
                LOG.info("%s after %d of %d updates of distillation: loss %.3f", name, model.distilled, updates, loss)
                checkpoints.write(replay=False)


class TaughtAnn(Taught):
    """A new network of ReLUs that learns from a teacher whose own does not convert."""

    @property
    def config(self) -> SnnConfig:
        assert isinstance(self.run.recipe, SpikeRecipe)
        return self.run.recipe.fresh

    @property
    def updates(self) -> int:
        return self.config.distillation_updates

    @property
    def budget(self) -> int:
        return self.config.env_steps

    def new(self, env: VecEnv) -> Student:
        teacher = self.run.teacher(env)
        self.parent = self._parent(teacher)
        kwargs = {"optimizer_kwargs": adam(self.config)}
        return Student.fresh(teacher, env, self.run.recipe.network.net_arch, policy_kwargs=kwargs, **self._options())


class Rewarded(Taught):
    """A spiking stage that goes on learning from rewards, by `SpikingDQN`."""

    algorithm = SpikingDQN

    def environment(self) -> VecEnv:
        """In the ``VecNormalize`` of the ANN, from whose Q-values it starts; the statistics no longer change."""
        env, saved = super().environment(), self.run.normalization
        if not saved.is_file():
            return env
        read_vecnormalize(saved, env.observation_space)  # says in one line where it is damaged
        normalize = VecNormalize.load(str(saved), env)
        normalize.training = False
        return normalize

    @property
    def updates(self) -> int:
        return super().updates if self.config.distillation_weight else 0

    def _source(self, parent: RecurrentLearner | Teacher) -> Any:
        return self.run.ann()

    def _options(self) -> dict[str, Any]:
        config, options = self.config, super()._options()
        del options["exploration_rate"]
        return {
            **options,
            "learning_starts": 0,
            "n_steps": config.n_steps,
            "gamma": self.run.recipe.ann.gamma,
            "target_update_interval": config.target_update_every,
            "exploration_initial_eps": config.exploration_eps,
            "exploration_final_eps": config.exploration_eps,
            "td_weight": config.td_weight,
            "distillation_weight": config.distillation_weight,
        }
