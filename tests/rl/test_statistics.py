"""Statistics of observations: as ``VecNormalize`` applies them, and read without running a pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from snn_rl.rl.statistics import Statistics, read_vecnormalize

BOX = spaces.Box(-5, 5, (3,), np.float32)
WIDE = spaces.Box(-np.inf, np.inf, (2, 2), np.float64)
DICT = spaces.Dict(arm=BOX, camera=WIDE, gear=spaces.Discrete(3))


class Env(gymnasium.Env):
    action_space = spaces.Discrete(2)

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space = space

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        return self.observation_space.sample(), {}

    def step(self, _: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 1.0, False, False, {}


def normaliser(space: spaces.Space, **kwargs: Any) -> VecNormalize:
    """A VecNormalize that has seen some observations, and whose generators of random numbers are in use."""
    space.seed(0)
    env = VecNormalize(DummyVecEnv([lambda: Env(space)] * 2), **kwargs)
    env.reset()
    for _ in range(20):
        env.action_space.sample()
        env.step(np.zeros(2, dtype=int))
    return env


def same(got: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            same(got[key], wanted[key])
        return
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("space", "options"),
    [
        (BOX, {}),
        (BOX, {"clip_obs": 0.7, "epsilon": 0.1}),
        (WIDE, {}),
        (DICT, {"norm_obs_keys": ["arm", "camera"]}),
        (DICT, {"norm_obs_keys": ["camera"]}),
    ],
)
def test_it_normalises_as_vecnormalize_does(space: spaces.Space, options: dict[str, Any], tmp_path: Path) -> None:
    env = normaliser(space, **options)
    env.save(str(tmp_path / "saved.pkl"))
    observations = [space.sample() for _ in range(50)]
    batch: Any = (
        np.stack(observations) if space is not DICT else {k: np.stack([o[k] for o in observations]) for k in DICT}
    )
    wanted = env.normalize_obs(batch)
    for statistics in (Statistics.of(env), read_vecnormalize(tmp_path / "saved.pkl", space)):
        assert statistics is not None
        same(statistics.normalize(batch), wanted)
        if isinstance(statistics.mean, dict):
            assert list(statistics.mean) == options["norm_obs_keys"]


def test_it_is_a_copy() -> None:
    env = normaliser(BOX)
    statistics = Statistics.of(env)
    assert statistics is not None
    assert isinstance(statistics.mean, np.ndarray)
    before = statistics.mean.copy()
    for _ in range(5):
        env.step(np.zeros(2, dtype=int))
    env.obs_rms.mean += 1  # type: ignore[attr-defined]
    np.testing.assert_array_equal(statistics.mean, before)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickles_of_older_versions(protocol: int, tmp_path: Path) -> None:
    env = normaliser(WIDE)
    env.obs_rms.var = np.asfortranarray(env.obs_rms.var)  # type: ignore[attr-defined]
    env.clip_obs = np.float64(env.clip_obs)
    env.epsilon = np.float32(1e-3)
    raw = pickle.dumps(env, protocol=protocol)
    if protocol == 3:  # names end with a line there, so that they can be exchanged
        for new, old in ((b"cnumpy._core.", b"cnumpy.core."), (b"cgymnasium.spaces", b"cgym.spaces")):
            assert new in raw
            raw = raw.replace(new, old)
    (tmp_path / "old.pkl").write_bytes(raw)
    statistics = read_vecnormalize(tmp_path / "old.pkl", WIDE)
    assert statistics is not None
    same(statistics.mean, env.obs_rms.mean)  # type: ignore[attr-defined]
    same(statistics.var, env.obs_rms.var)  # type: ignore[attr-defined]
    assert (statistics.clip, statistics.epsilon) == (10.0, float(np.float32(1e-3)))


def test_observations_that_are_not_normalised(tmp_path: Path) -> None:
    env = normaliser(BOX, norm_obs=False)
    env.save(str(tmp_path / "saved.pkl"))
    assert Statistics.of(env) is None
    assert read_vecnormalize(tmp_path / "saved.pkl", BOX) is None


# --- planted pickles ----------------------------------------------------------------------------------------------


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path, how: Any = open) -> None:
        self.path, self.how = path, how

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.system, (f"touch {self.path}",)) if self.how is os.system else (open, (str(self.path), "w"))


def attributes() -> list[str]:
    return sorted(normaliser(DICT, norm_obs_keys=["arm"]).__getstate__())


def plant(env: VecNormalize, where: str, planted: Planted) -> Any:
    state = env.__dict__
    if where == "top":
        return planted
    if where == "beside":
        return [env, planted]
    if where == "key":
        state["extra"] = {("a", planted): 1}
    elif where == "list":
        state["extra"] = [[[planted]]]
    elif where == "mean":
        env.obs_rms["arm"].mean = planted  # type: ignore[index]
    elif where == "rms":
        env.obs_rms["arm"] = planted  # type: ignore[index]
    elif where == "count":
        env.obs_rms["arm"].count = planted  # type: ignore[index]
    elif where == "space":
        env.observation_space["arm"]._np_random = planted  # type: ignore[index]
    elif where == "object array":
        env.obs_rms["arm"].mean = np.array([planted, None], dtype=object)  # type: ignore[index]
    else:
        state[where] = planted
    return env


PLACES = ["top", "beside", "key", "list", "mean", "rms", "count", "space", "object array", *attributes()]


@pytest.mark.parametrize("how", [open, os.system])
@pytest.mark.parametrize("where", PLACES)
def test_a_planted_pickle_does_not_run(where: str, how: Any, tmp_path: Path) -> None:
    space = spaces.Dict(arm=spaces.Box(-5, 5, (3,), np.float32))
    mark, path = tmp_path / "mark", tmp_path / "saved.pkl"
    raw = pickle.dumps(plant(normaliser(space, norm_obs_keys=["arm"]), where, Planted(mark, how)))
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"it holds '(_?io\.open|(posix|nt)\.system)', which") as refusal:
        read_vecnormalize(path, space)
    assert "\n" not in str(refusal.value)
    assert not mark.exists()
    opened = pickle.loads(raw) if where == "top" else None  # it does run where pickles are
    if where == "top":
        assert mark.exists()
        if how is open:
            opened.close()


def test_the_classes_themselves_are_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    normaliser(BOX).save(str(tmp_path / "saved.pkl"))

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("a class of the pickle was called")

    monkeypatch.setattr(VecNormalize, "__setstate__", called)
    monkeypatch.setattr(spaces.Box, "__setstate__", called)
    monkeypatch.setattr(RunningMeanStd, "__init__", called)
    assert read_vecnormalize(tmp_path / "saved.pkl", BOX) is not None


@pytest.mark.parametrize("name", ["VecNormalize.__setstate__", "_sanity_checks", "pickle"])
def test_other_names_of_the_known_modules_are_refused(name: str, tmp_path: Path) -> None:
    module = "stable_baselines3.common.vec_env.vec_normalize"
    raw = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93."
    (tmp_path / "saved.pkl").write_bytes(raw)
    with pytest.raises(ValueError, match=f"it holds '{module}.{name}', which no VecNormalize does"):
        read_vecnormalize(tmp_path / "saved.pkl", BOX)


# --- bad input ----------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, space: spaces.Space = BOX, **changes: Any) -> Path:
    env = normaliser(space)
    for name, value in changes.items():
        if name in ("mean", "var"):
            setattr(env.obs_rms, name, value)
        else:
            setattr(env, name, value)
    env.save(str(tmp_path / "saved.pkl"))
    return tmp_path / "saved.pkl"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"var": np.array([1.0, -1.0, 1.0])}, "the variance must be >= 0, and > 0 with epsilon, got -1.0"),
        ({"var": np.zeros(3), "epsilon": 0.0}, "the variance must be >= 0, and > 0 with epsilon, got 0.0"),
        ({"mean": np.array([0.0, np.nan, 0.0])}, "mean and variance must be finite"),
        ({"var": np.array([1.0, np.inf, 1.0])}, "mean and variance must be finite"),
        ({"mean": np.zeros(4)}, r"must have one shape, got \(4,\) and \(3,\)"),
        ({"mean": np.array(["a", "b", "c"])}, "an array must hold numbers, got the type 'U1'"),
        ({"mean": [0.0, 0.0, 0.0]}, "it should hold an array, and holds a list"),
        ({"clip_obs": 0.0}, "clip must be finite and > 0, got 0.0"),
        ({"epsilon": -1.0}, "epsilon must be finite and >= 0, got -1.0"),
        ({"norm_obs": 1}, "norm_obs must be True or False"),
        ({"obs_rms": 3}, "it should hold a RunningMeanStd, and holds a int"),
    ],
)
def test_invalid_statistics(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as refusal:
        read_vecnormalize(path, BOX)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-5, 5, (4,)), r"of shape \(3,\), the observations of \(4,\)"),
        (spaces.Discrete(3), r"of shape \(3,\), the observations of \(\)"),
        (DICT, r"the statistics are of shape \(3,\), the observations are Dict"),
    ],
)
def test_statistics_of_other_observations(space: spaces.Space, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_vecnormalize(saved(tmp_path), space)


def test_statistics_of_a_dict_for_other_observations(tmp_path: Path) -> None:
    normaliser(DICT, norm_obs_keys=["arm", "camera"]).save(str(tmp_path / "saved.pkl"))
    with pytest.raises(
        ValueError, match=r"the statistics are of a Dict with \['arm', 'camera'\], the observations are Box"
    ):
        read_vecnormalize(tmp_path / "saved.pkl", BOX)
    with pytest.raises(ValueError, match=r"the statistics are of \['camera'\], which the observations lack"):
        read_vecnormalize(tmp_path / "saved.pkl", spaces.Dict(arm=BOX))
    with pytest.raises(
        ValueError, match=r"the statistics of 'camera' are of shape \(2, 2\), the observations of \(3,\)"
    ):
        read_vecnormalize(tmp_path / "saved.pkl", spaces.Dict(arm=BOX, camera=BOX))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not a VecNormalize that SB3 saved, or it is damaged"),
        (b"PK\x03\x04", "is not a VecNormalize that SB3 saved, or it is damaged"),
        (pickle.dumps({"mean": 0}), "it should hold a VecNormalize, and holds a dict"),
        (pickle.dumps(RunningMeanStd(shape=(3,))), "it should hold a VecNormalize, and holds a RunningMeanStd"),
    ],
)
def test_files_of_another_kind(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "saved.pkl").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_vecnormalize(tmp_path / "saved.pkl", BOX)


def test_a_file_that_is_missing_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of VecNormalize at"):
        read_vecnormalize(tmp_path / "saved.pkl", BOX)
    with (tmp_path / "saved.pkl").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="has 268,435,457 bytes; a saved VecNormalize has up to"):
        read_vecnormalize(tmp_path / "saved.pkl", BOX)


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    """Whatever byte is changed: a ValueError in one line, or statistics of the right shape."""
    path = saved(tmp_path)
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals, shapes = [], set()
    for i in range(400):
        if i % 4 == 0:
            damaged = raw[: rng.integers(len(raw))]
        else:
            mutable = bytearray(raw)
            mutable[rng.integers(len(raw))] = rng.integers(256)
            damaged = bytes(mutable)
        path.write_bytes(damaged)
        try:
            statistics = read_vecnormalize(path, BOX)
        except ValueError as error:
            refusals.append(str(error))
        else:
            shapes.add(None if statistics is None else np.shape(statistics.mean))
    assert len(refusals) > 150
    assert not [refusal for refusal in refusals if "\n" in refusal]
    assert shapes <= {None, (3,)}
