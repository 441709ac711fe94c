"""ONNX files in ONNX Runtime: the same actions as torch, frame after frame, and membranes that are passed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from envs.atari import make_atari
from envs.classic import make_cartpole
from snn_rl import SpikingDQN, SpikingNetwork, to_spiking
from snn_rl.rl import ConvExtractor
from snn_rl.share import write_onnx

FRAME = 36


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(
    model: onnxruntime.InferenceSession, observation: np.ndarray, carries: list[np.ndarray] | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    names = [i.name for i in model.get_inputs()]
    if carries is None:
        carries = [np.zeros((len(observation), *i.shape[1:]), dtype=np.float32) for i in model.get_inputs()[1:]]
    output, *carries = model.run(None, dict(zip(names, [observation, *carries], strict=True)))
    return output, carries


@pytest.mark.parametrize("timesteps", [1, 3])
def test_the_same_actions_over_20_episodes(timesteps: int, tmp_path: Path) -> None:
    env = make_cartpole(20, seed=0)
    kwargs = {"net_arch": [32, 16], "timesteps": timesteps}
    agent = SpikingDQN("MlpPolicy", env, policy_kwargs=kwargs, buffer_size=2_000, seed=3, device="cpu")
    obs = env.reset()
    assert isinstance(obs, np.ndarray)
    first, *_, last = (m for m in agent.q_net.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        first.weight.mul_(20)  # so that an untrained network spikes, and prefers no action everywhere
        last.weight.mul_(20)
        last.bias -= agent.q_net(torch.from_numpy(obs))[0].mean(0)
    write_onnx(agent.q_net.network, torch.from_numpy(obs), tmp_path / "policy.onnx")
    model = session(tmp_path / "policy.onnx")
    state, start, carries = None, np.ones(20, dtype=bool), None
    ended, acted = 0, []
    while ended < 20:
        actions, state = agent.predict(obs, state, start, deterministic=True)
        if carries is not None:
            carries = [np.where(start.reshape(-1, *[1] * (c.ndim - 1)), 0, c).astype(np.float32) for c in carries]
        q_values, carries = run(model, obs, carries)
        assert (q_values.argmax(1) == actions).all()
        for ours, theirs in zip(state, carries, strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
        acted.append(actions)
        obs, _, start, _ = env.step(actions)
        assert isinstance(obs, np.ndarray)
        ended += int(start.sum())
    assert 0.05 < np.mean(acted) < 0.95  # both actions were played
    assert [p.name for p in tmp_path.iterdir()] == ["policy.onnx"]


def test_images_are_bytes_as_the_environment_gives_them(tmp_path: Path) -> None:
    env = make_atari("pong", 4, seed=0, image_size=FRAME, frame_stack=2)
    extractor = {"convolutions": ((4, 4, 2), (8, 3, 2)), "features_dim": 16}
    kwargs = {"features_extractor_class": ConvExtractor, "features_extractor_kwargs": extractor, "net_arch": []}
    agent = SpikingDQN("CnnPolicy", env, policy_kwargs={**kwargs, "timesteps": 2}, buffer_size=100, device="cpu")
    obs = env.reset()
    write_onnx(agent.q_net.network, torch.from_numpy(obs), tmp_path / "policy.onnx", images=True)
    model = session(tmp_path / "policy.onnx")
    assert model.get_inputs()[0].type == "tensor(uint8)"
    q_values, _ = run(model, obs, None)
    with torch.no_grad():
        expected, _ = agent.q_net(torch.from_numpy(obs))
    np.testing.assert_allclose(q_values, expected.numpy(), rtol=1e-4, atol=1e-5)
    env.close()


def test_bytes_that_are_no_image_are_not_divided(tmp_path: Path) -> None:
    x = torch.randint(0, 256, (64, 3), dtype=torch.uint8)
    network = to_spiking(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), x.float(), timesteps=2)
    write_onnx(network, x, tmp_path / "a.onnx")
    out, _ = run(session(tmp_path / "a.onnx"), x.numpy(), None)
    np.testing.assert_allclose(out, network(x.float())[0].detach().numpy(), rtol=1e-4, atol=1e-4)


def net() -> tuple[SpikingNetwork, Tensor]:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    return to_spiking(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), x, timesteps=2), x


def test_inputs_are_named_and_the_batch_is_free(tmp_path: Path) -> None:
    network, x = net()
    write_onnx(network, x[:1], tmp_path / "a.onnx")
    model = session(tmp_path / "a.onnx")
    assert [i.name for i in model.get_inputs()] == ["observation", "carry__1"]
    assert [o.name for o in model.get_outputs()] == ["output", "new_carry__1"]
    for batch in (1, 2, 64):
        out, carries = run(model, x[:batch].numpy(), None)
        expected, state = network(x[:batch])
        np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-6)
        again, _ = run(model, x[:batch].numpy(), carries)
        np.testing.assert_allclose(again, network(x[:batch], state)[0].detach().numpy(), atol=1e-6)


OBSERVATIONS = {torch.float32: "tensor(float)", torch.float64: "tensor(double)", torch.float16: "tensor(float16)"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("observed", OBSERVATIONS)
def test_weights_of_any_precision_are_run_in_single(tmp_path: Path, dtype: torch.dtype, observed: torch.dtype) -> None:
    network, x = net()
    network, x = network.to(dtype), x.to(observed)
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    write_onnx(network, x, tmp_path / "a.onnx")
    model = session(tmp_path / "a.onnx")
    assert [i.type for i in model.get_inputs()] == [OBSERVATIONS[observed], "tensor(float)"]
    assert {o.type for o in model.get_outputs()} == {"tensor(float)"}
    out, carries = run(model, x.numpy(), None)
    again, _ = run(model, x.numpy(), carries)
    with torch.no_grad():  # double precision, of the same weights and observations
        exact = copy.deepcopy(network).double()
        expected, state = exact(x.double())
        np.testing.assert_allclose(out, expected.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(again, exact(x.double(), state)[0].numpy(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())
    assert {value.dtype for value in network.state_dict().values()} == {dtype}


def test_an_observation_of_another_shape_is_refused_and_nothing_written(tmp_path: Path) -> None:
    network, _ = net()
    with pytest.raises(ValueError, match=r"cannot take observations of shape \(4,\).*1x4 and 3x8"):
        write_onnx(network, torch.zeros(2, 4), tmp_path / "a.onnx")
    for shape in ((), (3,), (0, 3)):
        with pytest.raises(ValueError, match=r"must be a batch of observations, \(batch >= 1, ...\), got \("):
            write_onnx(network, torch.zeros(shape), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    network, x = net()
    network.train()
    write_onnx(network, x, tmp_path / "a.onnx")
    assert network.training


def test_parts_of_an_observation_that_go_different_ways(tmp_path: Path) -> None:
    class Combined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.hidden, self.out = nn.Conv2d(1, 4, 3), nn.Linear(19, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            image = torch.relu(self.conv(x[:, :16].unflatten(1, (1, 4, 4))))
            return self.out(torch.relu(self.hidden(torch.cat([image.flatten(1), x[:, 16:]], 1))))

    torch.manual_seed(0)
    x = torch.randn(40, 19)
    network = to_spiking(Combined(), x, timesteps=3)
    write_onnx(network, x[:4], tmp_path / "policy.onnx")
    model = session(tmp_path / "policy.onnx")
    state, carries = None, None
    for frame in x.split(4):
        out, state = network(frame, state)
        theirs, carries = run(model, frame.numpy(), carries)
        np.testing.assert_allclose(theirs, out.detach().numpy(), atol=1e-5)
