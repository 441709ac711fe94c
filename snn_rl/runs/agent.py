"""The stages of an agent: ANN-DQN, conversion, temporal pruning. How stages make a run: `snn_rl.runs.stages`.

A checkpoint is written after a minute of collecting, distilling or training (later where writing takes more than a
twentieth of the time), every ``checkpoint_every`` environment steps and twenty times while a stage distils.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.dqn.policies import DQNPolicy

from snn_rl.base.files import alone_in, atomic, write_json
from snn_rl.base.progress import bar, digits, one_line, show_log
from snn_rl.rl import ConvExtractor, SequenceReplayBuffer, SpikingDQN, SpikingDQNPolicy
from snn_rl.rl.dead_units import without_dead_units
from snn_rl.rl.environments import EnvironmentFailedError
from snn_rl.rl.evaluation import Evaluation, evaluate, is_monitored, spiking_network
from snn_rl.rl.policy_file import LoadedPolicy, check_space, check_storable, load_policy, save_policy
from snn_rl.rl.replay import frame_stack_of
from snn_rl.rl.spaces import check_spaces, in_one_line
from snn_rl.rl.teacher import StackedTeacher, frames_of
from snn_rl.runs._run import (
    Checkpoints,
    History,
    Run,
    algorithm_of,
    averaged,
    channels_last,
    load_model,
    resume,
)
from snn_rl.runs.recipe import SEEDS_PER_RUN, TEST_SEEDS, VALIDATION_SEEDS, AnnConfig, Recipe, SnnConfig
from snn_rl.runs.stages import (
    BEST,
    Stage,
    chain,
    check_device,
    claim,
    hardware,
    measurements,
    remove_leftovers,
    run_stages,
    versions,
)

LOG = logging.getLogger(__name__)
PROTOCOL = "greedy, one episode per seed, seeds unseen in training and selection"
CURVE_POINTS = 400
DISTILLATION_PIECES = 20
ANN_FILES = "the zip of an SB3 DQN or the policy.safetensors of an ANN"


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
    if not 0 <= seed < 100_000:
        raise ValueError(f"seed must lie in [0, 100000), got {seed}")
    device = check_device(device)
    directory, ann = Path(directory), None if ann is None else Path(ann)
    if recipe.cpu_threads is not None:
        torch.set_num_threads(recipe.cpu_threads)
    this = Run(recipe, directory, seed, device, progress_bar)
    stages = chain(recipe.schedule, ann)
    head = {"recipe": recipe.name, "env_id": recipe.env_id, "seed": seed}
    seen = _check(this, stages)
    given = None
    if ann is not None and not (directory / stages[0].name / "metrics.json").is_file():
        given = _load_ann(this, stages[0], ann)

    def train(stage: Stage) -> None:
        try:
            _train_stage(this, stage, given)
        except EnvironmentFailedError as failure:
            raise ValueError(
                f"{stage.name}: {failure}; once that is repaired, the same call goes on from the last checkpoint"
            ) from failure.__cause__
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ValueError(
                f"{stage.name} takes more memory than there is ({one_line(error)}); lower buffer_size, batch_size or "
                "num_envs"
            ) from error

    with show_log(), alone_in(directory, wait):
        claim(directory, recipe, seed, ann, seen)
        return run_stages(directory, stages, train, head)


def _check(this: Run, stages: Sequence[Stage]) -> dict[str, str]:
    """What a stage would find out after the one before it has been trained; the spaces of its environment."""
    recipe = this.recipe
    for_ann, for_spiking = (this.env(stage, 1, 0) for stage in stages[:2])
    for env in (for_ann, for_spiking):
        try:
            _check_env(recipe.name, env)
        finally:
            env.close()
    seen, stacked = for_spiking.observation_space, for_ann.observation_space
    if for_ann.action_space != for_spiking.action_space or (seen != stacked and frames_of(stacked, seen) is None):
        raise ValueError(
            f"ann_env_kwargs of {recipe.name} may add a stack of frames alone, but {recipe.ann_env_kwargs} makes "
            f"{stacked} of {seen}"
        )
    if recipe.network.convolutions and stages[0].parent is None:
        for space in (stacked, seen):
            with torch.device("meta"):  # takes no memory
                ConvExtractor(space, **_extractor_kwargs(recipe))  # type: ignore[arg-type]
    return {"observation_space": in_one_line(seen), "action_space": in_one_line(for_spiking.action_space)}


def _check_env(name: str, env: VecEnv) -> None:
    """Raises ValueError for an environment that a stage could not learn in, or whose agent no file could hold."""
    observations, actions = env.observation_space, env.action_space
    try:
        check_spaces(observations, actions)
        check_space(observations)
        check_space(actions)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not is_monitored(env):
        raise ValueError(f"make_env of {name} must return monitored environments: wrap them in VecMonitor")
    running = (gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward)
    if unwrap_vec_normalize(env) is not None or any(any(env.env_is_wrapped(wrapper)) for wrapper in running):
        raise ValueError(
            f"make_env of {name} must not normalize by running statistics, which each stage, validation and evaluation "
            "would begin anew; scale by constants instead, with gymnasium.wrappers.TransformObservation"
        )


# --- one stage ----------------------------------------------------------------------------------------------------


def _train_stage(this: Run, stage: Stage, given: DQN | None = None) -> None:
    """Train or resume a stage, choose its checkpoint on validation seeds, evaluate it, write its files.

    Where an ANN is ``given``, it is what the ANN stage would have trained.
    """
    folder = this.directory / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    if stage.timesteps is None and given is not None:
        model, history = given, History(extra_steps=given.num_timesteps, extra_updates=given._n_updates)
    else:
        resumed = resume(this, stage)
        parent: DQN | StackedTeacher | None = None
        if resumed is None:
            model, history, parent = _begin(this, stage)
            LOG.info("%s begins, from %s", stage.name, stage.parent or "nothing")
        else:
            model, history = resumed
            LOG.info("%s goes on after %s", stage.name, _done(this, model, history))
        checkpoints = Checkpoints(folder, history, averaged(this, stage, model))
        if isinstance(model, SpikingDQN):
            _collect(this, stage, model, checkpoints, parent)
            _distill(this, stage, model, checkpoints)
        _learn(this, stage, model, checkpoints)
        history.extra_steps += model.num_timesteps
        history.extra_updates += model._n_updates
        if (env := model.get_env()) is not None:
            env.close()  # its processes, too
        if (folder / BEST).is_file():
            model = load_model(this, algorithm_of(stage), folder / BEST)
    if stage.timesteps is None and this.recipe.ann.drop_dead_units:
        whole, model = model, without_dead_units(model, _own_play(this, stage, model))
        before, after = (sum(p.numel() for p in m.q_net.parameters()) for m in (whole, model))
        LOG.info("%s without its dead units: %s of %s weights stay", stage.name, f"{after:,}", f"{before:,}")
    _export(this, stage, model, history)


def _done(this: Run, model: DQN, history: History) -> str:
    """How far a stage has come, in words."""
    if not isinstance(model, SpikingDQN):
        return f"{model.num_timesteps} steps"
    if history.extra_steps < this.recipe.snn.parent_steps:
        return f"{history.extra_steps} of {this.recipe.snn.parent_steps} steps of its parent's play"
    return f"{model.distilled} updates of distillation and {model.num_timesteps} steps"


def _begin(this: Run, stage: Stage) -> tuple[DQN, History, DQN | StackedTeacher | None]:
    """A stage's algorithm before its first step, and whose play is to fill its replay; None in the ANN stage."""
    remove_leftovers(this.directory / stage.name)
    env = this.training_env(stage)
    if stage.timesteps is None:
        return new_ann(this, env), History(), None
    started = time.monotonic()
    config = this.recipe.snn
    ann = load_model(this, DQN, this.directory / "ann" / "model.zip")
    kwargs: dict[str, Any] = {
        "learning_rate": LinearSchedule(config.play_learning_rate, config.play_learning_rate / 20, 1.0),
        "buffer_size": config.buffer_size,
        "learning_starts": 0,
        "batch_size": config.batch_size,
        "train_freq": config.train_every // this.recipe.num_envs,
        "gradient_steps": config.gradient_steps,
        "n_steps": config.n_steps,
        "gamma": this.recipe.ann.gamma,
        "target_update_interval": config.target_update_every,
        "exploration_initial_eps": config.exploration_eps,
        "exploration_final_eps": config.exploration_eps,
        "max_grad_norm": config.max_grad_norm,
        "sequence_length": config.sequence_length,
        "burn_in": config.burn_in,
        "td_weight": config.td_weight,
        "distillation_weight": config.distillation_weight,
        "distillation_temperature": config.distillation_temperature,
        "spike_weight": config.spike_weight,
        "seed": this.first_seed,
        "device": this.device,
    }
    teacher = this.teacher(ann, env)
    parent = _parent(this, stage, teacher)
    if isinstance(parent, SpikingDQN):
        model = SpikingDQN.from_parent(parent, env, stage.timesteps, **kwargs)
    else:
        model = SpikingDQN.from_ann(
            ann,
            env,
            stage.timesteps,
            percentile=config.percentile,
            leak=config.leak,
            leak_reset=config.leak_reset,
            persistent=config.persistent,
            policy_kwargs={"optimizer_kwargs": _adam(config)},
            **kwargs,
        )
    model.teacher = teacher
    return model, History(wall_seconds=time.monotonic() - started), parent


def _parent(this: Run, stage: Stage, teacher: DQN | StackedTeacher) -> DQN | StackedTeacher:
    """Who plays what a spiking stage first learns from, and explores as the recipe says: its parent."""
    assert stage.parent is not None
    parent = teacher
    if stage.parent != "ann":
        parent = load_model(this, SpikingDQN, this.directory / stage.parent / "model.zip")
    parent.exploration_rate = this.recipe.snn.parent_eps
    return parent


def _collect(
    this: Run, stage: Stage, model: SpikingDQN, checkpoints: Checkpoints, parent: DQN | StackedTeacher | None
) -> None:
    """What is left of the parent's play that fills a stage's replay; ``parent`` is loaded where there is none."""
    config, history = this.recipe.snn, checkpoints.history
    left = config.parent_steps - history.extra_steps
    if left <= 0:
        return
    if parent is None:
        assert model.teacher is not None
        parent = _parent(this, stage, model.teacher)
    model.set_logger(configure(str(checkpoints.folder), []))
    done = config.parent_steps - left
    with bar(this.progress_bar, f"{stage.name}, play of {stage.parent}", config.parent_steps, "step", done) as tick:
        model.collect(parent, left, CollectionCallback(checkpoints, left, tick))
    if isinstance(parent, SpikingDQN) and config.keep_rates:
        model.keep_rates(parent)
    history.extra_steps = done + -(-left // this.recipe.num_envs) * this.recipe.num_envs
    model.num_timesteps = 0
    checkpoints.write(model)


def _distill(this: Run, stage: Stage, model: SpikingDQN, checkpoints: Checkpoints) -> None:
    """What is left of a stage's distillation, in pieces, each of which a kill leaves standing."""
    assert stage.timesteps is not None
    config, average = this.recipe.snn, checkpoints.average
    updates = this.recipe.distillation_updates(stage.timesteps) if config.distillation_weight else 0
    schedule = LinearSchedule(config.learning_rate, config.play_learning_rate, 1.0)
    model.set_logger(configure(str(checkpoints.folder), []))

    if model.distilled >= updates:
        return
    with bar(this.progress_bar, f"{stage.name}, distillation", updates, "update", model.distilled) as tick:

        def after_update() -> None:
            if average is not None:
                average.update()
            tick(1)
            if checkpoints.are_due():
                checkpoints.write(model, replay=False)  # the replay stands, and has not changed

        while (done := model.distilled) < updates:
            piece = min(-(-updates // DISTILLATION_PIECES), updates - done)

            def learning_rate(remaining: float, done: int = done, piece: int = piece) -> float:
                return schedule(1 - (done + (1 - remaining) * piece) / updates)

            loss = model.distil(piece, learning_rate, after_update)
            LOG.info("%s after %d of %d updates of distillation: loss %.3f", stage.name, model.distilled, updates, loss)
            checkpoints.write(model, replay=False)


def _learn(this: Run, stage: Stage, model: DQN, checkpoints: Checkpoints) -> None:
    """What is left of a stage's learning on its own play."""
    budget = this.recipe.ann.env_steps if stage.timesteps is None else this.recipe.snn_steps(stage.timesteps)
    callback = StageCallback(this, stage, checkpoints)
    if model.num_timesteps >= budget or callback.reached_target(model.num_timesteps):
        return
    model.set_logger(configure(str(checkpoints.folder), ["tensorboard"]))
    with bar(this.progress_bar, stage.name, budget, "step", model.num_timesteps) as callback.tick:
        model.learn(
            budget - model.num_timesteps,
            callback=callback,
            reset_num_timesteps=model.num_timesteps == 0,
            log_interval=1,
        )
        callback.finish()


def _own_play(this: Run, stage: Stage, model: DQN) -> Iterator[np.ndarray]:
    """Observations (n_envs, ...) of an ANN's epsilon-greedy play, such as fills the replay of the stage behind it."""
    config, n_envs = this.recipe.snn, this.recipe.num_envs
    exploration = np.random.default_rng(this.first_seed)
    env = this.student_env(stage)
    try:
        obs = env.reset()
        for _ in range(-(-config.parent_steps // n_envs)):
            assert isinstance(obs, np.ndarray)
            yield obs
            greedy, _ = model.predict(obs, deterministic=True)
            random = exploration.integers(int(model.action_space.n), size=n_envs)  # type: ignore[attr-defined]
            obs, *_ = env.step(np.where(exploration.random(n_envs) < config.parent_eps, random, greedy))
    finally:
        env.close()


def new_ann(this: Run, env: VecEnv) -> DQN:
    """The ANN stage's algorithm: SB3's DQN."""
    config, network = this.recipe.ann, this.recipe.network
    policy_kwargs: dict[str, Any] = {
        "net_arch": list(network.net_arch),
        "optimizer_kwargs": _adam(config),
    }
    if network.convolutions:
        policy_kwargs["features_extractor_class"] = ConvExtractor
        policy_kwargs["features_extractor_kwargs"] = _extractor_kwargs(this.recipe)
    model = DQN(
        "CnnPolicy" if network.convolutions else "MlpPolicy",
        env,
        learning_rate=LinearSchedule(config.learning_rate, config.final_learning_rate, 1.0),
        buffer_size=config.buffer_size,
        learning_starts=config.learning_starts,
        batch_size=config.batch_size,
        gamma=config.gamma,
        train_freq=config.train_every // this.recipe.num_envs,
        gradient_steps=config.gradient_steps,
        # SB3's own algorithm on a memory that keeps each frame once
        replay_buffer_class=SequenceReplayBuffer,
        replay_buffer_kwargs={"frame_stack": frame_stack_of(env), "n_steps": config.n_steps, "gamma": config.gamma},
        target_update_interval=config.target_update_every,
        exploration_fraction=min(1.0, config.exploration_steps / config.env_steps),
        exploration_final_eps=config.exploration_eps,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs=policy_kwargs,
        seed=this.first_seed,
        device=this.device,
    )
    return channels_last(model)


def _extractor_kwargs(recipe: Recipe) -> dict[str, Any]:
    return {"features_dim": recipe.network.features_dim, "convolutions": recipe.network.convolutions}


def _adam(config: AnnConfig | SnnConfig) -> dict[str, Any]:
    return {"eps": config.adam_eps, "fused": True}  # one pass over all parameters


def _load_ann(this: Run, stage: Stage, path: Path) -> DQN:
    """The DQN in ``path``, checked against the environment of the ANN stage, ``stage``."""
    if not path.is_file():
        raise ValueError(f"no file at {path}; --ann takes {ANN_FILES}")
    env = this.env(stage, 1, 0)
    try:
        source = "was trained"
        if path.suffix == ".safetensors":
            loaded = load_policy(path)
            policy: DQNPolicy = loaded.policy
            if recipe := loaded.metadata["provenance"].get("recipe"):
                source = f"is of the recipe {recipe!r}, trained"
        else:
            model = _read_zip(path, this.device)
            policy = model.policy
        if isinstance(policy, SpikingDQNPolicy):
            raise ValueError(f"{path} holds a spiking agent; --ann takes an ANN: {ANN_FILES}")
        try:
            check_storable(policy)
        except ValueError as error:
            raise ValueError(f"{path} cannot take the ANN stage's place: {error}") from error
        for name in ("observation_space", "action_space"):
            ours, theirs = getattr(policy, name), getattr(env, name)
            if ours != theirs:
                raise ValueError(f"{path} {source} with {name} {ours}, but {this.recipe.name} has {theirs}")
        if path.suffix == ".safetensors":
            names = ("net_arch", "features_extractor_class", "features_extractor_kwargs", "normalize_images")
            kwargs = {name: getattr(policy, name) for name in names}
            gamma, eps = this.recipe.ann.gamma, this.recipe.ann.exploration_eps
            model = DQN(DQNPolicy, env, gamma=gamma, buffer_size=1, policy_kwargs=kwargs, device=this.device)
            model.exploration_rate = eps  # as a training leaves it
            for q_net in (model.q_net, model.q_net_target):
                q_net.load_state_dict(policy.q_net.state_dict())
    finally:
        env.close()
    return model


def _read_zip(path: Path, device: str) -> DQN:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a spiking agent, say, which the caller refuses
            return DQN.load(path, device=device)
    except Exception as error:  # unpickling a foreign file may raise anything
        raise ValueError(
            f"{path} is not a readable SB3 DQN: it is damaged, or of another algorithm ({one_line(error)})"
        ) from error


# --- during a stage -----------------------------------------------------------------------------------------------


class CollectionCallback(BaseCallback):
    """Checkpoints while a stage collects ``steps`` of its parent's play."""

    def __init__(self, checkpoints: Checkpoints, steps: int, tick: Callable[[int], object]) -> None:
        super().__init__()
        self.checkpoints, self.steps, self.tick = checkpoints, steps, tick
        self.before = checkpoints.history.extra_steps

    def _on_step(self) -> bool:
        n_envs = self.training_env.num_envs
        taken = self.n_calls * n_envs
        self.tick(n_envs)
        # Not at the last step: a checkpoint of all of it has the thresholds that follow from it.
        if taken < self.steps and self.checkpoints.are_due():
            self.checkpoints.history.extra_steps = self.before + taken - n_envs  # this step is not in the replay yet
            self.checkpoints.write(self.model)  # type: ignore[arg-type]
        return True


class StageCallback(BaseCallback):
    """Validation, early stop, checkpoints and the reward curve of one stage."""

    def __init__(self, this: Run, stage: Stage, checkpoints: Checkpoints) -> None:
        super().__init__()
        self.this, self.stage, self.checkpoints = this, stage, checkpoints
        self.folder, self.history, self.average = checkpoints.folder, checkpoints.history, checkpoints.average
        self.env: VecEnv | None = None
        self.tick: Callable[[int], object] = lambda _: None

    def reached_target(self, steps: int) -> bool:
        target, needed = self.this.recipe.target_return, self.this.recipe.validations_at_target
        last = [validation for validation in self.history.validation if validation[0] <= steps][-needed:]
        return target is not None and len(last) == needed and all(mean >= target for _, mean in last)

    def _on_training_start(self) -> None:
        recipe = self.this.recipe
        self.next_validation = self._next(recipe.validate_every)
        self.next_checkpoint = self._next(recipe.checkpoint_every)
        timesteps = self.stage.timesteps
        budget = recipe.ann.env_steps if timesteps is None else recipe.snn_steps(timesteps)
        self.curve_every = max(1, budget // CURVE_POINTS)
        self.next_point = self._next(self.curve_every)
        self.averaged_updates = self.model._n_updates

    def _next(self, every: int | None) -> float:
        return math.inf if every is None else (self.num_timesteps // every + 1) * every

    def _on_step(self) -> bool:
        self.tick(self.training_env.num_envs)
        if self.num_timesteps >= self.next_point:
            self.next_point = self._next(self.curve_every)
            if self.model.ep_info_buffer:
                self.history.curve["env_steps"].append(self.num_timesteps)
                self.history.curve["returns"].append(float(np.mean([info["r"] for info in self.model.ep_info_buffer])))
            # SB3 itself writes where an episode ends: in Pong that is once in thousands of steps
            self.logger.dump(self.num_timesteps)
        if self.num_timesteps >= self.next_validation:
            self.next_validation = self._next(self.this.recipe.validate_every)
            self._validate()
            if self.reached_target(self.num_timesteps):
                return False
        return True

    def _on_rollout_start(self) -> None:
        # Of SB3's own DQN, which looks at no loss; before anything of it is kept. A spiking stage has looked itself.
        loss = self.model.logger.name_to_value.get("train/loss", 0.0)
        if not np.isfinite(loss):
            raise ValueError(
                f"the loss of {self.stage.name} is {loss} after {self.model._n_updates} updates; train with a lower "
                f"learning rate in another --run-dir. {self.folder} keeps its last checkpoint"
            )
        if self.average is not None:
            made = self.model._n_updates - self.averaged_updates
            self.averaged_updates += made
            if made:
                self.average.update(made)
        # Between a rollout and the next, where the replay holds every step that was taken.
        if self.num_timesteps >= self.next_checkpoint or self.checkpoints.are_due():
            self.next_checkpoint = self._next(self.this.recipe.checkpoint_every)
            self._checkpoint()

    def finish(self) -> None:
        """At the end of the budget: a last validation, unless one was just made."""
        if not self.history.validation or self.history.validation[-1][0] != self.num_timesteps:
            self._validate()
        if self.checkpoints.are_due():  # what is left of the stage may take long
            self._checkpoint()
        self.checkpoints.tell_time()
        if self.env is not None:
            self.env.close()

    def _validate(self) -> None:
        recipe = self.this.recipe
        if self.env is None:
            self.env = self.this.env(self.stage, recipe.validation_episodes, VALIDATION_SEEDS)
        self.env.seed(VALIDATION_SEEDS + self.this.seed * SEEDS_PER_RUN)  # the same episodes at every validation
        with nullcontext() if self.average is None else self.average.in_place():
            mean = _evaluate(self.this, self.model, self.env, recipe.validation_episodes).mean  # type: ignore[arg-type]
            best = max((m for _, m in self.history.validation), default=-np.inf)
            self.history.note(self.num_timesteps, mean)
            LOG.info("%s after %d steps: %s on validation", self.stage.name, self.num_timesteps, digits(mean))
            self.logger.record("validation/mean_reward", mean)
            self.logger.dump(self.num_timesteps)
            if mean >= best:
                self.model.validated = [self.num_timesteps, mean]  # type: ignore[attr-defined]  # saved with the model
                with atomic(self.folder / BEST) as temporary:
                    self.model.save(temporary)

    def _checkpoint(self) -> None:
        self.checkpoints.write(self.model)  # type: ignore[arg-type]


def _evaluate(this: Run, agent: DQN | LoadedPolicy, env: VecEnv, episodes: int) -> Evaluation:
    limit = this.recipe.max_episode_steps
    return evaluate(agent, env, episodes, max_episode_steps=limit, progress_bar=this.progress_bar)


# --- after a stage ------------------------------------------------------------------------------------------------


def _export(this: Run, stage: Stage, model: DQN, history: History) -> None:
    """Evaluate on the test seeds and write the stage's files, ``metrics.json`` last."""
    folder = this.directory / stage.name
    recipe = this.recipe
    with atomic(folder / "model.zip") as temporary:
        model.save(temporary)
    provenance = {
        "recipe": recipe.name,
        "env_id": recipe.env_id,
        "env_kwargs": this.env_kwargs(stage),
        "seed": this.seed,
        "stage": stage.name,
    }
    save_policy(model, folder / "policy.safetensors", provenance)
    env = this.env(stage, recipe.eval_episodes, TEST_SEEDS)
    # What is shared is what is measured: the policy as it comes back from its file.
    evaluation = _evaluate(this, load_policy(folder / "policy.safetensors", this.device), env, recipe.eval_episodes)
    env.close()
    network = spiking_network(model)
    lifs = {} if network is None else network.lif_layers
    write_json(
        folder / "metrics.json",
        {
            "stage": stage.name,
            "timesteps": stage.timesteps,
            "parent": stage.parent,
            "env_steps": history.extra_steps,
            "updates": history.extra_updates,
            "wall_seconds": round(history.wall_seconds, 1),
            "eval": evaluation.as_dict(PROTOCOL),
            "validation": history.validation,
            "curve": history.curve,
            **measurements(evaluation.activity),
            "threshold": {name: lif.threshold.item() for name, lif in lifs.items()},
            "leak": {name: lif.leak.item() for name, lif in lifs.items()},
            "versions": versions(),
            "hardware": hardware(this.device),
        },
    )
