"""A run that makes a trained agent of any algorithm spike: teacher, an ordinary network where needed, T5 to T1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snn_rl.rl.environments import without_normalization
from snn_rl.rl.spaces import check_observation_space, in_one_line
from snn_rl.runs._run import History, Run
from snn_rl.runs.agent import check_env
from snn_rl.runs.agent_training import PROTOCOL
from snn_rl.runs.given import Given
from snn_rl.runs.life import live, prepare
from snn_rl.runs.recipe import TEST_SEEDS, SpikeRecipe
from snn_rl.runs.stages import Stage
from snn_rl.runs.task import Checkpoints, Measured, Task, Training
from snn_rl.runs.taught import Taught, TaughtAnn, converts


def spike(
    recipe: SpikeRecipe,
    given: Given,
    directory: Path | str,
    seed: int = 0,
    *,
    device: str = "cpu",
    progress_bar: bool = False,
) -> dict[str, Any]:
    """Make the ``given`` agent spike; returns what ``results.json`` holds. The same call resumes a run.

    Raises:
        ValueError: a file that cannot be read, or does not fit the environment; and as `snn_rl.runs.agent.run`.
    """
    device = prepare(recipe, seed, device)
    return live(SpikeTask(Run(recipe, Path(directory), seed, device, progress_bar, given=given)))


class SpikeTask(Task):
    """The given teacher, an ordinary network where its own does not convert, and the spiking stages."""

    run: Run

    def __init__(self, run: Run) -> None:
        assert run.given is not None
        self.run, self.ann, self.subject = run, run.given.path, run.recipe.env_id
        teacher_stage = Stage(None, str(run.given.path), is_teacher=True)
        env = run.normalized_env(teacher_stage, 1, 0)
        try:
            check_env(run.recipe.name, env, lambda observations, _: check_observation_space(observations))
            self.seen = {
                "observation_space": in_one_line(env.observation_space),
                "action_space": in_one_line(env.action_space),
            }
            teacher = run.given.check(without_normalization(env), run.device)
            self.seen |= run.given.as_dict()
        finally:
            env.close()
        stages = [teacher_stage]
        if not converts(teacher):
            stages.append(Stage(None, "teacher"))
        for timesteps in run.recipe.schedule:
            stages.append(Stage(timesteps, stages[-1].name))
        self.stages = stages

    def check(self) -> Mapping[str, str]:
        return self.seen

    def training(self, stage: Stage) -> Training:
        if stage.is_teacher:
            return GivenTeacher(self.run, stage)
        return TaughtAnn(self.run, stage) if stage.timesteps is None else Taught(self.run, stage)


class GivenTeacher(Training):
    """The teacher's stage: it is evaluated, not trained."""

    is_trained = False
    history: History

    def __init__(self, run: Run, stage: Stage) -> None:
        super().__init__(stage, run.folder(stage), History())
        self.run = run

    def begin(self) -> None:
        pass

    def resume(self) -> str | None:
        return None

    def train(self, checkpoints: Checkpoints) -> None:
        pass

    def save(self) -> None:
        pass

    def choose(self) -> None:
        pass

    def export(self) -> Measured:
        env = self.run.env(self.stage, self.run.recipe.eval_episodes, TEST_SEEDS)
        try:
            evaluation = self.run.evaluate(self.run.teacher(env), env, self.run.recipe.eval_episodes)
        finally:
            env.close()
        return Measured({"env_steps": 0, "updates": 0}, {"eval": evaluation.as_dict(PROTOCOL)}, None, None)
