"""NIR files: back again unchanged, and run by snnTorch and Norse spike for spike."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import snntorch
import torch
from torch import Tensor, nn

from envs.atari import make_atari
from snn_rl import SpikingNetwork, to_spiking
from snn_rl.share import from_nir, read_nir, to_nir, write_nir
from snn_rl.share.nir import DT

warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

SIZE = 24


@pytest.fixture(scope="module")
def play() -> Tensor:
    """1,000 observations of Pong, (1000, 2, SIZE, SIZE), in [0, 1]."""
    env = make_atari("pong", 8, seed=0, image_size=SIZE, frame_stack=2)
    draw = np.random.default_rng(0)
    observations = [env.reset()]
    for _ in range(124):
        observations.append(env.step(draw.integers(6, size=8))[0])
    env.close()
    return torch.from_numpy(np.concatenate(observations)).float() / 255


def network(play: Tensor, timesteps: int = 1, leak: float = 0.75, **kwargs: Any) -> SpikingNetwork:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(2, 6, 4, 2, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 32),
        nn.ReLU(),
        nn.Linear(32, 6),
    )
    return to_spiking(ann, play, 80.0, timesteps, leak=leak, **kwargs)


def spikes_of(net: nn.Module, kinds: type | tuple[type, ...]) -> tuple[list[list[Tensor]], list[Any]]:
    """For each neuron layer the spikes of each call to come, and the hooks' handles."""
    layers = [m for m in net.modules() if isinstance(m, kinds)]
    seen: list[list[Tensor]] = [[] for _ in layers]

    def keep(into: list[Tensor]) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            into.append((out[0] if isinstance(out, tuple) else out).detach().flatten())

        return hook

    return seen, [layer.register_forward_hook(keep(into)) for layer, into in zip(layers, seen, strict=True)]


def ours(net: SpikingNetwork, frames: Tensor) -> tuple[list[list[Tensor]], list[Tensor]]:
    seen, handles = spikes_of(net, type(next(iter(net.lif_layers.values()))))
    with torch.no_grad():
        outputs = [net(frame[None])[0][0] for frame in frames]
    for handle in handles:
        handle.remove()
    return seen, outputs


def assert_same(a: tuple[list[list[Tensor]], list[Tensor]], b: tuple[list[list[Tensor]], list[Tensor]]) -> None:
    (spikes_a, out_a), (spikes_b, out_b) = a, b
    assert len(spikes_a) == len(spikes_b) == 3
    for layer_a, layer_b in zip(spikes_a, spikes_b, strict=True):
        stacked = torch.stack(layer_a)
        assert 0.02 < stacked.mean() < 0.9  # there is something to compare
        assert torch.equal(stacked, torch.stack(layer_b).to(stacked.dtype))
    torch.testing.assert_close(torch.stack(out_a), torch.stack(out_b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leak", [0.75, 0.0])
def test_snntorch_runs_the_file_spike_for_spike(play: Tensor, tmp_path: Path, leak: float) -> None:
    from snntorch.import_nir import import_from_nir

    net = network(play, leak=leak)
    write_nir(net, (2, SIZE, SIZE), tmp_path / "net.nir")
    theirs = import_from_nir(nir.read(str(tmp_path / "net.nir")))
    seen, _ = spikes_of(theirs, snntorch.Leaky)
    outputs = []
    with torch.no_grad():
        for frame in play:
            for layer in theirs.modules():
                if isinstance(layer, snntorch.Leaky):
                    layer.reset_mem()
            out = theirs(frame[None])
            outputs.append((out[0] if isinstance(out, tuple) else out).flatten())
    assert_same(ours(net, play), (seen, outputs))
    assert {float(m.beta.flatten()[0]) for m in theirs.modules() if isinstance(m, snntorch.Leaky)} == {leak}


@pytest.mark.parametrize("leak", [0.75, 0.0, 1.0])
def test_norse_runs_the_file_spike_for_spike(play: Tensor, tmp_path: Path, leak: float) -> None:
    norse = pytest.importorskip("norse.torch")
    net = network(play, leak=leak)
    write_nir(net, (2, SIZE, SIZE), tmp_path / "net.nir")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = norse.from_nir(nir.read(str(tmp_path / "net.nir")), dt=DT)
    seen, _ = spikes_of(theirs, norse.LIFBoxCell if leak < 1 else norse.IAFCell)
    with torch.no_grad():
        outputs = [theirs(frame[None])[0].flatten() for frame in play]
    assert_same(ours(net, play), (seen, outputs))


@pytest.mark.parametrize("leak", [0.75, 0.0])
@pytest.mark.parametrize("leak_reset", [False, True])
def test_snntorch_told_to_subtract_runs_several_micro_steps(play: Tensor, leak: float, *, leak_reset: bool) -> None:
    from snntorch.import_nir import import_from_nir

    net = network(play, timesteps=3, leak=leak, leak_reset=leak_reset)
    theirs = import_from_nir(to_nir(net, (2, SIZE, SIZE)))
    for name, layer in list(theirs.named_modules()):
        if isinstance(layer, snntorch.Leaky):  # which choose how to reset when they are built
            told = {"reset_mechanism": "subtract", "reset_delay": not leak_reset, "init_hidden": True}
            theirs.set_submodule(name, snntorch.Leaky(layer.beta, layer.threshold, **told))
    layers = [m for m in theirs.modules() if isinstance(m, snntorch.Leaky)]
    seen, _ = spikes_of(theirs, snntorch.Leaky)
    outputs = []
    with torch.no_grad():
        for frame in play[:200]:
            for layer in layers:
                layer.reset_mem()
            outs = [theirs(frame[None]) for _ in range(3)]
            outputs.append(torch.stack([(o[0] if isinstance(o, tuple) else o).flatten() for o in outs]).mean(0))
    assert_same(ours(net, play[:200]), ([[torch.cat(s[i : i + 3]) for i in range(0, 600, 3)] for s in seen], outputs))


def test_norse_told_to_subtract_runs_several_micro_steps_of_leak_reset(play: Tensor) -> None:
    norse = pytest.importorskip("norse.torch")
    from norse.torch.functional.reset import reset_subtract

    net = network(play, timesteps=3, leak_reset=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = norse.from_nir(to_nir(net, (2, SIZE, SIZE)), dt=DT)
    for cell in theirs.modules():
        if isinstance(cell, norse.LIFBoxCell):
            cell.p = cell.p._replace(reset_method=reset_subtract)
    seen, _ = spikes_of(theirs, norse.LIFBoxCell)
    outputs = []
    with torch.no_grad():
        for frame in play[:200]:
            state, outs = None, []
            for _ in range(3):
                out, state = theirs(frame[None], state)
                outs.append(out.flatten())
            outputs.append(torch.stack(outs).mean(0))
    assert_same(ours(net, play[:200]), ([[torch.cat(s[i : i + 3]) for i in range(0, 600, 3)] for s in seen], outputs))


@pytest.mark.parametrize("leak", [0.75, 0.0, 1.0])
@pytest.mark.parametrize("leak_reset", [False, True])
def test_a_file_comes_back_as_the_network_it_was(
    play: Tensor, tmp_path: Path, leak: float, *, leak_reset: bool
) -> None:
    net = network(play, timesteps=3, leak=leak, leak_reset=leak_reset)
    write_nir(net, (2, SIZE, SIZE), tmp_path / "net.nir")
    back = read_nir(tmp_path / "net.nir")
    assert back.timesteps == 3
    frames = play[:64].unflatten(0, (8, 8))  # (frames, batch, ...): membranes persist
    with torch.no_grad():
        (a, state_a), (b, state_b) = net.unroll(frames), back.unroll(frames)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(state_a, state_b, rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["net.nir"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_precision_are_written_in_single(play: Tensor, tmp_path: Path, dtype: torch.dtype) -> None:
    net = network(play, timesteps=2).to(dtype).train()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    write_nir(net, (2, SIZE, SIZE), tmp_path / "net.nir")
    weights = [node.weight for node in nir.read(str(tmp_path / "net.nir")).nodes.values() if hasattr(node, "weight")]
    assert {weight.dtype for weight in weights} == {np.dtype(np.float32)}
    with torch.no_grad():
        out, _ = read_nir(tmp_path / "net.nir")(play[:64])
        expected, _ = copy.deepcopy(net).float().eval()(play[:64])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert net.training
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert {value.dtype for value in net.state_dict().values()} == {dtype}


def snntorch_graph(beta: float) -> nir.NIRGraph:
    from snntorch.export_nir import export_to_nir

    torch.manual_seed(0)
    neurons = snntorch.Leaky(torch.full((3,), beta), torch.full((3,), 0.5), init_hidden=True)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")
        return export_to_nir(nn.Sequential(nn.Linear(4, 3), neurons), torch.zeros(4))


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.9, 0.999, 1.0])
def test_what_snntorch_writes_is_read_with_its_beta_as_leak(beta: float, tmp_path: Path) -> None:
    nir.write(str(tmp_path / "net.nir"), snntorch_graph(beta))
    (lif,) = read_nir(tmp_path / "net.nir").lif_layers.values()
    leak, threshold = lif.leak.item(), lif.threshold.item()
    assert leak == beta if beta in (0.0, 1.0) else leak == pytest.approx(beta, abs=1e-7)
    assert threshold == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("dt", [1e-4, 1e-3, 3e-3, 0.7])
def test_a_tau_of_the_time_step_in_either_precision_is_a_leak_of_zero(dt: float) -> None:
    for tau, step in ((dt, dt), (np.float32(dt), dt), (dt, float(np.float32(dt))), (np.float32(dt), np.float32(dt))):
        graph = neuron(nir.LIF(np.full(2, tau), np.ones(2), np.zeros(2), np.full(2, 0.25)))
        graph.metadata = {"dt": step}
        (lif,) = from_nir(graph).lif_layers.values()
        assert lif.leak.item() == 0.0
        assert lif.threshold.item() == 0.25


def test_the_least_threshold_comes_back(play: Tensor) -> None:
    net = network(play)
    for lif in net.lif_layers.values():
        lif.raw_threshold.data.fill_(-1.0)  # type: ignore[operator, union-attr]
    back = from_nir(to_nir(net, (2, SIZE, SIZE)))
    for lif in back.lif_layers.values():
        assert lif.threshold.item() == pytest.approx(1e-6)


def test_a_residual_network_comes_back(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(h) + h))

    x = torch.randn(200, 5)
    net = to_spiking(Residual(), x, timesteps=2)
    write_nir(net, (5,), tmp_path / "net.nir")
    torch.testing.assert_close(read_nir(tmp_path / "net.nir")(x)[0], net(x)[0])


def test_names_that_nir_uses_itself_are_no_harm() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.output = nn.Linear(5, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.output(torch.relu(self.input(x)))

    x = torch.randn(50, 5)
    net = to_spiking(Named(), x, timesteps=2)
    torch.testing.assert_close(from_nir(to_nir(net, (5,)))(x)[0], net(x)[0])


def test_a_signal_added_to_itself_is_refused() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.relu(h + h))

    with pytest.raises(ValueError, match="a signal that is added to itself"):
        to_nir(to_spiking(Doubled(), torch.randn(50, 5)), (5,))


def test_a_neuron_of_nir_is_an_euler_step_of_ours(play: Tensor) -> None:
    net = network(play, leak=0.75)
    neurons = [node for node in to_nir(net, (2, SIZE, SIZE)).nodes.values() if isinstance(node, nir.LIF)]
    assert [node.v_threshold.shape for node in neurons] == [(6, 11, 11), (8, 3, 3), (32,)]
    for node, lif in zip(neurons, net.lif_layers.values(), strict=True):
        v, u = 0.0, 0.0
        for current in (0.3, 0.2, 0.1):
            v += DT / node.tau.flat[0] * (node.v_leak.flat[0] - v + node.r.flat[0] * current)
            u = lif.leak.item() * u + current
            assert v / node.v_threshold.flat[0] == pytest.approx(u / lif.threshold.item())


def test_a_leak_of_one_is_an_integrator(play: Tensor) -> None:
    graph = to_nir(network(play, leak=1.0), (2, SIZE, SIZE))
    assert sum(isinstance(node, nir.IF) for node in graph.nodes.values()) == 3


@pytest.mark.parametrize(
    ("ann", "shape", "leak", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)),
            (1, 6, 6),
            0.9,
            "'_2'.*average pooling right before it",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)),
            (1, 6, 6),
            0.9,
            "'_2'.*AdaptiveAvgPool2d: use",
        ),
        (
            nn.Sequential(
                nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)
            ),
            (1, 6, 6),
            0.9,
            "'_0'.*padding with reflect: use zeros",
        ),
    ],
)
def test_what_nir_cannot_express_is_refused_by_name(
    ann: nn.Module, shape: tuple[int, ...], leak: float, message: str
) -> None:
    net = to_spiking(ann, torch.randn(64, *shape), leak=leak)
    with pytest.raises(ValueError, match=message):
        to_nir(net, shape)


def neuron(node: Any) -> nir.NIRGraph:
    """A graph of one node, called x, of two numbers in and out."""
    nodes = {"input": nir.Input(np.array([2])), "x": node, "output": nir.Output(np.array([2]))}
    return nir.NIRGraph(nodes, [("input", "x"), ("x", "output")], type_check=False)


def lif(**changes: Any) -> nir.LIF:
    values = {"tau": 1e-3, "r": 1.0, "v_leak": 0.0, "v_threshold": 0.5} | changes
    return nir.LIF(**{key: np.full(2, value) for key, value in values.items()})


ONES = np.ones(2)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (nir.CubaLIF(ONES, ONES, ONES, 0 * ONES, ONES, w_in=ONES), "'x' .CubaLIF. has no counterpart"),
        (nir.CubaLI(ONES, ONES, ONES, 0 * ONES), "'x' .CubaLI. has no counterpart"),
        (nir.LI(ONES, ONES, 0 * ONES), "'x' .LI. has no counterpart"),
        (nir.LIF(ONES, ONES, 0 * ONES, np.array([1.0, 2.0])), "neurons of NIR node 'x' differ in v_threshold"),
        (lif(v_leak=1.0), "'x' has v_leak other than 0"),
        (lif(tau=DT / 2), "'x' must have tau >= 0.0001, the time step, got 5e-05"),
        (lif(tau=0.0), "'x' must have tau >= 0.0001, the time step, got 0"),
        (lif(tau=-np.inf), "'x' must have tau >= 0.0001, the time step, got -inf"),
        (lif(tau=np.nan), "'x' must have tau >= 0.0001, the time step, got nan"),
        (lif(tau=np.inf), "'x' has tau = inf and r = 1, so that no input reaches it; use an IF"),
        *(
            (lif(r=r), f"'x' must have r > 0 and finite, got {r:g}")
            for r in (0.0, -1.0, np.nan, np.inf)
        ),
        *(
            (lif(v_threshold=v), f"'x' must have a v_threshold of 1e-07 to 3.40282e.37, got {v:g}")
            for v in (0.0, -1.0, np.nan, np.inf, 9e-8)
        ),
        (nir.IF(ONES, 0 * ONES), "'x' must have a v_threshold of 1e-06 to 3.40282e.38, got 0"),
        (nir.IF(0 * ONES, ONES), "'x' must have r > 0 and finite, got 0"),
        (nir.Affine(np.full((2, 2), np.nan), ONES), "'x' holds numbers that are not finite in single precision"),
        (nir.Affine(np.eye(2), np.array([1.0, 1e39])), "'x' holds numbers that are not finite in single precision"),
        (nir.Affine(np.eye(2), np.ones(1)), "'x' must have a bias for each of 2, got 1"),
        (nir.Output(np.array([2])), "exactly one Output, got 2"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_here_is_refused_by_name(node: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_nir(neuron(node))


def test_graphs_that_are_no_chain_of_nodes_are_refused() -> None:
    loop = neuron(nir.Affine(np.eye(2), np.zeros(2)))
    loop.edges.append(("x", "x"))
    with pytest.raises(ValueError, match="form a loop"):
        from_nir(loop)
    dangling = neuron(nir.Affine(np.eye(2), np.zeros(2)))
    dangling.edges.append(("x", "y"))
    with pytest.raises(ValueError, match="an edge 'x' -> 'y', but no node 'y'"):
        from_nir(dangling)


def test_a_convolution_without_bias_has_none() -> None:
    """One of PyTorch's own would be random."""
    graph = neuron(nir.Conv2d((4, 4), np.ones((1, 1, 2, 2), np.float32), 1, 0, 1, 1, np.zeros(1)))
    graph.nodes["x"].bias = None
    graph.nodes["x"].stride = np.array([2.0, 2.0])
    out, _ = from_nir(graph)(torch.ones(1, 1, 4, 4))
    assert out.flatten().tolist() == [4.0] * 4


ODD = (None, "abc", 0, -1, 1.5, np.nan, np.inf, [], np.array(["a"]), 10**30, np.array([1 + 2j]), {}, (1, 1, 1))


@pytest.mark.parametrize("value", ODD, ids=str)
def test_numbers_of_another_kind_are_read_or_refused_by_node_name(play: Tensor, value: Any) -> None:
    whole = to_nir(network(play), (2, SIZE, SIZE))
    refused = []
    for name, node in whole.nodes.items():
        for key in vars(node).keys() - {"input_type", "output_type", "metadata", "input_shape"}:
            changed = copy.deepcopy(node)
            setattr(changed, key, value)
            graph = nir.NIRGraph({**whole.nodes, name: changed}, whole.edges, type_check=False)
            try:
                from_nir(graph)
            except ValueError as error:
                refused.append((f"node {name!r} ", str(error)))
    assert len(refused) > 5
    assert all(name in message and "\n" not in message for name, message in refused)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        *(
            ({"dt": value}, "dt in the graph's metadata must be a finite number")
            for value in ("a", np.nan, [1.0], None)
        ),
        *(({"dt": value}, "time step dt must be > 0") for value in (0, -1e-4)),
        *(({"timesteps": value}, "timesteps in the graph's metadata must be a finite") for value in ("a", np.inf, [1])),
        ({"timesteps": 1.5}, "timesteps in the graph's metadata must be an integer, got 1.5"),
        ({"timesteps": 0}, "timesteps must be an integer >= 1, got 0"),
        ({"leak_reset": "yes"}, "leak_reset in the graph's metadata must be a finite number"),
    ],
)
def test_metadata_that_says_nothing_is_refused(metadata: dict[str, Any], message: str) -> None:
    graph = neuron(lif())
    graph.metadata = metadata
    with pytest.raises(ValueError, match=message):
        from_nir(graph)


def test_an_observation_shape_that_is_not_the_networks_is_refused() -> None:
    net = to_spiking(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 3), leak=0.9)
    with pytest.raises(ValueError, match=r"cannot take observations of shape \(4,\).*1x4 and 3x8"):
        to_nir(net, (4,))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file at"):
        read_nir(tmp_path / "none.nir")
    (tmp_path / "bad.nir").write_bytes(b"\x89HDF nonsense")
    with pytest.raises(ValueError, match=r"bad\.nir is not a readable NIR file"):
        read_nir(tmp_path / "bad.nir")


def test_a_slice_is_refused_by_name() -> None:
    class Combined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(2, 8), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([torch.relu(self.hidden(x[:, :2])), x[:, 2:]], 1))

    net = to_spiking(Combined(), torch.randn(20, 4))
    with pytest.raises(ValueError, match="node 'getitem' cannot be expressed in NIR: getitem: use Linear, Conv2d"):
        to_nir(net, (4,))
