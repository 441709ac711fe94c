"""What happens while a stage of an agent plays: validation, early stop, checkpoints and the reward curve."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from snn_rl.base.progress import digits
from snn_rl.rl.statistics import frozen
from snn_rl.runs._run import BEST, History, Run, save_model
from snn_rl.runs.averaging import WeightAverage
from snn_rl.runs.recipe import SEEDS_PER_RUN, VALIDATION_SEEDS
from snn_rl.runs.stages import Stage
from snn_rl.runs.task import Checkpoints

LOG = logging.getLogger(__name__)
CURVE_POINTS = 400


class CollectionCallback(BaseCallback):
    """Checkpoints while a stage collects ``steps`` of its parent's play."""

    def __init__(self, checkpoints: Checkpoints, history: History, steps: int, tick: Callable[[int], object]) -> None:
        super().__init__()
        self.checkpoints, self.history, self.steps, self.tick = checkpoints, history, steps, tick
        self.before = history.extra_steps

    def _on_step(self) -> bool:
        n_envs = self.training_env.num_envs
        taken = self.n_calls * n_envs
        self.tick(n_envs)
        # Not at the last step: a checkpoint of all of it has the thresholds that follow from it.
        if taken < self.steps and self.checkpoints.are_due():
            self.history.extra_steps = self.before + taken - n_envs  # this step is not in the replay yet
            self.checkpoints.write()
        return True


class StageCallback(BaseCallback):
    """Validation, early stop, checkpoints and the reward curve of one stage."""

    def __init__(
        self,
        run: Run,
        stage: Stage,
        budget: int,
        checkpoints: Checkpoints,
        history: History,
        average: WeightAverage | None,
    ) -> None:
        super().__init__()
        self.run, self.stage, self.budget, self.folder = run, stage, budget, run.folder(stage)
        self.checkpoints, self.history, self.average = checkpoints, history, average
        self.env: VecEnv | None = None
        self.tick: Callable[[int], object] = lambda _: None

    def reached_target(self, steps: int) -> bool:
        target, needed = self.run.recipe.target_return, self.run.recipe.validations_at_target
        last = [validation for validation in self.history.validation if validation[0] <= steps][-needed:]
        return target is not None and len(last) == needed and all(mean >= target for _, mean in last)

    def _on_training_start(self) -> None:
        recipe = self.run.recipe
        self.next_validation = self._next(recipe.validate_every)
        self.next_checkpoint = self._next(recipe.checkpoint_every)
        self.curve_every = max(1, self.budget // CURVE_POINTS)
        self.next_point = self._next(self.curve_every)
        self.averaged_updates = self.model._n_updates

    def _next(self, every: int | None) -> float:
        return math.inf if every is None else (self.num_timesteps // every + 1) * every

    def _on_step(self) -> bool:
        self.tick(self.training_env.num_envs)
        if self.num_timesteps >= self.next_point:
            self.next_point = self._next(self.curve_every)
            if self.model.ep_info_buffer:
                self.history.curve["env_steps"].append(self.num_timesteps)
                self.history.curve["returns"].append(float(np.mean([info["r"] for info in self.model.ep_info_buffer])))
            # SB3 itself writes where an episode ends: in Pong that is once in thousands of steps
            self.logger.dump(self.num_timesteps)
        if self.num_timesteps >= self.next_validation:
            self.next_validation = self._next(self.run.recipe.validate_every)
            self._validate()
            if self.reached_target(self.num_timesteps):
                return False
        return True

    def _on_rollout_start(self) -> None:
        # Of SB3's own DQN, which looks at no loss; before anything of it is kept. A spiking stage has looked itself.
        loss = self.model.logger.name_to_value.get("train/loss", 0.0)
        if not np.isfinite(loss):
            raise ValueError(
                f"the loss of {self.stage.name} is {loss} after {self.model._n_updates} updates; train with a lower "
                f"learning rate in another --run-dir. {self.folder} keeps its last checkpoint"
            )
        if self.average is not None:
            made = self.model._n_updates - self.averaged_updates
            self.averaged_updates += made
            if made:
                self.average.update(made)
        # Between a rollout and the next, where the replay holds every step that was taken.
        if self.num_timesteps >= self.next_checkpoint or self.checkpoints.are_due():
            self.next_checkpoint = self._next(self.run.recipe.checkpoint_every)
            self._checkpoint()

    def finish(self) -> None:
        """At the end of the budget: a last validation, unless one was just made."""
        if not self.history.validation or self.history.validation[-1][0] != self.num_timesteps:
            self._validate()
        if self.checkpoints.are_due():  # what is left of the stage may take long
            self._checkpoint()
        self.checkpoints.tell_time()
        if self.env is not None:
            self.env.close()

    def _validate(self) -> None:
        recipe = self.run.recipe
        if self.env is None:
            self.env = self.run.env(self.stage, recipe.validation_episodes, VALIDATION_SEEDS)
        self.env.seed(VALIDATION_SEEDS + self.run.seed * SEEDS_PER_RUN)  # the same episodes at every validation
        with nullcontext() if self.average is None else self.average.in_place():
            normalize = self.model.get_vec_normalize_env()
            env = self.env if normalize is None else frozen(normalize, self.env)
            mean = self.run.evaluate(self.model, env, recipe.validation_episodes).mean
            best = self.history.best
            self.history.note(self.num_timesteps, mean)
            LOG.info("%s after %d steps: %s on validation", self.stage.name, self.num_timesteps, digits(mean))
            self.logger.record("validation/mean_reward", mean)
            self.logger.dump(self.num_timesteps)
            if mean >= best:
                self.model.validated = [self.num_timesteps, mean]  # type: ignore[attr-defined]  # saved with the model
                save_model(self.model, self.folder / BEST)  # type: ignore[arg-type]

    def _checkpoint(self) -> None:
        self.checkpoints.write()
