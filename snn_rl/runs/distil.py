"""`distil`: a trained agent becomes a spiking one, in a program, by one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium as gym
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize, unwrap_vec_normalize

from snn_rl.rl.actions import check_same_spaces
from snn_rl.rl.environments import transposed, without_normalization
from snn_rl.rl.evaluation import Evaluation, evaluate, is_fresh, is_monitored
from snn_rl.rl.preferences import as_preferences
from snn_rl.rl.spaces import check_observation_space
from snn_rl.rl.statistics import Statistics
from snn_rl.rl.student import Student
from snn_rl.rl.teacher import PolicyTeacher, RecurrentTeacher, Teacher, named, teacher_of
from snn_rl.runs.ann import adam
from snn_rl.runs.recipe import (
    FRESH,
    SEEDS_PER_RUN,
    SPIKING,
    TEST_SEEDS,
    NetworkConfig,
    SnnConfig,
    SpikeRecipe,
    check_schedule,
)
from snn_rl.runs.registered import registered
from snn_rl.runs.stages import check_device
from snn_rl.runs.taught import convert, converts, student_options


@dataclass(frozen=True)
class StageResult:
    """A stage of `distil`: its agent and how that played."""

    name: str  # "teacher", "ann", "T5" ...
    agent: Student | Teacher
    evaluation: Evaluation


@dataclass(frozen=True)
class Distilled:
    """What `distil` returns: the ``agent`` of the last stage, and all ``stages``.

    As in SB3, ``predict`` explores unless ``deterministic=True``.
    """

    agent: Student
    stages: list[StageResult]

    def __getitem__(self, name: str) -> StageResult:
        """The stage of this name, such as "T3"."""
        return next(stage for stage in self.stages if stage.name == name)


def distil(
    teacher: object,
    env: VecEnv | gym.Env | str,
    schedule: Sequence[int] = (5, 3, 1),
    *,
    eval_env: VecEnv | None = None,
    episodes: int = 20,
    net_arch: Sequence[int] = (256, 256),
    spiking: SnnConfig = SPIKING,
    fresh: SnnConfig = FRESH,
    seed: int = 0,
    device: str = "cpu",
) -> Distilled:
    """Make a trained agent spike, and prune its timesteps stage by stage.

    A network with ReLUs and at least 32 units in each layer is converted. Any other teacher (tanh, LSTM, a linear
    policy) first teaches a new one of ``net_arch``, which is then converted. Each stage learns from its parent's play
    and then from its own, labelled by the teacher.

    Args:
        teacher: an agent or a policy of stable-baselines3, sb3-contrib or this package, or a `Teacher`.
        env: where it plays, or the id of that in gymnasium, of which 8 copies are made. A ``VecNormalize`` is taken
            off; its statistics, or those of the teacher's own, become part of the agents.
        schedule: timesteps per frame of each stage, decreasing.
        eval_env: where stages are evaluated, for ``episodes`` each; by default ``env``.
        spiking, fresh: the numbers of the spiking stages, and of the new network's.

    Nothing is written. `snn_rl.runs.spike.spike` does the same in a folder, and goes on after a kill.

    Raises:
        ValueError: a schedule that does not decrease, an agent that cannot be a teacher, spaces that are not its, and
            what `Student` refuses.
    """
    check_schedule(tuple(schedule))
    for name in ("average_updates", "restart_every", "rewards"):
        if getattr(spiking, name) or getattr(fresh, name):
            raise ValueError(f"distil knows no {name}; leave it at its default")
    device = check_device(device)
    if isinstance(env, str):
        make_env = registered(env)
        eval_env = eval_env or make_env(min(episodes, 20), seed=0)  # seeded below
        env = make_env(8, seed=seed * SEEDS_PER_RUN)
    venv, statistics = _without_normalization(_vectorised(env))
    recipe = SpikeRecipe(  # checks every number
        name="distil",
        env_id="given",
        make_env=registered,
        num_envs=venv.num_envs,
        network=NetworkConfig(net_arch=tuple(net_arch)),
        snn=spiking,
        fresh=fresh,
        schedule=tuple(schedule),
        eval_episodes=episodes,
    )
    check_observation_space(venv.observation_space)
    labels = copy.copy(teacher_of(teacher, venv.observation_space))  # a copy: the caller's own explores as it did
    check_same_spaces(venv, labels)
    if statistics is not None and labels.statistics is None:
        if not isinstance(labels, PolicyTeacher | RecurrentTeacher):
            raise ValueError(f"{named(teacher)} cannot be given the statistics of env; take VecNormalize off")
        labels.statistics = statistics
    labels = as_preferences(labels, venv)
    played_in = venv if eval_env is None else _without_normalization(eval_env)[0]

    def result(name: str, agent: Student | Teacher) -> StageResult:
        played_in.seed(TEST_SEEDS + seed * SEEDS_PER_RUN)  # the same episodes for every stage
        played = evaluate(agent, played_in, episodes)
        if isinstance(agent, Student):
            agent._last_obs = None  # the environment may be the one that it learns in
        return StageResult(name, agent, played)

    stages = [result("teacher", labels)]
    agent: Student | None = None
    if not converts(labels):
        options = {**student_options(fresh, venv.num_envs), "seed": seed * SEEDS_PER_RUN, "device": device}
        kwargs = {"optimizer_kwargs": adam(fresh)}
        agent = Student.fresh(labels, venv, net_arch, policy_kwargs=kwargs, **options)
        teach(agent, labels, fresh, fresh.distillation_updates, fresh.env_steps)
        stages.append(result("ann", agent))
    for timesteps in schedule:
        options = {**student_options(spiking, venv.num_envs), "seed": seed * SEEDS_PER_RUN, "device": device}
        parent = agent or labels
        if isinstance(parent, Student) and parent.timesteps is not None:
            student = Student.from_parent(parent, venv, timesteps, **options)
        else:
            student = convert(parent, venv, timesteps, spiking, options)
        student.teacher = labels
        teach(student, parent, spiking, recipe.distillation_updates(timesteps), recipe.snn_steps(timesteps))
        agent = student
        stages.append(result(f"T{timesteps}", agent))
    assert agent is not None
    return Distilled(agent, stages)


def teach(student: Student, parent: Student | Teacher, config: SnnConfig, updates: int, steps: int) -> None:
    """Learn from the parent's play, by ``updates``, and then from ``steps`` of one's own."""
    explores = parent.exploration_rate
    parent.exploration_rate = config.parent_eps
    try:
        student.collect(parent, config.parent_steps)
    finally:
        parent.exploration_rate = explores
    if isinstance(parent, Student) and parent.timesteps is not None and config.keep_rates:
        student.keep_rates(parent)
    if updates:
        student.distil(updates, LinearSchedule(config.learning_rate, config.play_learning_rate, 1.0))
    student.learn(steps)


def _vectorised(env: VecEnv | gym.Env) -> VecEnv:
    venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    venv = venv if is_monitored(venv) else VecMonitor(venv)
    return venv if isinstance(venv, VecNormalize) else transposed(venv)  # which is on top, to be taken off


def _without_normalization(env: VecEnv) -> tuple[VecEnv, Statistics | None]:
    """``env`` without a ``VecNormalize`` of observations at its top, and the statistics of that."""
    normalize = unwrap_vec_normalize(env)
    if normalize is None:
        return env, None
    if isinstance(env, VecNormalize):
        if env.norm_obs and is_fresh(env):
            raise ValueError(
                "the VecNormalize of env has no statistics yet; pass the one that the teacher was trained in"
            )
        return transposed(without_normalization(env)), Statistics.of(env)
    raise ValueError("VecNormalize must be the outermost wrapper of the environment, where it can be taken off")
