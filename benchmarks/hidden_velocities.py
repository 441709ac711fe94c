"""BipedalWalker without its velocities: does the agent compute them from what its membranes remember?

    python benchmarks/hidden_velocities.py TEACHER.zip --vecnormalize vecnormalize.pkl [--seed 0] [--episodes 20]

The teacher sees everything. Its student sees the angles, the contacts of the legs and the lidar, and neither the speed
of the hull nor those of the joints. It plays with its membranes carried from frame to frame, and again with membranes
that are cleared before every frame.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from snn_rl import Student
from snn_rl.rl.evaluation import evaluate
from snn_rl.rl.views import PartialObservation, WholeObservationTeacher
from snn_rl.runs.distil import teach
from snn_rl.runs.given import Given
from snn_rl.runs.recipe import SPIKING, TEST_SEEDS
from snn_rl.runs.registered import registered
from snn_rl.runs.stages import hardware, versions
from snn_rl.runs.taught import student_options

ENV_ID = "BipedalWalker-v3"
SEEN = (0, 4, 6, 8, 9, 11, *range(13, 24))  # of 24 entries
RANDOM = -97.8  # mean return of random actions
# Memory is short at many timesteps per frame, and windows have to be longer than it.
REMEMBERING = dataclasses.replace(SPIKING, leak=0.9, sequence_length=16, burn_in=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--schedule", type=int, nargs="+", default=[1])
    parser.add_argument("--vecnormalize", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_env = registered(ENV_ID)
    env = PartialObservation(make_env(8, seed=options.seed), SEEN)
    tested = PartialObservation(make_env(options.episodes, seed=TEST_SEEDS), SEEN)
    given = Given(options.teacher, None, options.vecnormalize)
    full = evaluate(WholeObservationTeacher(given.load(tested.venv, "cpu"), tested), tested, options.episodes)
    print(f"teacher: {full.mean:.1f} ± {full.std:.1f}")
    parent: Student | WholeObservationTeacher = WholeObservationTeacher(given.load(env.venv, "cpu"), env)
    for timesteps in options.schedule:
        since = time.monotonic()
        kwargs = {**student_options(REMEMBERING, env.num_envs), "seed": options.seed, "device": "cpu"}
        if isinstance(parent, Student):
            student = Student.from_parent(parent, env, timesteps, **kwargs)
        else:
            leak = {"leak": REMEMBERING.leak}
            student = Student.fresh(parent, env, timesteps=timesteps, policy_kwargs=leak, **kwargs)
        teach(student, parent, REMEMBERING, REMEMBERING.distillation_updates, REMEMBERING.env_steps)
        minutes = (time.monotonic() - since) / 60
        for persistent in (True, False):
            student.net.persistent = persistent
            tested.seed(TEST_SEEDS)
            played = evaluate(student, tested, options.episodes)
            score = (played.mean - RANDOM) / (full.mean - RANDOM)
            how = "persistent" if persistent else "cleared"
            print(
                f"T{timesteps}, {how}: {played.mean:.1f} ± {played.std:.1f}, score {score:.3f}, {minutes:.1f} minutes"
            )
        student.net.persistent = True
        parent = student
    print(hardware("cpu"), versions())


if __name__ == "__main__":
    main()
