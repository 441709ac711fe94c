"""The spiking stages of an agent: their parent's play, distillation, and learning on their own play."""

from __future__ import annotations

import logging
from typing import Any

from stable_baselines3 import DQN
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from snn_rl.base.progress import bar
from snn_rl.rl import SpikingDQN
from snn_rl.rl.teacher import StackedTeacher
from snn_rl.runs._run import MODEL
from snn_rl.runs.agent_training import AgentTraining
from snn_rl.runs.ann import adam
from snn_rl.runs.callbacks import CollectionCallback
from snn_rl.runs.task import Checkpoints

LOG = logging.getLogger(__name__)
DISTILLATION_PIECES = 20


class Spiking(AgentTraining):
    """Distilled from the ANN, on its parent's play first and then on its own."""

    algorithm = SpikingDQN
    model: SpikingDQN
    parent: DQN | StackedTeacher | None = None  # whose play fills the replay; None after a kill, until it is needed

    @property
    def timesteps(self) -> int:
        assert self.stage.timesteps is not None
        return self.stage.timesteps

    @property
    def budget(self) -> int:
        return self.run.recipe.snn_steps(self.timesteps)

    @property
    def average_updates(self) -> float:
        return self.run.recipe.snn.average_updates

    def done(self) -> str:
        steps, held = self.run.recipe.snn.parent_steps, self.history.extra_steps
        if held < steps:
            return f"{held} of {steps} steps of its parent's play"
        return f"{self.model.distilled} updates of distillation and {self.model.num_timesteps} steps"

    def new(self, env: VecEnv) -> SpikingDQN:
        run, config = self.run, self.run.recipe.snn
        ann = self._ann()
        kwargs: dict[str, Any] = {
            "learning_rate": LinearSchedule(config.play_learning_rate, config.play_learning_rate / 20, 1.0),
            "buffer_size": config.buffer_size,
            "learning_starts": 0,
            "batch_size": config.batch_size,
            "train_freq": config.train_every // run.recipe.num_envs,
            "gradient_steps": config.gradient_steps,
            "n_steps": config.n_steps,
            "gamma": run.recipe.ann.gamma,
            "target_update_interval": config.target_update_every,
            "exploration_initial_eps": config.exploration_eps,
            "exploration_final_eps": config.exploration_eps,
            "max_grad_norm": config.max_grad_norm,
            "sequence_length": config.sequence_length,
            "burn_in": config.burn_in,
            "td_weight": config.td_weight,
            "distillation_weight": config.distillation_weight,
            "distillation_temperature": config.distillation_temperature,
            "spike_weight": config.spike_weight,
            "seed": run.first_seed,
            "device": run.device,
        }
        teacher = run.teacher(ann, env)
        self.parent = parent = self._parent(teacher)
        if isinstance(parent, SpikingDQN):
            model = SpikingDQN.from_parent(parent, env, self.timesteps, **kwargs)
        else:
            model = SpikingDQN.from_ann(
                ann,
                env,
                self.timesteps,
                percentile=config.percentile,
                leak=config.leak,
                leak_reset=config.leak_reset,
                persistent=config.persistent,
                policy_kwargs={"optimizer_kwargs": adam(config)},
                **kwargs,
            )
        model.teacher = teacher
        return model

    def resumed(self, env: VecEnv) -> None:
        self.model.teacher = self.run.teacher(self._ann(), env)

    def train(self, checkpoints: Checkpoints) -> None:
        self._collect(checkpoints)
        self._distill(checkpoints)
        self.learn(checkpoints)

    def _ann(self) -> DQN:
        return self.run.load(DQN, self.run.directory / "ann" / MODEL)

    def _parent(self, teacher: DQN | StackedTeacher) -> DQN | StackedTeacher:
        """Who plays what a spiking stage first learns from, and explores as the recipe says: its parent."""
        assert self.stage.parent is not None
        parent = teacher
        if self.stage.parent != "ann":
            parent = self.run.load(SpikingDQN, self.run.directory / self.stage.parent / MODEL)
        acting = parent.dqn if isinstance(parent, StackedTeacher) else parent
        acting.exploration_rate = self.run.recipe.snn.parent_eps
        return parent

    def _collect(self, checkpoints: Checkpoints) -> None:
        """What is left of the parent's play that fills a stage's replay."""
        run, stage, model, history = self.run, self.stage, self.model, self.history
        config = run.recipe.snn
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
        if isinstance(parent, SpikingDQN) and config.keep_rates:
            model.keep_rates(parent)
        history.extra_steps = done + -(-left // run.recipe.num_envs) * run.recipe.num_envs
        model.num_timesteps = 0
        checkpoints.write()

    def _distill(self, checkpoints: Checkpoints) -> None:
        """What is left of a stage's distillation, in pieces, each of which a kill leaves standing."""
        recipe, name, model, average = self.run.recipe, self.stage.name, self.model, self.average
        config = recipe.snn
        updates = recipe.distillation_updates(self.timesteps) if config.distillation_weight else 0
        schedule = LinearSchedule(config.learning_rate, config.play_learning_rate, 1.0)
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
