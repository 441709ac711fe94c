"""Statistics that an agent's observations are normalised by (placeholder until the reader of files is merged)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from stable_baselines3.common.vec_env import VecNormalize


@dataclass(frozen=True)
class Statistics:
    mean: np.ndarray
    var: np.ndarray
    clip: float
    epsilon: float

    @classmethod
    def of(cls, normalize: VecNormalize) -> Statistics:
        rms = normalize.obs_rms
        return cls(rms.mean, rms.var, normalize.clip_obs, normalize.epsilon)  # type: ignore[union-attr]

    def normalize(self, observation: np.ndarray) -> np.ndarray:
        scaled = (observation - self.mean) / np.sqrt(self.var + self.epsilon)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)
