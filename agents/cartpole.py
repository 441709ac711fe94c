"""CartPole-v1, with all four observations and with the two velocities left out."""

from __future__ import annotations

import dataclasses

from envs.classic import make_cartpole
from snn_rl.runs.recipe import AnnConfig, NetworkConfig, Recipe, SnnConfig

CARTPOLE = Recipe(
    name="cartpole",
    env_id="CartPole-v1",
    make_env=make_cartpole,
    num_envs=8,
    network=NetworkConfig(net_arch=(256, 256)),
    # 3-step returns, frequent small updates and a slow target: a teacher that stays at 500 and keeps to the middle.
    ann=AnnConfig(
        env_steps=60_000,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        learning_starts=1_000,
        batch_size=64,
        train_every=8,
        gradient_steps=4,
        n_steps=3,
        target_update_every=500,
        exploration_steps=8_000,
        exploration_eps=0.04,
    ),
    # No burn-in: every window is trained from silence, which is how an episode starts and what is rare in long ones.
    snn=SnnConfig(
        distillation_updates=1_000,
        env_steps=16_000,
        learning_rate=2e-3,
        play_learning_rate=2e-3,
        sequence_length=20,
        burn_in=0,
    ),
    target_return=500.0,
    validations_at_target=3,
    validate_every=2_000,
    validation_episodes=100,
    cpu_threads=1,
)

# Velocity is to be had from the membranes alone. The ANN sees the last eight positions and teaches; the spiking agent
# sees one. Memory is short: at T = 5 a leak of 0.8 would forget within a frame, so the schedule starts at T = 2; and
# with a leak of 0.9 two of three trainings got stuck without memory. Windows warm up over what the teacher sees.
CARTPOLE_NO_VELOCITY = dataclasses.replace(
    CARTPOLE,
    name="cartpole-no-velocity",
    env_kwargs={"velocities": False},
    ann_env_kwargs={"frame_stack": 8},
    snn=dataclasses.replace(
        CARTPOLE.snn,
        leak=0.8,
        distillation_updates=2_000,
        env_steps=8_000,
        learning_rate=1e-3,
        play_learning_rate=1e-3,
        burn_in=10,
        parent_eps=0.05,
        exploration_eps=0.05,
    ),
    schedule=(2, 1),
)
