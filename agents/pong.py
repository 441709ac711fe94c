"""Pong: the paper's Nature CNN, a small one for a machine without a GPU, and one frame without a stack."""

from __future__ import annotations

import dataclasses
from functools import partial

from envs.atari import make_atari
from snn_rl.runs.recipe import AnnConfig, NetworkConfig, Recipe, SnnConfig

# Without sticky actions a greedy agent and the game can return the ball to each other for ever; a game that is played
# to its end takes about 10,000 frames.
EPISODE_FRAMES = 27_000

# Few channels first keep the first synapse small: with direct encoding it multiplies at every frame, in a spiking
# network as in an ANN, and bounds what the spikes behind it can save.
PONG_LITE = Recipe(
    name="pong-lite",
    env_id="ALE/Pong-v5",
    make_env=partial(make_atari, "pong"),
    env_kwargs={"image_size": 42, "frame_stack": 4, "sticky": 0.0, "max_episode_frames": EPISODE_FRAMES},
    num_envs=8,
    network=NetworkConfig(convolutions=((8, 4, 2), (64, 4, 2), (32, 3, 1)), features_dim=512, net_arch=()),
    ann=AnnConfig(
        env_steps=900_000,
        learning_rate=3e-4,
        final_learning_rate=3e-5,
        buffer_size=100_000,
        learning_starts=10_000,
        batch_size=32,
        train_every=32,
        gradient_steps=8,
        n_steps=3,
        target_update_every=2_000,
        exploration_steps=120_000,
        exploration_eps=0.01,
        adam_eps=1.5e-4,
        average_steps=32_000,
    ),
    # Short windows and many of them, and a leak at which a membrane forgets within two frames: the stack already holds
    # the motion, so what is left over from earlier frames is noise. The parent's play errs often enough to show what a
    # student's mistakes lead to.
    snn=SnnConfig(
        percentile=99.0,
        leak=0.75,
        parent_steps=30_000,
        distillation_updates=10_000,
        average_updates=1_000,
        env_steps=25_000,
        learning_rate=2e-3,
        play_learning_rate=1e-4,
        buffer_size=120_000,
        batch_size=16,
        sequence_length=4,
        burn_in=4,
        train_every=32,
        gradient_steps=4,
        parent_eps=0.05,
        exploration_eps=0.05,
        spike_weight=0.0065,
    ),
    target_return=20.7,
    validate_every=50_000,
    validation_episodes=20,
)

# A student of four times the pixels learns 30,000 steps of play by heart: its loss is twice as high on steps it has
# not seen. Greedy games without sticky actions are few, soon go over into one rally that is won again and again, and
# are decided in their first rally: half of the training's environments play no more than two or three of them, and all
# of them explore little in a student's own play, at a rate at which it still learns.
# Most channels of the ANN's first layer come to be dead.
PONG = dataclasses.replace(
    PONG_LITE,
    name="pong",
    env_kwargs={"image_size": 84, "frame_stack": 4, "sticky": 0.0, "max_episode_frames": EPISODE_FRAMES},
    network=NetworkConfig(convolutions=((32, 8, 4), (64, 4, 2), (64, 3, 1)), features_dim=512, net_arch=()),
    ann=dataclasses.replace(PONG_LITE.ann, env_steps=1_200_000, drop_dead_units=True),
    snn=dataclasses.replace(
        PONG_LITE.snn,
        parent_steps=100_000,
        distillation_updates=20_000,
        env_steps=40_000,
        learning_rate=1e-3,
        play_learning_rate=5e-4,
        buffer_size=200_000,
        exploration_eps=0.01,
        restart_every=300,
        spike_weight=0.004,
    ),
    validate_every=20_000,
)

# What moves, and where to, is to be had from the membranes alone. The ANN of pong-lite, which sees four frames, teaches
# the spiking agent, which sees one. Leak and windows are those of a memory of some frames; T = 5 and 4 would forget
# within fewer.
PONG_SINGLE_FRAME = dataclasses.replace(
    PONG_LITE,
    name="pong-single-frame",
    env_kwargs={**PONG_LITE.env_kwargs, "frame_stack": 1},
    ann_env_kwargs={"frame_stack": 4},
    snn=dataclasses.replace(
        PONG_LITE.snn,
        leak=0.9,
        parent_steps=20_000,
        distillation_updates=24_000,
        average_updates=0,
        env_steps=50_000,
        same_compute=True,
        parent_eps=0.01,
        exploration_eps=0.01,
        learning_rate=1e-3,
        burn_in=6,
        spike_weight=0.0,
    ),
    schedule=(3, 2, 1),
)
