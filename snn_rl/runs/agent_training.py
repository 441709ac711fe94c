"""A stage of an agent, whatever its kind: its model, its checkpoints, learning on its own play, and its export.

A checkpoint is model, replay, averaged weights and history. One is written after a minute of collecting, distilling or
training (later where writing takes more than a twentieth of the time), every ``checkpoint_every`` environment steps
and twenty times while a stage distils.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from snn_rl.base.files import atomic, read_json, write_json
from snn_rl.base.progress import bar, one_line
from snn_rl.rl.evaluation import spiking_network
from snn_rl.rl.policy_file import load_policy, save_policy
from snn_rl.rl.recurrent import RecurrentLearner
from snn_rl.rl.statistics import copy_statistics
from snn_rl.runs._run import BEST, CHECKPOINT, MODEL, History, Run, save_model
from snn_rl.runs.averaging import WeightAverage
from snn_rl.runs.callbacks import StageCallback
from snn_rl.runs.recipe import SEEDS_PER_RUN, TEST_SEEDS
from snn_rl.runs.stages import Stage
from snn_rl.runs.task import Checkpoints, Measured, Training

AVERAGE = "checkpoint.average.safetensors"
PROTOCOL = "greedy, one episode per seed, seeds unseen in training and selection"


class AgentTraining(Training):
    """A stage that trains an SB3 ``algorithm``."""

    algorithm: type[OffPolicyAlgorithm]
    model: OffPolicyAlgorithm
    history: History
    average: WeightAverage | None = None  # the moving average of the weights, where the recipe wants one

    def __init__(self, run: Run, stage: Stage) -> None:
        super().__init__(stage, run.folder(stage), History())
        self.run = run

    @abstractmethod
    def new(self, env: VecEnv) -> OffPolicyAlgorithm:
        """The algorithm before its first step in ``env``."""

    def environment(self) -> VecEnv:
        """What it trains in."""
        return self.run.training_env(self.stage)

    def resumed(self, env: VecEnv) -> None:
        """What a checkpoint does not hold, in the environment in which the stage goes on."""

    @abstractmethod
    def done(self) -> str:
        """How far the stage has come, in words."""

    @property
    @abstractmethod
    def budget(self) -> int:
        """Environment steps of the stage's own play, at most."""

    @property
    @abstractmethod
    def average_updates(self) -> float:
        """The time constant of the average in updates; 0: no average."""

    def begin(self) -> None:
        self.model = self.new(self.environment())
        self.average = self._average()

    def resume(self) -> str | None:
        folder, run = self.folder, self.run
        if not (folder / CHECKPOINT).is_file():
            return None
        env = self.environment()
        self.model = model = run.load(self.algorithm, folder / CHECKPOINT, env)
        self._restore_statistics(env)
        try:
            with (folder / "checkpoint.replay.pkl").open("rb") as file:  # SB3 leaves it open where it is damaged
                model.load_replay_buffer(file)
            self.history = history = History(**read_json(folder / "checkpoint.json"))
        except Exception as error:  # unpickling a damaged file may raise anything
            raise ValueError(
                f"the replay or the history beside {folder / CHECKPOINT} is not readable ({one_line(error)}); "
                "remove that file to begin the stage again"
            ) from error
        self.resumed(env)
        # The history may be one checkpoint ahead of the model, where a kill fell between the two.
        steps = model.num_timesteps
        kept = [n for n, at in enumerate(history.curve["env_steps"]) if at <= steps]
        history.curve = {key: [values[n] for n in kept] for key, values in history.curve.items()}
        history.validation = [[at, mean] for at, mean in history.validation if at <= steps]
        if (folder / BEST).is_file():  # perhaps of a validation that was made since, and is as true
            history.note(*run.load(self.algorithm, folder / BEST).validated)
        # Not the same episodes, exploration and replayed windows once more, which the stage began with.
        draw = np.random.default_rng([run.seed, steps, getattr(model, "distilled", 0)])
        model.set_random_seed(int(draw.integers(2**31)))
        env.seed(run.first_seed + int(draw.integers(SEEDS_PER_RUN - run.recipe.num_envs + 1)))
        self.average = self._average()
        if self.average is not None:
            self.average.load(folder / AVERAGE)
        return self.done()

    def _restore_statistics(self, env: VecEnv) -> None:
        """Give the ``VecNormalize`` of ``env`` the statistics that the model was saved with, and the model that."""
        normalize = unwrap_vec_normalize(env)
        if normalize is not None:
            assert self.model._vec_normalize_env is not None  # by `save_model`
            copy_statistics(self.model._vec_normalize_env, normalize)
        self.model._vec_normalize_env = normalize

    def _average(self) -> WeightAverage | None:
        model: Any = self.model
        net: Any = model.net if isinstance(model, RecurrentLearner) else model.q_net
        return WeightAverage(net, self.average_updates) if self.average_updates else None

    def save(self, *, replay: bool = True) -> None:
        """Write a checkpoint; without ``replay`` where that stands already and has not changed."""
        save_checkpoint(self.folder, self.model, self.history, self.average, replay=replay)

    def learn(self, checkpoints: Checkpoints) -> None:
        """What is left of the stage's learning on its own play."""
        model, budget = self.model, self.budget
        callback = StageCallback(self.run, self.stage, budget, checkpoints, self.history, self.average)
        if model.num_timesteps >= budget or callback.reached_target(model.num_timesteps):
            return
        model.set_logger(configure(str(self.folder), ["tensorboard"]))
        with bar(self.run.progress_bar, self.stage.name, budget, "step", model.num_timesteps) as callback.tick:
            model.learn(
                budget - model.num_timesteps,
                callback=callback,
                reset_num_timesteps=model.num_timesteps == 0,
                log_interval=1,
            )
            callback.finish()

    def choose(self) -> None:
        self.history.extra_steps += self.model.num_timesteps
        self.history.extra_updates += self.model._n_updates
        env = self.model.get_env()
        assert env is not None
        env.close()  # its processes, too
        if (self.folder / BEST).is_file():
            self.model = self.run.load(self.algorithm, self.folder / BEST)
            self._restore_statistics(env)

    def export(self) -> Measured:
        """Write the model and its policy, and play the test seeds."""
        run, recipe, model = self.run, self.run.recipe, self.model
        with atomic(self.folder / MODEL) as temporary:
            model.save(temporary)
        provenance = {
            "recipe": recipe.name,
            "env_id": recipe.env_id,
            "env_kwargs": run.env_kwargs(self.stage),
            "seed": run.seed,
            "stage": self.stage.name,
        }
        save_policy(model, self.folder / "policy.safetensors", provenance)
        env = run.env(self.stage, recipe.eval_episodes, TEST_SEEDS)
        # What is shared is what is measured: the policy as it comes back from its file.
        shared = load_policy(self.folder / "policy.safetensors", run.device)
        evaluation = run.evaluate(shared, env, recipe.eval_episodes)
        env.close()
        return Measured(
            {"env_steps": self.history.extra_steps, "updates": self.history.extra_updates},
            {"eval": evaluation.as_dict(PROTOCOL)},
            evaluation.activity,
            spiking_network(model),
        )


def save_checkpoint(
    folder: Path,
    model: OffPolicyAlgorithm,
    history: History,
    average: WeightAverage | None = None,
    *,
    replay: bool = True,
) -> None:
    """Replay and history first, model last: a checkpoint counts where its model stands."""
    if replay:
        with atomic(folder / "checkpoint.replay.pkl") as temporary:
            model.save_replay_buffer(temporary)
    write_json(folder / "checkpoint.json", vars(history))
    if average is not None:
        average.save(folder / AVERAGE)
    save_model(model, folder / CHECKPOINT)
