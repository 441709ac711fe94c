"""Environments by their id in gymnasium: the copies against gymnasium's own, and refusals in one line."""

from __future__ import annotations

import builtins
import pickle
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from snn_rl import Recipe
from snn_rl.rl.evaluation import is_monitored
from snn_rl.runs.registered import registered


def test_copies_are_those_of_gymnasium_with_their_seeds() -> None:
    """The observations and rewards of three copies, over some steps, against each environment stepped by itself."""
    env = registered("Pendulum-v1", {"g": 3.0, "max_episode_steps": 9})(3, seed=7, g=5.0)
    assert is_monitored(env)
    first = env.reset()
    assert isinstance(first, np.ndarray)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-2, 2, (5, 3, 1)).astype(np.float32)
    played = [env.step(action)[:2] for action in actions]
    for i in range(3):
        alone = gym.make("Pendulum-v1", g=5.0)
        np.testing.assert_array_equal(first[i], alone.reset(seed=7 + i)[0])
        for action, (observations, rewards) in zip(actions, played, strict=True):
            observation, reward, *_ = alone.step(action[i])
            np.testing.assert_array_equal(observations[i], observation)  # type: ignore[index]
            assert rewards[i] == np.float32(reward)
        alone.close()
    env.close()


def test_a_recipe_takes_it_and_a_worker_gets_it() -> None:
    make_env = pickle.loads(pickle.dumps(registered("CartPole-v1")))
    recipe = Recipe("pole", "CartPole-v1", make_env, env_kwargs={"sutton_barto_reward": True}, num_envs=4)
    env = recipe.build_env(2, 0, render_mode="rgb_array")
    assert env.get_attr("_sutton_barto_reward") == [True, True]
    assert env.render_mode == "rgb_array"
    env.close()
    with pytest.raises(ValueError, match=r"^env_kwargs must not hold num_envs or seed, .*'seed': 3"):
        recipe.build_env(2, 0, seed=3)


class Plain(gym.Env):
    """An environment that takes no render_mode."""

    observation_space = gym.spaces.Box(0, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, size: int = 1, *, walls: bool = False, **_: Any) -> None:
        if size < 1:
            raise RuntimeError(f"no maze\nof {size}")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}


class Strict(Plain):
    def __init__(self) -> None:
        super().__init__()


@pytest.fixture
def own_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym.envs.registration, "registry", gym.registry)
    for name, entry in (("Plain-v0", Plain), ("Strict-v0", Strict)):
        monkeypatch.setitem(gym.registry, name, gym.envs.registration.EnvSpec(name, entry_point=entry))


@pytest.mark.filterwarnings("ignore:.*The environment is being initialised with render_mode")
def test_no_render_mode_is_given_unless_it_is_wanted(own_ids: None) -> None:
    registered("Strict-v0")(1, seed=0).close()
    with pytest.raises(ValueError, match=r"^Strict-v0 does not take the argument 'render_mode'; it takes none$"):
        registered("Strict-v0")(1, seed=0, render_mode="rgb_array")


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("LunarLander-v9", "'LunarLander-v9'; similar ids: LunarLander-v3; if a package of yours registers it, write"),
        ("LunarLander-v2", "'LunarLander-v2'; similar ids: LunarLander-v3; "),
        ("lunarlander", "'lunarlander'; similar ids: LunarLander-v3; "),
        ("Pendulum", "'Pendulum'; similar ids: Pendulum-v1"),
        ("ALE/Pongg-v5", r"'ALE/Pongg-v5'; similar ids: ALE/Pong-v5"),
        ("Nothing like it", "'Nothing like it'; if a package of yours registers it, write MODULE:ID$"),
        ("", "''; if"),
    ],
)
def test_an_id_that_does_not_exist_is_refused_before_anything_is_built(env_id: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^gymnasium has no environment {message}"):
        registered(env_id)


@pytest.mark.parametrize("env_id", ["no_such_module:Maze-v0", ":Maze-v0", ".relative:Maze-v0", "no.such:Maze-v0"])
def test_a_module_that_is_not_there(env_id: str) -> None:
    with pytest.raises(ValueError, match=r"^no module '.*' in .*, nor installed, which should register Maze-v0$"):
        registered(env_id)


def test_a_module_registers_its_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maze_module.py").write_text(
        "import gymnasium\ngymnasium.register('Maze-v0', 'gymnasium.envs.classic_control:CartPoleEnv')"
    )
    (tmp_path / "broken_maze.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert registered("maze_module:Maze-v0")(2, seed=0).num_envs == 2
        with pytest.raises(ValueError, match=r"^gymnasium has no environment 'Maze-v1'; similar ids: Maze-v0$"):
            registered("maze_module:Maze-v1")
        with pytest.raises(ValueError, match=r"^the module broken_maze cannot be imported: ModuleNotFoundError: No"):
            registered("broken_maze:Maze-v0")
    finally:
        gym.registry.pop("Maze-v0", None)
        sys.modules.pop("maze_module", None)


@pytest.mark.parametrize(
    ("env_id", "module", "message"),
    [
        ("LunarLander-v3", "Box2D", "LunarLander-v3 needs Box2D: pip install 'gymnasium[box2d]'"),
        ("BipedalWalker-v3", "Box2D", "BipedalWalker-v3 needs Box2D: pip install 'gymnasium[box2d]'"),
        ("Hopper-v5", "mujoco", "Hopper-v5 needs MuJoCo: pip install 'gymnasium[mujoco]'"),
        ("phys2d/CartPole-v1", "jax", "phys2d/CartPole-v1 needs jax: pip install 'gymnasium[jax]'"),
        ("ALE/Pong-v5", "ale_py", "ALE/Pong-v5 needs ale-py: pip install ale-py"),
    ],
)
def test_a_missing_extra_is_named(env_id: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):  # as if nothing of it had been imported yet
        if name.split(".")[0] == module or name.startswith(("gymnasium.envs.box2d", "gymnasium.envs.mujoco")):
            monkeypatch.delitem(sys.modules, name)
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **settings: Any) -> Any:
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        registered(env_id)(1, seed=0)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        ("Pendulum-v1", {"G": 9.8}, "Pendulum-v1 does not take the argument 'G'; it takes g"),
        ("Pendulum-v1", {"id": "x"}, "Pendulum-v1 cannot be built with {'id': 'x'}: TypeError: .*"),
        ("Pendulum-v1", {"env_id": "x"}, "Pendulum-v1 does not take the argument 'env_id'; it takes g"),
        ("Plain-v0", {"size": "x"}, "Plain-v0 cannot be built with {'size': 'x'}: TypeError: '<' not supported .*"),
        ("Plain-v0", {"size": 0}, "Plain-v0 cannot be built with {'size': 0}: RuntimeError: no maze of 0"),
    ],
)
def test_arguments_that_an_environment_does_not_take(
    env_id: str, kwargs: dict[str, Any], message: str, own_ids: None
) -> None:
    for given, later in ((kwargs, {}), ({}, kwargs)):
        with pytest.raises(ValueError, match=f"^{message}$"):
            registered(env_id, given)(2, seed=0, **later)
