"""`distil`: a trained agent becomes a spiking one, in a program, by one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize, unwrap_vec_normalize

from snn_rl.rl.environments import transposed
from snn_rl.rl.evaluation import Evaluation, evaluate, is_monitored
from snn_rl.rl.preferences import as_preferences
from snn_rl.rl.recurrent import check_same_spaces
from snn_rl.rl.spaces import check_observation_space
from snn_rl.rl.statistics import Statistics
from snn_rl.rl.student import Student
from snn_rl.rl.teacher import PolicyTeacher, RecurrentTeacher, Teacher, teacher_of
from snn_rl.runs.recipe import FRESH, SPIKING, SnnConfig, check_schedule
from snn_rl.runs.registered import registered
from snn_rl.runs.taught import convert, converts, student_options


@dataclass(frozen=True)
class StageResult:
    """A stage of `distil`: its agent and how that played."""

    name: str  # "teacher", "ann", "T5" ...
    agent: Student | Teacher
    evaluation: Evaluation


@dataclass(frozen=True)
class Distilled:
    """What `distil` returns: the ``agent`` of the last stage, and all ``stages``."""

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

    A network with ReLUs is converted. Any other teacher (tanh, LSTM, a linear policy) first teaches a new one of
    ``net_arch``, which is then converted. Each stage learns from its parent's play and then from its own, labelled by
    the teacher.

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
    if isinstance(env, str):
        eval_env = eval_env or registered(env)(min(episodes, 20), seed=seed + 1_000)
        env = registered(env)(8, seed=seed)
    venv, statistics = _without_normalization(_vectorised(env))
    check_observation_space(venv.observation_space)
    labels = teacher_of(teacher, venv.observation_space)
    check_same_spaces(venv, labels)
    if statistics is not None and labels.statistics is None and isinstance(labels, PolicyTeacher | RecurrentTeacher):
        labels.statistics = statistics
    labels = as_preferences(labels, venv)
    played_in = venv if eval_env is None else _without_normalization(eval_env)[0]
    stages = [StageResult("teacher", labels, evaluate(labels, played_in, episodes))]
    agent: Student | None = None
    if not converts(labels):
        options = student_options(fresh, venv.num_envs)
        agent = Student.fresh(labels, venv, net_arch, seed=seed, device=device, **options)
        teach(agent, labels, fresh)
        stages.append(StageResult("ann", agent, evaluate(agent, played_in, episodes)))
    for timesteps in schedule:
        options = {**student_options(spiking, venv.num_envs), "seed": seed, "device": device}
        parent = agent or labels
        if isinstance(parent, Student) and parent.timesteps is not None:
            student = Student.from_parent(parent, venv, timesteps, **options)
        else:
            student = convert(parent, venv, timesteps, spiking, options)
        student.teacher = labels
        teach(student, parent, spiking)
        agent = student
        stages.append(StageResult(f"T{timesteps}", agent, evaluate(agent, played_in, episodes)))
    assert agent is not None
    return Distilled(agent, stages)


def teach(student: Student, parent: Student | Teacher, config: SnnConfig) -> None:
    """Learn from the parent's play, then from one's own."""
    parent.exploration_rate = config.parent_eps
    student.collect(parent, config.parent_steps)
    if isinstance(parent, Student) and parent.timesteps is not None and config.keep_rates:
        student.keep_rates(parent)
    student.distil(config.distillation_updates)
    student.learn(config.env_steps)


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
        return transposed(env.venv), Statistics.of(env)
    raise ValueError("VecNormalize must be the outermost wrapper of the environment, where it can be taken off")
