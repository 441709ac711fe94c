"""An agent's run: its environments and seeds, and the checkpoints of its stages.

A checkpoint is model, replay, averaged weights and history.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import VecEnv

from snn_rl.base.files import atomic, read_json, write_json
from snn_rl.base.progress import one_line
from snn_rl.rl import SpikingDQN
from snn_rl.rl.restarts import RestartingVecEnv
from snn_rl.rl.teacher import StackedTeacher
from snn_rl.runs.averaging import WeightAverage
from snn_rl.runs.recipe import SEEDS_PER_RUN, Recipe
from snn_rl.runs.stages import BEST, Stage

AVERAGE = "checkpoint.average.safetensors"
CHECKPOINT_SECONDS = 60.0  # of training that a kill costs at most
WRITING_SHARE = 0.05  # of the time, at most: where writing takes long, checkpoints are further apart


@dataclass(frozen=True)
class Run:
    """One training of a recipe: where, with which seed, on which device."""

    recipe: Recipe
    directory: Path
    seed: int
    device: str
    progress_bar: bool = False

    def env(self, stage: Stage, num_envs: int, seeds_from: int) -> VecEnv:
        return self.recipe.build_env(num_envs, seeds_from + self.first_seed, **self.env_kwargs(stage))

    def training_env(self, stage: Stage) -> VecEnv:
        """Of a stage's training: all of its environments."""
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

    def teacher(self, ann: DQN, env: VecEnv) -> DQN | StackedTeacher:
        """The ANN as it can act in a spiking stage's environment."""
        return ann if ann.observation_space == env.observation_space else StackedTeacher(ann, env.observation_space)


@dataclass
class History:
    """What a stage has seen, kept beside its checkpoint."""

    curve: dict[str, list[float]] = field(default_factory=lambda: {"env_steps": [], "returns": []})
    validation: list[list[float]] = field(default_factory=list)  # [environment steps, mean return]
    wall_seconds: float = 0.0
    extra_steps: int = 0  # environment steps of the parent's play that the replay holds
    extra_updates: int = 0

    def note(self, steps: int, mean: float) -> None:
        """A validation; of two at one step, before and after a kill, the better one, which is the one that is kept."""
        noted: dict[float, float] = {at: kept for at, kept in self.validation}  # noqa: C416  mypy knows no pairs in lists
        noted[steps] = max(mean, noted.get(steps, -np.inf))
        self.validation = [[at, noted[at]] for at in sorted(noted)]


def algorithm_of(stage: Stage) -> type[DQN]:
    return DQN if stage.timesteps is None else SpikingDQN


def load_model(this: Run, algorithm: type[DQN], path: Path, env: VecEnv | None = None) -> DQN:
    """A model of this run. Raises ValueError, with what to remove to have it trained again, for a damaged one."""
    remove = path.parent if path.name == "model.zip" else path  # a finished stage's, which is finished without it
    try:
        return channels_last(algorithm.load(path, env=env, device=this.device))
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, AssertionError) as error:
        raise ValueError(
            f"{path} is not a readable {algorithm.__name__} ({one_line(error)}); remove {remove}"
        ) from error


def channels_last(model: DQN) -> DQN:
    """The memory format in which convolutions are fastest; a spiking network has it from its conversion."""
    model.policy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def averaged(this: Run, stage: Stage, model: DQN) -> WeightAverage | None:
    """The moving average of a stage's weights, begun or as the checkpoint has it; None where the recipe wants none."""
    ann, snn = this.recipe.ann, this.recipe.snn
    if stage.timesteps is None:
        updates = ann.average_steps / ann.train_every * ann.gradient_steps
    else:
        updates = snn.average_updates
    if not updates:
        return None
    average = WeightAverage(model.q_net, updates)
    folder = this.directory / stage.name
    if (folder / "checkpoint.zip").is_file():
        average.load(folder / AVERAGE)
    return average


class Checkpoints:
    """A stage's checkpoints, with its history and its average: when one is due, and how it is written."""

    def __init__(self, folder: Path, history: History, average: WeightAverage | None) -> None:
        self.folder, self.history, self.average = folder, history, average
        self._written = monotonic()
        self._started = self._written - history.wall_seconds
        self._cost = 0.0  # seconds that writing the last one took

    def are_due(self) -> bool:
        """Whether a minute has passed since the last one, or longer, so that writing takes a twentieth at most."""
        return monotonic() - self._written >= max(CHECKPOINT_SECONDS, self._cost / WRITING_SHARE)

    def tell_time(self) -> None:
        """Note in the history how long the stage has taken."""
        self.history.wall_seconds = monotonic() - self._started

    def write(self, model: DQN, *, replay: bool = True) -> None:
        """Write one; without ``replay`` where that stands already and has not changed."""
        began = monotonic()
        self.tell_time()
        save_checkpoint(self.folder, model, self.history, self.average, replay=replay)
        self._written = monotonic()
        self._cost = self._written - began


def save_checkpoint(
    folder: Path, model: DQN, history: History, average: WeightAverage | None = None, *, replay: bool = True
) -> None:
    """Replay and history first, model last: a checkpoint counts where its model stands."""
    if replay:
        with atomic(folder / "checkpoint.replay.pkl") as temporary:
            model.save_replay_buffer(temporary)
    write_json(folder / "checkpoint.json", vars(history))
    if average is not None:
        average.save(folder / AVERAGE)
    with atomic(folder / "checkpoint.zip") as temporary:
        model.save(temporary)


def resume(this: Run, stage: Stage) -> tuple[DQN, History] | None:
    """A stage's last checkpoint, or None where it has none."""
    folder = this.directory / stage.name
    if not (folder / "checkpoint.zip").is_file():
        return None
    env = this.training_env(stage)
    model = load_model(this, algorithm_of(stage), folder / "checkpoint.zip", env)
    try:
        with (folder / "checkpoint.replay.pkl").open("rb") as file:  # SB3 leaves it open where it is damaged
            model.load_replay_buffer(file)
        history = History(**read_json(folder / "checkpoint.json"))
    except Exception as error:  # unpickling a damaged file may raise anything
        raise ValueError(
            f"the replay or the history beside {folder / 'checkpoint.zip'} is not readable ({one_line(error)}); "
            "remove that file to begin the stage again"
        ) from error
    if isinstance(model, SpikingDQN):
        model.teacher = this.teacher(load_model(this, DQN, this.directory / "ann" / "model.zip"), env)
    # The history may be one checkpoint ahead of the model, where a kill fell between the two.
    steps = model.num_timesteps
    kept = [n for n, at in enumerate(history.curve["env_steps"]) if at <= steps]
    history.curve = {key: [values[n] for n in kept] for key, values in history.curve.items()}
    history.validation = [[at, mean] for at, mean in history.validation if at <= steps]
    if (folder / BEST).is_file():  # perhaps of a validation that was made since, and is as true
        history.note(*load_model(this, algorithm_of(stage), folder / BEST).validated)  # type: ignore[attr-defined]
    # Not the same episodes, exploration and replayed windows once more, which the stage began with.
    draw = np.random.default_rng([this.seed, steps, getattr(model, "distilled", 0)])
    model.set_random_seed(int(draw.integers(2**31)))
    env.seed(this.first_seed + int(draw.integers(SEEDS_PER_RUN - this.recipe.num_envs + 1)))
    return model, history
