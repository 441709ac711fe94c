"""The training of an agent: ANN-DQN, conversion, temporal pruning. How stages make a run: `snn_rl.runs.life`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from snn_rl.rl import ConvExtractor
from snn_rl.rl.environments import without_normalization
from snn_rl.rl.evaluation import is_monitored
from snn_rl.rl.policy_file import check_space
from snn_rl.rl.spaces import check_spaces, in_one_line
from snn_rl.rl.teacher import frames_of
from snn_rl.runs._run import Run
from snn_rl.runs.agent_training import PROTOCOL as PROTOCOL
from snn_rl.runs.agent_training import AgentTraining
from snn_rl.runs.ann import Ann, GivenAnn, extractor_kwargs, load_ann
from snn_rl.runs.life import is_finished, live, prepare
from snn_rl.runs.recipe import Recipe
from snn_rl.runs.stages import Stage, chain
from snn_rl.runs.task import Task
from snn_rl.runs.taught import Rewarded, Taught


def run(
    recipe: Recipe,
    directory: Path | str,
    seed: int = 0,
    *,
    device: str = "auto",
    ann: Path | str | None = None,
    progress_bar: bool = False,
    wait: float = 0.0,
) -> dict[str, Any]:
    """Train every stage of ``recipe`` that is not finished yet; returns what ``results.json`` holds.

    ``ann`` is an SB3 DQN's zip, or the policy file of an ANN, that takes the ANN stage's place: it is evaluated, not
    trained. Where another process trains in ``directory``, ``wait`` that many seconds for it to end.

    What the run does is logged to ``logging``'s "snn_rl" and shown on stderr, unless the program has set up logging.
    ``logging.getLogger("snn_rl").setLevel(logging.WARNING)`` turns it off. ``progress_bar`` adds bars with the time
    left, where tqdm is installed.

    Raises:
        ValueError: a directory of another run, or one that another process trains in; a device that is not there; an
            ``ann`` that does not fit; an environment that DQN or conversion cannot learn in, or that raises an error
            (the ``__cause__``); an episode of evaluation that does not end; too little memory.
    """
    device = prepare(recipe, seed, device)
    this = Run(recipe, Path(directory), seed, device, progress_bar)
    return live(AgentTask(this, None if ann is None else Path(ann)), wait)


class AgentTask(Task):
    """The ANN, then a spiking stage for each T of the recipe's schedule."""

    run: Run

    def __init__(self, run: Run, ann: Path | None = None) -> None:
        self.run, self.ann = run, ann
        self.stages = chain(run.recipe.schedule, ann)
        self.subject = run.recipe.env_id
        self._given: DQN | None = None

    def training(self, stage: Stage) -> AgentTraining:
        if stage.timesteps is not None:
            return (Rewarded if self.run.recipe.snn.rewards else Taught)(self.run, stage)
        return Ann(self.run, stage) if self._given is None else GivenAnn(self.run, stage, self._given)

    def check(self) -> dict[str, str]:
        run, stages, recipe = self.run, self.stages, self.run.recipe
        for_ann, for_spiking = (run.normalized_env(stage, 1, 0) for stage in stages[:2])
        for env in (for_ann, for_spiking):
            try:
                check_env(recipe.name, env)
            finally:
                env.close()
        seen, stacked = for_spiking.observation_space, for_ann.observation_space
        if for_ann.action_space != for_spiking.action_space or (seen != stacked and frames_of(stacked, seen) is None):
            raise ValueError(
                f"ann_env_kwargs of {recipe.name} may add a stack of frames alone, but {recipe.ann_env_kwargs} makes "
                f"{stacked} of {seen}"
            )
        normalize = unwrap_vec_normalize(for_ann)
        if normalize is not None and normalize.norm_reward and self.ann is not None and recipe.snn.rewards:
            raise ValueError(
                f"make_env of {recipe.name} normalizes rewards, of which {self.ann} holds no statistics; train the ANN "
                "in the run, or set norm_reward=False in its VecNormalize, or snn.rewards to False"
            )
        if isinstance(stacked, spaces.Dict) and recipe.ann.drop_dead_units:
            raise ValueError(f"ann.drop_dead_units of {recipe.name} must be False for Dict observations, got True")
        if recipe.network.convolutions and stages[0].parent is None:
            for space in (stacked, seen):
                with torch.device("meta"):  # takes no memory
                    ConvExtractor(space, **extractor_kwargs(recipe))  # type: ignore[arg-type]
        if self.ann is not None and not is_finished(run, stages[0]):
            self._given = load_ann(run, stages[0], self.ann)
            normalize = self._given.get_vec_normalize_env()
        if normalize is not None and normalize.norm_obs and seen != stacked:
            raise ValueError(
                f"the ANN of {recipe.name} must not see normalized stacks of frames ({recipe.ann_env_kwargs}): the "
                "spiking agent sees one, which has no statistics; set norm_obs=False in VecNormalize, or stack in "
                "env_kwargs"
            )
        return {"observation_space": in_one_line(seen), "action_space": in_one_line(for_spiking.action_space)}


def check_env(name: str, env: VecEnv, check: Callable[[spaces.Space, spaces.Space], None] = check_spaces) -> None:
    """Raises ValueError for an environment that a stage could not learn in, or whose agent no file could hold."""
    inside = without_normalization(env)
    observations, actions = inside.observation_space, inside.action_space
    try:
        check(observations, actions)
        check_space(observations)
        check_space(actions)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not is_monitored(env):
        raise ValueError(f"make_env of {name} must return monitored environments: wrap them in VecMonitor")
    running = (gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward)
    if unwrap_vec_normalize(inside) is not None or any(any(inside.env_is_wrapped(wrapper)) for wrapper in running):
        raise ValueError(
            f"make_env of {name} must not normalize by running statistics below its outermost wrapper: put SB3's "
            "VecNormalize around everything else, VecMonitor included"
        )
    if inside is not env and type(env) is not VecNormalize:
        raise ValueError(
            f"make_env of {name} must normalize by SB3's VecNormalize itself, got {type(env).__name__}: policies "
            "normalize as that does"
        )
    if env.observation_space != observations:
        raise ValueError(
            f"make_env of {name} must not normalize images, whose pixels SB3 divides by 255; set norm_obs=False in "
            "its VecNormalize"
        )
