"""A trained agent that a run was given: its zip, and what the zip does not say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from snn_rl.rl.actor import is_recurrent
from snn_rl.rl.statistics import read_vecnormalize
from snn_rl.rl.teacher import PolicyTeacher, RecurrentTeacher, Teacher
from snn_rl.rl.zips import read_zip


@dataclass(frozen=True)
class Given:
    """Its zip, the key of its algorithm in `ALGORITHMS` (None derives it), and what its ``VecNormalize`` saved."""

    path: Path
    algo: str | None = None
    vecnormalize: Path | None = None

    def as_dict(self) -> dict[str, str]:
        """What tells it apart from another agent: its algorithm, and the SHA-256 of its files."""
        return {
            "algorithm": self.algo or "that of its file",
            "teacher": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "statistics": "none"
            if self.vecnormalize is None
            else hashlib.sha256(self.vecnormalize.read_bytes()).hexdigest(),
        }

    def load(self, env: VecEnv, device: str) -> Teacher:
        """The agent as a teacher in ``env``.

        Raises:
            ValueError: a file that cannot be read or does not fit the environment, or an agent whose outputs are NaN.
        """
        agent = read_zip(self.path, env.observation_space, env.action_space, self.algo, device)
        statistics = None
        if self.vecnormalize is not None:
            statistics = read_vecnormalize(self.vecnormalize, env.observation_space)
        kind = RecurrentTeacher if is_recurrent(agent.policy) else PolicyTeacher
        return kind(agent.policy, statistics)

    def check(self, env: VecEnv, device: str) -> Teacher:
        """`load`, and one step of it in ``env``."""
        teacher = self.load(env, device)
        obs = env.reset()
        assert isinstance(obs, np.ndarray | dict)
        labels, _ = teacher.label(obs, None, np.ones(env.num_envs, dtype=bool))
        if not np.isfinite(labels).all():
            raise ValueError(f"the outputs of {self.path} hold NaN or infinity where an episode begins")
        return teacher
