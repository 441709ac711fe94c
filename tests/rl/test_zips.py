"""Zips of SB3 and sb3-contrib: the agent in them acts as SB3's own, and nothing in them runs."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import ARS, QRDQN, TQC, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import Tensor, nn

from snn_rl import SpikingDQN
from snn_rl.rl import zips
from snn_rl.rl.zips import read_zip

VECTOR = spaces.Box(-2, 2, (2, 3), np.float32)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
DICT = spaces.Dict(camera=IMAGE, arm=spaces.Box(-1, 1, (3,), np.float32), gear=spaces.Discrete(3))
BOX = spaces.Box(np.float32([-1, -3]), np.float32([2, 0.5]))
MULTI = spaces.MultiDiscrete([3, 2, 4])
THREE = spaces.Discrete(3)


class Env(gymnasium.Env):
    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}


def build(
    algorithm: Any, observations: spaces.Space, actions: spaces.Space, policy: Any = "MlpPolicy", **kwargs: Any
) -> BaseAlgorithm:
    if algorithm is SpikingDQN:
        kwargs = {"buffer_size": 100} | kwargs
    elif algorithm in (DQN, QRDQN, SAC, TD3, DDPG, TQC):
        kwargs = {"buffer_size": 1, "learning_starts": 0} | kwargs
    elif algorithm is A2C:
        kwargs = {"n_steps": 8} | kwargs
    elif algorithm is not ARS:
        kwargs = {"n_steps": 8, "batch_size": 8} | kwargs
    model = algorithm(policy, Env(observations, actions), device="cpu", seed=0, **copy.deepcopy(kwargs))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # SB3 starts from biases of 0, and PPO from outputs near 0
        for parameter in model.policy.parameters():
            scale = 2 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def draw(space: spaces.Space, n: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: draw(subspace, n) for key, subspace in space.spaces.items()}
    space.seed(5)
    return np.stack([space.sample() for _ in range(n)])


def saved(model: BaseAlgorithm, tmp_path: Path) -> Path:
    model.save(tmp_path / "agent.zip")
    return tmp_path / "agent.zip"


def check(model: BaseAlgorithm, path: Path, algo: str, observations: spaces.Space, wanted: str | None = None) -> None:
    agent = read_zip(path, observations, model.action_space, wanted)
    assert agent.algo == algo
    assert agent.action_space == model.action_space
    assert agent.observation_space == model.observation_space
    assert not agent.policy.training
    state = model.policy.state_dict()
    read = agent.policy.state_dict()
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    batch = draw(observations, 30)
    np.testing.assert_array_equal(
        agent.predict(batch, deterministic=True)[0], model.predict(batch, deterministic=True)[0]
    )


# Whether the file says which of PPO, A2C and TRPO it is: by the options of the algorithm in its data.
CASES: list[tuple[str, Any, spaces.Space, spaces.Space, str, dict[str, Any]]] = [
    ("dqn", DQN, VECTOR, THREE, "MlpPolicy", {"policy_kwargs": {"net_arch": [12, 8]}}),
    ("dqn", DQN, spaces.Discrete(4), THREE, "MlpPolicy", {}),
    ("dqn", DQN, IMAGE, THREE, "CnnPolicy", {"policy_kwargs": {"features_extractor_kwargs": {"features_dim": 9}}}),
    ("dqn", DQN, DICT, THREE, "MultiInputPolicy", {}),
    ("qrdqn", QRDQN, VECTOR, THREE, "MlpPolicy", {"policy_kwargs": {"n_quantiles": 7}}),
    ("qrdqn", QRDQN, IMAGE, THREE, "CnnPolicy", {"policy_kwargs": {"n_quantiles": 7}}),
    ("ppo", PPO, VECTOR, THREE, "MlpPolicy", {}),
    ("ppo", PPO, VECTOR, MULTI, "MlpPolicy", {}),
    ("ppo", PPO, VECTOR, spaces.MultiBinary(3), "MlpPolicy", {}),
    ("ppo", PPO, spaces.MultiBinary(4), BOX, "MlpPolicy", {}),
    ("ppo", PPO, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"net_arch": {"pi": [9], "vf": [7, 6]}}}),
    ("ppo", PPO, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"net_arch": []}}),
    ("ppo", PPO, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"activation_fn": nn.ReLU}}),
    ("ppo", PPO, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"activation_fn": nn.ELU}}),
    ("ppo", PPO, VECTOR, BOX, "MlpPolicy", {"use_sde": True}),
    ("ppo", PPO, VECTOR, BOX, "MlpPolicy", {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    ("ppo", PPO, VECTOR, BOX, "MlpPolicy", {"use_sde": True, "policy_kwargs": {"full_std": False}}),
    ("ppo", PPO, IMAGE, BOX, "CnnPolicy", {"policy_kwargs": {"share_features_extractor": False, "net_arch": [8]}}),
    ("ppo", PPO, IMAGE, BOX, "CnnPolicy", {"policy_kwargs": {"normalize_images": False}}),
    (
        "ppo",
        PPO,
        DICT,
        BOX,
        "MultiInputPolicy",
        {"policy_kwargs": {"features_extractor_kwargs": {"cnn_output_dim": 5}}},
    ),
    ("a2c", A2C, VECTOR, BOX, "MlpPolicy", {}),
    ("trpo", TRPO, VECTOR, BOX, "MlpPolicy", {}),
    ("recurrentppo", RecurrentPPO, VECTOR, BOX, "MlpLstmPolicy", {"policy_kwargs": {"lstm_hidden_size": 6}}),
    (
        "recurrentppo",
        RecurrentPPO,
        VECTOR,
        THREE,
        "MlpLstmPolicy",
        {"policy_kwargs": {"n_lstm_layers": 2, "lstm_hidden_size": 5, "enable_critic_lstm": False}},
    ),
    (
        "recurrentppo",
        RecurrentPPO,
        IMAGE,
        THREE,
        "CnnLstmPolicy",
        {"policy_kwargs": {"shared_lstm": True, "lstm_hidden_size": 5, "enable_critic_lstm": False}},
    ),
    ("sac", SAC, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"net_arch": {"pi": [9], "qf": [7, 6]}}}),
    ("sac", SAC, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"net_arch": [], "n_critics": 3}}),
    ("sac", SAC, VECTOR, BOX, "MlpPolicy", {"use_sde": True, "policy_kwargs": {"activation_fn": nn.Tanh}}),
    ("sac", SAC, VECTOR, BOX, "MlpPolicy", {"use_sde": True, "policy_kwargs": {"clip_mean": 0.4}}),
    ("sac", SAC, VECTOR, BOX, "MlpPolicy", {"use_sde": True, "policy_kwargs": {"clip_mean": 0.0}}),
    ("sac", SAC, IMAGE, BOX, "CnnPolicy", {"policy_kwargs": {"share_features_extractor": True}}),
    ("tqc", TQC, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"n_quantiles": 7, "n_critics": 3}}),
    ("tqc", TQC, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"n_quantiles": 1}, "top_quantiles_to_drop_per_net": 0}),
    ("tqc", TQC, VECTOR, BOX, "MlpPolicy", {"use_sde": True}),
    ("td3", TD3, VECTOR, BOX, "MlpPolicy", {}),
    ("td3", TD3, IMAGE, BOX, "CnnPolicy", {"policy_kwargs": {"net_arch": [8]}}),
    ("ddpg", DDPG, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"net_arch": [9]}}),
    ("ars", ARS, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"net_arch": [6]}}),
    ("ars", ARS, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"net_arch": []}}),
    ("ars", ARS, VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"squash_output": False, "with_bias": False}}),
    ("ars", ARS, VECTOR, BOX, "LinearPolicy", {}),
    ("ars", ARS, VECTOR, BOX, "LinearPolicy", {"policy_kwargs": {"with_bias": True, "squash_output": True}}),
    ("ars", ARS, VECTOR, THREE, "LinearPolicy", {}),
]


@pytest.mark.parametrize(("algo", "algorithm", "observations", "actions", "policy", "options"), CASES)
def test_an_agent_acts_as_sb3s_own(
    algo: str,
    algorithm: Any,
    observations: spaces.Space,
    actions: spaces.Space,
    policy: str,
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    model = build(algorithm, observations, actions, policy, **options)
    check(model, saved(model, tmp_path), algo, observations)


def test_what_the_user_calls_it(tmp_path: Path) -> None:
    model = build(PPO, VECTOR, BOX)
    path = saved(model, tmp_path)
    check(model, path, "a2c", VECTOR, "a2c")
    check(model, path, "trpo", VECTOR, "trpo")
    for algo in ("sac", "dqn", "recurrentppo"):
        with pytest.raises(ValueError, match=rf"it is an agent of ppo or a2c or trpo, not of {algo}"):
            read_zip(path, VECTOR, BOX, algo)
    with pytest.raises(ValueError, match=r"algo must be one of a2c, ars, .* got 'vpg'"):
        read_zip(path, VECTOR, BOX, "vpg")
    model = build(TQC, VECTOR, BOX)
    with pytest.raises(ValueError, match="it is an agent of tqc, not of sac"):
        read_zip(saved(model, tmp_path), VECTOR, BOX, "sac")


def test_a_recurrent_agent_over_frames(tmp_path: Path) -> None:
    model = build(RecurrentPPO, VECTOR, BOX, "MlpLstmPolicy")
    agent = read_zip(saved(model, tmp_path), VECTOR, BOX)
    ours, theirs = None, None
    for frame in draw(VECTOR, 10)[:, None]:
        actions, ours = agent.predict(frame, ours, deterministic=True)
        wanted, theirs = model.predict(frame, theirs, deterministic=True)
        np.testing.assert_array_equal(actions, wanted)


# --- changed and older files --------------------------------------------------------------------------------------


def change(
    path: Path,
    data: Callable[[dict[str, Any]], Any] | None = None,
    weights: Callable[[dict[str, Tensor]], Any] | None = None,
    **save_options: Any,
) -> None:
    """Rewrite members of a zip: ``data`` and ``weights`` change what they get, or return what takes its place."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    if data is not None:
        plain = json.loads(members["data"])
        changed = data(plain)
        members["data"] = json.dumps(plain if changed is None else changed).encode()
    if weights is not None:
        state = torch.load(io.BytesIO(members["policy.pth"]), weights_only=True)
        changed = weights(state)
        buffer = io.BytesIO()
        torch.save(state if changed is None else changed, buffer, **save_options)
        members["policy.pth"] = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_zips_of_gym_and_of_an_older_python(tmp_path: Path) -> None:
    """Pickles that cannot be read, spaces of gym, no version file, weights as PyTorch stored them before 1.6."""
    model = build(SAC, VECTOR, BOX, policy_kwargs={"activation_fn": nn.Tanh})
    path = saved(model, tmp_path)

    def older(data: dict[str, Any]) -> None:
        for value in data.values():
            if isinstance(value, dict) and ":serialized:" in value:
                value[":serialized:"] = base64.b64encode(b"\x80\x05cno_such_module\nThing\n.").decode()
        for name in ("observation_space", "action_space"):
            data[name][":type:"] = data[name][":type:"].replace("gymnasium", "gym")
            data[name]["shape"] = data[name].pop("_shape")

    change(path, older, lambda state: None, _use_new_zipfile_serialization=False)
    check(model, path, "sac", VECTOR)


def test_an_extractor_that_was_stored_once(tmp_path: Path) -> None:
    model = build(PPO, IMAGE, THREE, "CnnPolicy")
    path = saved(model, tmp_path)

    def once(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith(("pi_features", "vf_features"))]:
            del state[name]

    change(path, weights=once)
    check(model, path, "ppo", IMAGE)


def test_layers_that_policy_and_value_share(tmp_path: Path) -> None:
    """As before SB3 1.8: ``net_arch=[12, dict(pi=[8], vf=[7])]``."""
    model = build(PPO, VECTOR, BOX, policy_kwargs={"net_arch": {"pi": [12, 8], "vf": [12, 7]}})
    policy: Any = model.policy
    policy.mlp_extractor.value_net[0].load_state_dict(policy.mlp_extractor.policy_net[0].state_dict())
    path = saved(model, tmp_path)

    def shared(state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {"policy_net.0": "shared_net.0", "policy_net.2": "policy_net.0", "value_net.2": "value_net.0"}
        old = {}
        for name, weight in state.items():
            head, _, parameter = name.removeprefix("mlp_extractor.").rpartition(".")
            if not name.startswith("mlp_extractor."):
                old[name] = weight
            elif head != "value_net.0":
                old[f"mlp_extractor.{names[head]}.{parameter}"] = weight
        return old

    change(path, weights=shared)
    check(model, path, "ppo", VECTOR)


# --- nothing in it runs -------------------------------------------------------------------------------------------


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path, how: Any) -> None:
        self.path, self.how = path, how

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.system, (f"touch {self.path}",)) if self.how is os.system else (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", [os.system, os.mkdir])
def test_planted_pickles_in_data_do_not_run(how: Any, tmp_path: Path) -> None:
    model = build(PPO, VECTOR, BOX, policy_kwargs={"activation_fn": nn.ReLU})
    path, mark = saved(model, tmp_path), tmp_path / "mark"
    planted = base64.b64encode(cloudpickle.dumps(Planted(mark, how))).decode()
    with zipfile.ZipFile(path) as file:
        names = list(json.loads(file.read("data")))
    fields = []
    for name in names:

        def put(data: dict[str, Any], name: str = name) -> None:
            value = data[name]
            if isinstance(value, dict):
                value[":serialized:"] = planted
            else:
                data[name] = {":type:": "<class 'int'>", ":serialized:": planted}
            fields.append(name)

        saved(model, tmp_path)
        change(path, put)
        check(model, path, "ppo", VECTOR)
        assert not mark.exists(), name
    assert {"policy_class", "policy_kwargs", "observation_space", "action_space", "learning_rate", "seed"} <= set(
        fields
    )
    pickle.loads(base64.b64decode(planted))  # it does run where pickles are
    assert mark.exists()


@pytest.mark.parametrize("how", [os.system, os.mkdir])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["top", "name", "weight", "beside"])
def test_a_planted_pickle_among_the_weights_does_not_run(where: str, legacy: bool, how: Any, tmp_path: Path) -> None:
    model = build(PPO, VECTOR, BOX)
    path, mark = saved(model, tmp_path), tmp_path / "mark"
    planted = Planted(mark, how)

    def put(state: dict[Any, Any]) -> Any:
        if where == "top":
            return planted
        if where == "name":
            state[planted] = torch.zeros(1)
        elif where == "weight":
            state["action_net.bias"] = planted
        else:
            state["nested"] = {"list": [planted]}
        return None

    change(path, weights=put, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"its policy.pth is damaged, or holds more than weights") as refusal:
        read_zip(path, VECTOR, BOX)
    assert "\n" not in str(refusal.value)
    assert not mark.exists()


def test_the_other_members_are_not_read(tmp_path: Path) -> None:
    model = build(PPO, VECTOR, BOX)
    path = saved(model, tmp_path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in ("data", "policy.pth")}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
        for name in ("pytorch_variables.pth", "policy.optimizer.pth", "system_info.txt", "../../escaped"):
            file.writestr(name, b"no pickle")
    check(model, path, "ppo", VECTOR)
    assert [member.name for member in tmp_path.iterdir()] == ["agent.zip"]


# --- bad input ----------------------------------------------------------------------------------------------------


def refused(path: Path, message: str, observations: spaces.Space = VECTOR, actions: spaces.Space = BOX) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_zip(path, observations, actions)
    text = str(refusal.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()


def test_files_that_are_no_agents(tmp_path: Path) -> None:
    path = saved(build(PPO, VECTOR, BOX), tmp_path)
    raw = path.read_bytes()
    refused(tmp_path / "other.zip", "there is no such file")
    refused(tmp_path, "is a folder; give the zip in it")
    for content in (b"", b"PK\x03\x04", raw[: len(raw) // 2], raw[:-30], b"hello" * 100):
        path.write_bytes(content)  # without its own directory, it may look like the zip inside it
        refused(path, "it is not a zip, or it is damaged|there is no data in it")
    for missing in ("data", "policy.pth"):
        path.write_bytes(raw)
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            members = {name: file.read(name) for name in file.namelist() if name != missing}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        refused(path, f"it is not an agent that SB3 saved: there is no {missing} in it")


def test_members_that_are_damaged(tmp_path: Path) -> None:
    model = build(PPO, VECTOR, BOX)
    path = saved(model, tmp_path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}

    def put(name: str, content: bytes) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for member, original in (members | {name: content}).items():
                file.writestr(member, original)

    weights = members["policy.pth"]
    undecodable = b"\x80\x02X\x01\x00\x00\x00\xff."
    for content in (b"", b"\x80\x02", weights[: len(weights) // 2], weights[:40], b"\x80\x02}q\x00.", undecodable):
        put("policy.pth", content)
        refused(path, r"its policy\.pth (is damaged, or holds more than weights|must hold named weights)")
    for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe"):
        put("data", content)
        refused(path, "its data is not JSON")
    put("data", b"[]")
    refused(path, "its data must be a JSON object, got list")
    put("data", b"{}")
    refused(path, "its data do not name a policy class")


def _nan(state: dict[str, Tensor]) -> None:
    state["action_net.bias"][1] = torch.nan


def _list(state: dict[str, Any]) -> Any:
    return [1]


def _number(state: dict[str, Any]) -> None:
    state["action_net.bias"] = 3


def _integers(state: dict[str, Tensor]) -> None:
    state["action_net.bias"] = torch.zeros(2, dtype=torch.int64)


def _sparse(state: dict[str, Tensor]) -> None:
    state["action_net.weight"] = state["action_net.weight"].to_sparse()


def _meta(state: dict[str, Tensor]) -> None:
    state["action_net.weight"] = state["action_net.weight"].to("meta")


def _large(state: dict[str, Tensor]) -> None:
    state["action_net.bias"] = state["action_net.bias"].double() * 1e300


def _missing(state: dict[str, Tensor]) -> None:
    del state["mlp_extractor.policy_net.2.bias"]


def _extra(state: dict[str, Tensor]) -> None:
    state["mlp_extractor.policy_net.1.weight"] = torch.ones(64)


def _reshaped(state: dict[str, Tensor]) -> None:
    state["value_net.weight"] = torch.zeros(1, 63)


def _expanded(state: dict[str, Tensor]) -> None:  # a few bytes in the file
    state["mlp_extractor.value_net.2.weight"] = torch.zeros(1, 1).expand(2**20, 2**20)


def _lying(state: dict[str, Tensor]) -> None:  # 3 MB in the file, 4 TB in the network that these sizes describe
    for name in ("policy_net.0", "policy_net.2"):
        state[f"mlp_extractor.{name}.weight"] = torch.zeros(10**6, 6)
        state[f"mlp_extractor.{name}.bias"] = torch.zeros(10**6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (_nan, "action_net.bias must hold finite numbers"),
        (_large, "action_net.bias must hold finite numbers"),
        (_list, r"its policy\.pth must hold named weights, got list"),
        (_number, r"its policy\.pth must hold named weights, got int at 'action_net.bias'"),
        (_integers, "its action_net.bias must be a dense tensor of floats, got torch.int64"),
        (_sparse, "its action_net.weight must be a dense tensor of floats"),
        (_meta, "its action_net.weight must be a dense tensor of floats"),
        (_missing, r"its weights do not fit its description: \['mlp_extractor.policy_net.2.bias'\]"),
        (_extra, r"its weights do not fit its description: \['mlp_extractor.policy_net.1.weight'\]"),
        (_reshaped, r"value_net.weight has shape \(1, 63\) instead of \(1, 64\)"),
        (_expanded, r"its weights have 4,398,\d{3},\d{3},\d{3} bytes; at most 2,147,483,648 are read"),
        (_lying, r"has shape \(1000000, 6\) instead of \(1000000, 1000000\)"),
    ],
)
def test_weights_that_do_not_make_an_agent(weights: Any, message: str, tmp_path: Path) -> None:
    path = saved(build(PPO, VECTOR, BOX), tmp_path)
    change(path, weights=weights)
    refused(path, message)


def test_what_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(build(PPO, VECTOR, BOX), tmp_path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 2_000_000)
    members["policy.pth"] = inner.getvalue()
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    monkeypatch.setattr(zips, "MAX_BYTES", 1_000_000)
    refused(path, "its policy.pth unpacks to 2,000,000 bytes; at most 1,000,000 are read")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data", members["data"])
        file.writestr("policy.pth", b"\0" * 2_000_000)
    refused(path, "its policy.pth has 2,000,000 bytes; at most 1,000,000 are read")


class Own(BaseFeaturesExtractor):
    def __init__(self, space: spaces.Space) -> None:
        super().__init__(space, 6)

    def forward(self, observations: Tensor) -> Tensor:
        return observations.flatten(1) ** 2


class OwnPolicy(ActorCriticPolicy):
    pass


class OwnActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**2


@pytest.mark.parametrize(
    ("algorithm", "actions", "policy", "policy_kwargs", "message"),
    [
        (
            PPO,
            BOX,
            "MlpPolicy",
            {"features_extractor_class": Own},
            r"its features extractor is \"<class '.*Own'>\", whose",
        ),
        (PPO, BOX, OwnPolicy, {}, r"its policy class is .*test_zips.*, whose code a zip does not hold; known are"),
        (
            PPO,
            BOX,
            "MlpPolicy",
            {"activation_fn": OwnActivation},
            r"its activation is \"<class '.*OwnActivation'>\"; known",
        ),
        (PPO, BOX, "MlpPolicy", {"activation_fn": nn.PReLU}, r"its activation is .*PReLU'>\"; known are CELU, ELU"),
        (MaskablePPO, THREE, "MlpPolicy", {}, r"its policy class is sb3_contrib.common.maskable.policies.Maskable"),
        (SpikingDQN, THREE, "MlpPolicy", {}, "it is a spiking agent already; load it with SpikingDQN.load"),
        (RecurrentPPO, BOX, "MlpLstmPolicy", {"lstm_kwargs": {"bias": False}}, "its LSTM has options of its own"),
    ],
)
def test_agents_whose_computation_is_unknown(
    algorithm: Any, actions: spaces.Space, policy: Any, policy_kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(build(algorithm, VECTOR, actions, policy, policy_kwargs=policy_kwargs), tmp_path)
    refused(path, message, actions=actions)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"normalize_images": "no"}, "its normalize_images must be true or false, got 'no'"),
        ({"squash_output": 1}, "its squash_output must be true or false, got 1"),
        ({"activation_fn": "<class 'torch.nn.modules.activation.Relu\x1b'>"}, r"its activation is .*Relu.x1b'>"),
    ],
)
def test_plain_fields_of_a_wrong_kind(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = saved(build(PPO, VECTOR, BOX, use_sde=True), tmp_path)
    change(path, lambda data: data["policy_kwargs"].update(kwargs))
    refused(path, message)


def test_weights_of_another_algorithm_than_the_class(tmp_path: Path) -> None:
    path, other = saved(build(PPO, VECTOR, BOX), tmp_path), tmp_path / "other.zip"
    build(SAC, VECTOR, BOX).save(other)
    with zipfile.ZipFile(other) as file:
        state = torch.load(io.BytesIO(file.read("policy.pth")), weights_only=True)
    change(path, weights=lambda _: state)
    refused(path, "its weights are those of sac, but its policy class is of stable_baselines3.common.policies")
    change(path, weights=lambda _: {"weight": torch.zeros(3)})
    refused(path, r"its weights are those of no known algorithm: \['weight'\]")


@pytest.mark.parametrize(
    ("algorithm", "observations", "actions", "policy", "ours", "message"),
    [
        (
            PPO,
            VECTOR,
            BOX,
            "MlpPolicy",
            (spaces.Box(-1, 1, (4,)), BOX),
            r"shape \(2, 3\), the environment's have shape \(4,\)",
        ),
        (
            SAC,
            VECTOR,
            BOX,
            "MlpPolicy",
            (spaces.Box(-1, 1, (4,)), BOX),
            r"shape \(2, 3\), the environment's have shape \(4,\)",
        ),
        (DQN, VECTOR, THREE, "MlpPolicy", (spaces.Discrete(6), THREE), r"are Box of shape \(2, 3\), .* Discrete\(6\)"),
        (
            ARS,
            VECTOR,
            THREE,
            "MlpPolicy",
            (spaces.Box(-1, 1, (9,)), THREE),
            r"shape \(2, 3\), the environment's have shape \(9,\)",
        ),
        (
            DQN,
            IMAGE,
            THREE,
            "CnnPolicy",
            (spaces.Box(0, 255, (3, 40, 48), np.uint8), THREE),
            r"shape \(3, 36, 40\), .* \(3, 40, 48\)",
        ),
        (
            DQN,
            IMAGE,
            THREE,
            "CnnPolicy",
            (spaces.Box(0, 255, (1, 36, 40), np.uint8), THREE),
            r"shape \(3, 36, 40\), .* \(1, 36, 40\)",
        ),
        (DQN, IMAGE, THREE, "CnnPolicy", (spaces.Box(0, 1, (5,)), THREE), r"shape \(3, 36, 40\), .* \(5,\)"),
        (DQN, DICT, THREE, "MultiInputPolicy", (VECTOR, THREE), "its observations are Dict, the environment's Box"),
        (
            DQN,
            VECTOR,
            THREE,
            "MlpPolicy",
            (DICT, THREE),
            r"its observations are Box of shape \(2, 3\), the environment's Dict",
        ),
        (
            DQN,
            DICT,
            THREE,
            "MultiInputPolicy",
            (spaces.Dict(arm=VECTOR), THREE),
            "its weights do not fit its description",
        ),
        (
            RecurrentPPO,
            VECTOR,
            BOX,
            "MlpLstmPolicy",
            (spaces.Box(-1, 1, (4,)), BOX),
            r"shape \(2, 3\), .* shape \(4,\)",
        ),
        (
            DQN,
            VECTOR,
            THREE,
            "MlpPolicy",
            (VECTOR, spaces.Discrete(4)),
            r"its actions are Discrete\(3\) .* Discrete\(4\)",
        ),
        (
            QRDQN,
            VECTOR,
            THREE,
            "MlpPolicy",
            (VECTOR, spaces.Discrete(4)),
            r"its actions are Discrete\(3\) .* Discrete\(4\)",
        ),
        (
            QRDQN,
            VECTOR,
            spaces.Discrete(4),
            "MlpPolicy",
            (VECTOR, spaces.Discrete(2)),
            r"Discrete\(4\) .* Discrete\(2\)",
        ),
        (
            PPO,
            VECTOR,
            THREE,
            "MlpPolicy",
            (VECTOR, spaces.Discrete(4)),
            r"Discrete\(3\) .*, the environment's Discrete\(4\)",
        ),
        (PPO, VECTOR, THREE, "MlpPolicy", (VECTOR, BOX), r"its actions are Discrete\(3\), the environment's Box"),
        (
            PPO,
            VECTOR,
            BOX,
            "MlpPolicy",
            (VECTOR, spaces.Discrete(2)),
            r"its actions are Box of shape \(2,\), .* Discrete\(2\)",
        ),
        (
            PPO,
            VECTOR,
            MULTI,
            "MlpPolicy",
            (VECTOR, spaces.Discrete(9)),
            r"its actions are MultiDiscrete .* Discrete\(9\)",
        ),
        (
            PPO,
            VECTOR,
            spaces.MultiBinary(3),
            "MlpPolicy",
            (VECTOR, THREE),
            r"its actions are MultiBinary .* Discrete\(3\)",
        ),
        (
            SAC,
            VECTOR,
            BOX,
            "MlpPolicy",
            (VECTOR, spaces.Box(-1, 1, (3,))),
            r"its actions are Box of shape \(2,\) .* \(3,\)",
        ),
        (
            SAC,
            VECTOR,
            BOX,
            "MlpPolicy",
            (VECTOR, spaces.Box(-1, 1, (2,))),
            r"the low of its actions is \[-1.0, -3.0\], the env",
        ),
        (
            SAC,
            VECTOR,
            BOX,
            "MlpPolicy",
            (VECTOR, THREE),
            r"its actions are Box of shape \(2,\), the environment's Discrete\(3\)",
        ),
        (SAC, VECTOR, BOX, "MlpPolicy", (VECTOR, spaces.Box(-np.inf, 1, (2,))), "actions need finite bounds"),
    ],
)
def test_spaces_of_another_environment(
    algorithm: Any,
    observations: spaces.Space,
    actions: spaces.Space,
    policy: str,
    ours: tuple[spaces.Space, spaces.Space],
    message: str,
    tmp_path: Path,
) -> None:
    path = saved(build(algorithm, observations, actions, policy), tmp_path)
    refused(path, message, *ours)


def test_parts_of_observations_in_another_order(tmp_path: Path) -> None:
    """The weights fit, but would be applied to other parts."""
    parts = {"left": spaces.Box(-1, 1, (3,)), "right": spaces.Box(-1, 1, (3,))}
    observations = spaces.Dict(OrderedDict(parts))
    path = saved(build(PPO, observations, BOX, "MultiInputPolicy"), tmp_path)
    reverse = spaces.Dict(OrderedDict(reversed(list(parts.items()))))
    refused(path, r"of \['left', 'right'\] in this order, the environment's of \['right', 'left'\]", reverse)
    assert read_zip(path, observations, BOX).algo == "ppo"


def test_a_file_without_a_description_of_its_spaces(tmp_path: Path) -> None:
    path = saved(build(PPO, VECTOR, THREE), tmp_path)

    def plain(data: dict[str, Any]) -> None:
        del data["observation_space"], data["action_space"]

    change(path, plain)
    assert read_zip(path, VECTOR, THREE).algo == "ppo"
    refused(
        path, r"its observations have 6 numbers, the environment's have shape \(4,\)", spaces.Box(-1, 1, (4,)), THREE
    )
    refused(path, r"its actions are .*\(3 outputs\), the environment's Discrete\(4\)", VECTOR, spaces.Discrete(4))
    refused(path, r"its actions are Discrete, the environment's Box", VECTOR, BOX)


@pytest.mark.parametrize(("algorithm", "actions"), [(QRDQN, THREE), (TQC, BOX), (ARS, BOX), (RecurrentPPO, BOX)])
def test_without_sb3_contrib(
    algorithm: Any, actions: spaces.Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = "MlpLstmPolicy" if algorithm is RecurrentPPO else "MlpPolicy"
    path = saved(build(algorithm, VECTOR, actions, policy), tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sb3_contrib"]:
        monkeypatch.setitem(sys.modules, name, None)
    refused(path, "need sb3-contrib: pip install sb3-contrib", actions=actions)


def test_trpo_does_not_need_sb3_contrib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(TRPO, VECTOR, BOX)
    path = saved(model, tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sb3_contrib"]:
        monkeypatch.setitem(sys.modules, name, None)
    check(model, path, "trpo", VECTOR)


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    """Whatever byte is changed: a ValueError in one line, or an agent."""
    path = saved(build(A2C, VECTOR, THREE, policy_kwargs={"net_arch": [3]}), tmp_path)
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals = []
    for i in range(200):
        mutable = bytearray(raw[: rng.integers(len(raw))] if i % 8 == 0 else raw)
        if mutable:
            mutable[rng.integers(len(mutable))] = rng.integers(256)
        path.write_bytes(bytes(mutable))
        try:
            read_zip(path, VECTOR, THREE)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(refusal.isprintable() for refusal in refusals)


def test_flatten_by_its_name(tmp_path: Path) -> None:
    model = build(PPO, VECTOR, BOX, policy_kwargs={"features_extractor_class": FlattenExtractor})
    check(model, saved(model, tmp_path), "ppo", VECTOR)
