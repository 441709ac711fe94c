"""Time folding against the plain loop over micro-steps, and state that is passed, never kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from snn_rl import SpikingNetwork, to_spiking


def network(timesteps: int = 3) -> SpikingNetwork:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    return to_spiking(ann.double(), torch.randn(64, 2, 8, 8).double(), timesteps=timesteps)


def step_by_step(net: SpikingNetwork, x: Tensor, carries: list[Tensor | None]) -> Tensor:
    """The method as the paper states it: every layer at every micro-step, output averaged over them."""
    calls = [node for node in net.graph.graph.nodes if node.op == "call_module"]
    conv1, lif1, pool, conv2, lif2, flatten, fc = (net.graph.get_submodule(str(node.target)) for node in calls)
    outputs = []
    for _ in range(net.timesteps):
        h, carries[0] = lif1(conv1(x)[None], carries[0])
        h, carries[1] = lif2(conv2(pool(h[0]))[None], carries[1])
        outputs.append(fc(flatten(h[0])))
    return torch.stack(outputs).mean(0)


@pytest.mark.parametrize("timesteps", [1, 2, 5])
def test_folding_time_into_the_batch_changes_nothing(timesteps: int) -> None:
    net = network(timesteps)
    frames = torch.randn(4, 5, 2, 8, 8).double()
    carries: list[Tensor | None] = [None, None]
    expected = [step_by_step(net, frame, carries) for frame in frames]
    state = None
    for frame, want in zip(frames, expected, strict=True):
        out, state = net(frame, state)
        torch.testing.assert_close(out, want)
    assert state is not None
    for ours, theirs in zip(state, carries, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_unrolling_is_calling_frame_by_frame() -> None:
    net = network()
    x = torch.randn(6, 3, 2, 8, 8).double()
    starts = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]])
    out, state = net.unroll(x, None, starts)
    carried = None
    for frame, start, want in zip(x, starts, out, strict=True):
        if carried is not None:
            carried = tuple(c * (1 - start).view(-1, *[1] * (c.dim() - 1)) for c in carried)
        got, carried = net(frame, carried)
        torch.testing.assert_close(got, want)
    assert carried is not None
    for ours, theirs in zip(state, carried, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_an_unrolled_sequence_is_that_of_the_loop() -> None:
    net = network()
    x = torch.randn(3, 2, 2, 8, 8).double()
    parameters = list(net.parameters())
    out, _ = net.unroll(x)
    ours = torch.autograd.grad(out.square().sum(), parameters)
    carries: list[Tensor | None] = [None, None]
    loop = torch.stack([step_by_step(net, frame, carries) for frame in x])
    theirs = torch.autograd.grad(loop.square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_first_synapse_runs_once_per_frame_and_the_last_one_too() -> None:
    net = network(timesteps=5)
    batches: dict[str, int] = {}
    for name, module in net.graph.named_children():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _m, i, _o, name=name: batches.update({name: len(i[0])}))
    net(torch.randn(2, 2, 8, 8).double())
    assert sorted(batches.values()) == [2, 2, 10]
    assert batches["6"] == 2


def test_a_network_keeps_no_state() -> None:
    net = network()
    x = torch.randn(2, 2, 8, 8).double()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first, _ = net(x)
    again, _ = net(x)
    assert torch.equal(first, again)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_copy_computes_the_same_and_shares_nothing() -> None:
    net = network()
    x = torch.randn(2, 2, 8, 8).double()
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x)[0], net(x)[0])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert net(x)[0].abs().sum() > 0


def test_timesteps_can_be_lowered() -> None:
    net = network(timesteps=5)
    net.timesteps = 1
    assert torch.equal(
        net(torch.ones(1, 2, 8, 8).double())[0], network(timesteps=1)(torch.ones(1, 2, 8, 8).double())[0]
    )
    with pytest.raises(ValueError, match="timesteps must be an integer >= 1, got 0"):
        net.timesteps = 0


def test_bad_states_are_named() -> None:
    net = network()
    x = torch.randn(2, 2, 8, 8).double()
    _, state = net(x)
    with pytest.raises(ValueError, match="state must hold 2 carries, one per LIF layer, got 1"):
        net(x, state[:1])
    with pytest.raises(ValueError, match="carry must have the shape"):
        net(x[:1], state)
    with pytest.raises(ValueError, match="at least one frame"):
        net.unroll(x[None][:0])


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(),
        nn.Linear(16, 2),
    )  # fmt: skip


@pytest.mark.filterwarnings(  # of what Dynamo itself does
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)
@pytest.mark.parametrize("timesteps", [1, 3])
def test_compiles_into_one_graph(timesteps: int) -> None:
    """`torch.compile` finds nothing that it must leave to Python, and what it traces computes the same."""
    x = torch.rand(2, 3, 2, 6, 6)
    network = to_spiking(convolutional(), x[0], timesteps=timesteps)
    compiled = torch.compile(network.unroll, backend="aot_eager", fullgraph=True)
    episode_start = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    results = []
    for unroll in (network.unroll, compiled):
        out, state = unroll(x, None, episode_start)
        out, state = unroll(x, state)
        network.zero_grad()
        out.square().sum().backward()
        results.append([out, *state, *(p.grad for p in network.parameters())])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_autocast_to_half_precision() -> None:
    """Synapses in bfloat16, membranes in single; spikes, 0 and 1, lose nothing."""
    x = torch.rand(64, 2, 6, 6)
    network = to_spiking(convolutional(), x, timesteps=3)
    expected, _ = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = network(x)
        out_2, _ = network(x, state)
    assert out.dtype == out_2.dtype == torch.bfloat16
    assert all(carry.dtype == torch.float32 for carry in state)
    # A rounded current may move a spike: the mean over outputs stays, a single one need not.
    assert (out - expected).abs().mean() < 0.05 * expected.abs().mean()
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_a_state_that_is_not_wanted_is_empty() -> None:
    net = network()
    x = torch.randn(2, 5, 2, 8, 8).double()
    expected, _ = net.unroll(x)
    out, state = net.unroll(x, with_state=False)
    assert torch.equal(out, expected)
    assert state == ()
    assert torch.equal(net(x[0], with_state=False)[0], expected[0])
