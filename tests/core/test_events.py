"""Event-driven frames against the network run layer by layer: the same spikes, however the sums are taken.

Weights, inputs and leaks are multiples of powers of two, few enough for single precision to hold every sum exactly, so
that the order of additions cannot matter and spikes can be compared one by one.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, vector_to_parameters

from snn_rl import SpikingNetwork, to_spiking
from snn_rl.core.events import CALLS_BEFORE_LAYOUT, EventDriven


def exact(ann: nn.Module, x: Tensor, timesteps: int, *, leak_reset: bool = False) -> SpikingNetwork:
    """A network of short binary fractions."""
    net = to_spiking(ann, x, timesteps=timesteps, leak_reset=leak_reset).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 0:
                p.copy_(torch.randint(-4, 8, p.shape) / 16)
        for i, lif in enumerate(net.lif_layers.values()):
            lif.raw_threshold.fill_(0.75 + i / 8)
            lif.raw_leak.fill_((0.5, 1.0, 0.75, 0.0)[i % 4])
    return net


def inputs(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape) / 4


def play(net: SpikingNetwork, shape: tuple[int, ...], frames: int = 4, batch: int = 3) -> None:
    """A few frames, one environment starting anew at each, both ways."""
    events = EventDriven(net)
    state, carries = None, None
    for frame in range(frames):
        x = inputs(batch, *shape)
        starts = np.arange(batch) == frame % batch
        with torch.no_grad():
            keep = None if carries is None else torch.as_tensor(starts)[None]
            expected, carries = net.unroll(x[None], carries, keep)
        out, state = events(x, state, None if state is None else starts)
        np.testing.assert_array_equal(out, expected[0].numpy())
        for ours, theirs in zip(state, carries, strict=True):
            np.testing.assert_array_equal(ours, theirs.numpy())


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_frames_are_those_of_the_network(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16), "seed"))
    layers: list[nn.Module] = []
    shape = channels, height, width = tuple(data.draw(st.tuples(*[st.integers(1, top) for top in (3, 9, 9)]), "shape"))
    for _ in range(data.draw(st.integers(0, 3), "convolutions")):
        kernel = data.draw(st.tuples(st.integers(1, min(4, height)), st.integers(1, min(4, width))), "kernel")
        stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), "stride")
        padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)), "padding")
        out = data.draw(st.integers(1, 5), "channels")
        layers += [nn.Conv2d(channels, out, kernel, stride, padding, bias=data.draw(st.booleans())), nn.ReLU()]
        channels = out
        height, width = (
            (n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), padding, kernel, stride, strict=True)
        )
    layers += [nn.Flatten()]
    features = channels * height * width
    for _ in range(data.draw(st.integers(0 if layers[1:] else 1, 2), "linear")):
        out = data.draw(st.integers(1, 9), "units")
        layers += [nn.Linear(features, out, bias=data.draw(st.booleans())), nn.ReLU()]
        features = out
    layers += [nn.Linear(features, 2)]
    timesteps = data.draw(st.sampled_from([1, 2, 4]), "timesteps")  # a mean over three would be rounded
    ann = nn.Sequential(*layers)
    play(exact(ann, inputs(8, *shape), timesteps, leak_reset=data.draw(st.booleans(), "leak_reset")), shape)


def test_the_nature_cnn() -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 6),
    )  # fmt: skip
    play(exact(ann, inputs(2, 4, 84, 84), 2), (4, 84, 84), batch=2)


@pytest.mark.parametrize(("kernel", "padding"), [(1, (0, 1)), (3, (1, 1)), (3, (2, 1))])
def test_images_of_one_pixel_with_padding(kernel: int, padding: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, kernel, padding=padding), nn.ReLU(), nn.Flatten(),
        nn.Linear(2 * (2 * padding[0] + 2 - kernel) * (2 * padding[1] + 2 - kernel), 2),
    )  # fmt: skip
    play(exact(ann, inputs(2, 2, 1, 1), 2), (2, 1, 1))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def test_membranes_are_not_changed_in_place() -> None:
    events = EventDriven(exact(mlp(), inputs(8, 4), 2))
    _, state = events(inputs(1, 4))
    before = [carry.copy() for carry in state]
    events(inputs(1, 4), state, np.array([True]))
    for now, then in zip(state, before, strict=True):
        np.testing.assert_array_equal(now, then)


def settled(events: EventDriven) -> bool:
    return [events.ready() for _ in range(CALLS_BEFORE_LAYOUT + 1)][-1]


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(),
        nn.Linear(5, 2),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (mlp, (4,)),
    "convolutional": (convolutional, (2, 5, 5)),
}


def write_everywhere(net: SpikingNetwork) -> None:
    for p in net.parameters():
        p.data.add_(0.125)


WRITES: dict[str, Callable[[SpikingNetwork, SpikingNetwork], object]] = {
    "in place": lambda net, other: [p.add_(0.5) for p in net.parameters()],
    ".data": lambda net, other: write_everywhere(net),
    ".data replaced": lambda net, other: [setattr(p, "data", p.data + 0.25) for p in net.parameters()],
    "polyak_update": lambda net, other: polyak_update(other.parameters(), net.parameters(), 0.5),
    "vector_to_parameters": lambda net, other: vector_to_parameters(
        torch.cat([p.reshape(-1) for p in other.parameters()]), net.parameters()
    ),
    "load_state_dict": lambda net, other: net.load_state_dict(other.state_dict()),
    "load_state_dict, assigned": lambda net, other: net.load_state_dict(other.state_dict(), assign=True),
    "numpy": lambda net, other: [np.add(p.numpy(), 0.5, out=p.numpy()) for p in map(Tensor.detach, net.parameters())],
    "thresholds": lambda net, other: [lif.raw_threshold.data.fill_(0.25) for lif in net.lif_layers.values()],
    "leaks beyond their bounds": lambda net, other: [lif.raw_leak.data.fill_(1.5) for lif in net.lif_layers.values()],
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_frames_follow_the_weights_however_they_are_written(kind: str, write: str) -> None:
    make, shape = NETWORKS[kind]
    x = inputs(64, *shape)
    net, other = (exact(make(), inputs(8, *shape), 2) for _ in "ab")
    for p in other.parameters():
        p.data.mul_(-2.5 if p.dim() > 1 else 0.5)
    events = EventDriven(net)

    def act() -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            first = net(x)[1]
            expected, state = net(x, first)
            ready = events.ready()
            out, carries = events(x, [carry.numpy() for carry in first]) if ready else (expected.numpy(), state)
        np.testing.assert_array_equal(out, expected.numpy())
        for ours, theirs in zip(carries, state, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        return expected.numpy(), np.array(ready)

    assert settled(events)
    before, ready = act()
    assert ready
    with torch.no_grad():
        WRITES[write](net, other)
    after, _ = act()  # at the first frame after the change
    assert (before != after).any()
    assert settled(events)  # and again event-driven, with the new weights
    assert act()[1]


def test_convolutions_wait_until_their_weights_have_rested() -> None:
    net = exact(convolutional(), inputs(8, 2, 5, 5), 1)
    events = EventDriven(net)
    assert not events.ready()
    assert settled(events)
    events(inputs(1, 2, 5, 5))
    events.synapses[1].weight.data.add_(0.5)
    assert [events.ready() for _ in range(CALLS_BEFORE_LAYOUT + 1)] == [False] * CALLS_BEFORE_LAYOUT + [True]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_step_of_a_fused_optimiser_is_seen(kind: type[torch.optim.Optimizer]) -> None:
    """Such a step does not count as a change in the parameters' versions."""
    net = exact(mlp(), inputs(8, 4), 1)
    events = EventDriven(net)
    assert settled(events)
    x = inputs(4, 4)
    before = events(x)[0]
    optimizer = kind(net.parameters(), lr=0.5, fused=True)  # type: ignore[call-arg]
    net(x)[0].sum().backward()
    optimizer.step()
    assert not events.ready()
    assert settled(events)
    after = events(x)[0]
    with torch.no_grad():
        np.testing.assert_allclose(after, net(x)[0].numpy(), rtol=1e-5)
    assert (before != after).any()


def test_linear_layers_behind_convolutions_need_no_copy() -> None:
    net = exact(convolutional(), inputs(8, 2, 5, 5), 1)
    events = EventDriven(net)
    x = inputs(16, 2, 5, 5)
    assert settled(events)
    before = events(x)[0]
    linear = events.synapses[2]
    linear.weight.data.add_(1.0)
    assert events.ready()
    with torch.no_grad():
        np.testing.assert_array_equal(events(x)[0], net(x)[0].numpy())
    assert (events(x)[0] != before).any()
    linear.weight = nn.Parameter(linear.weight.detach().contiguous())  # row by row: copied, and compared from then on
    for _ in range(2):
        assert not events.ready()
        assert settled(events)
        with torch.no_grad():
            np.testing.assert_array_equal(events(x)[0], net(x)[0].numpy())
        linear.weight.data.sub_(0.5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_another_order_in_the_same_memory_is_seen(kind: str) -> None:
    make, shape = NETWORKS[kind]
    net = exact(make(), inputs(8, *shape), 1)
    events = EventDriven(net)
    x = inputs(16, *shape)
    assert settled(events)
    events(x)
    weight = events.synapses[1].weight
    weight.data = weight.data.transpose(0, 1) if kind == "linear" else weight.data.transpose(2, 3)
    assert not events.ready()
    with torch.no_grad():
        if settled(events):
            np.testing.assert_array_equal(events(x)[0], net(x)[0].numpy())


def test_weights_that_are_computed_from_now_on_run_as_layers() -> None:
    for wrap in (lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm):
        net = exact(mlp(), inputs(8, 4), 1)
        events = EventDriven(net)
        assert settled(events)
        wrap(events.synapses[1])  # type: ignore[no-untyped-call]
        assert not settled(events)


def test_a_network_in_training_runs_as_layers() -> None:
    net = exact(mlp(), inputs(8, 4), 1)
    events = EventDriven(net)
    assert settled(events)
    net.train()
    assert not settled(events)
    net.eval()
    assert settled(events)


def test_training_keeps_the_order_of_the_weights() -> None:
    """Gradients and an optimiser's moments lie as the weights do, so that no step has to turn them."""
    net = exact(convolutional(), inputs(8, 2, 5, 5), 1)
    events = EventDriven(net)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        net(inputs(4, 2, 5, 5))[0].sum().backward()
        optimizer.step()
    weight = events.synapses[2].weight
    assert weight.grad is not None
    assert weight.stride() == weight.grad.stride() == optimizer.state[weight]["exp_avg"].stride() == (1, 5)


def test_threads_share_a_network() -> None:
    """Many threads at once, on scratch memory that one frame would not survive sharing."""
    torch.manual_seed(0)
    net = exact(nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4)),
                inputs(8, 32), 4)  # fmt: skip
    events = EventDriven(net)
    assert settled(events)
    frames = [inputs(1, 32) for _ in range(4)]
    expected = [events(x)[0] for x in frames]
    wrong: list[int] = []

    def play_one(i: int) -> None:
        for _ in range(100):
            if not np.array_equal(events(frames[i])[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=play_one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_pixel_that_padding_pushes_out_of_reach() -> None:
    """A kernel of one pixel with padding 1 and stride 3 on a single pixel sees the padding alone."""
    ann = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1, stride=3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)
    )
    play(exact(ann, inputs(8, 2, 1, 1), 2), (2, 1, 1))


def test_layers_that_are_watched_run_as_layers() -> None:
    net = exact(mlp(), inputs(8, 4), 1)
    events = EventDriven(net)
    assert settled(events)
    handle = next(iter(net.lif_layers.values())).register_forward_hook(lambda *_: None)
    assert not events.ready()
    handle.remove()
    assert events.ready()
    net.double()
    assert not settled(events)


def test_copies_stand_on_their_own() -> None:
    net = exact(mlp(), inputs(8, 4), 1)
    events = EventDriven(net)
    x = inputs(1, 4)
    expected = events(x)[0]
    for twin in (copy.deepcopy(events), pickle.loads(pickle.dumps(events))):
        with torch.no_grad():
            next(net.parameters()).zero_()
        np.testing.assert_array_equal(twin(x)[0], expected)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(h + self.second(h)))


@pytest.mark.parametrize(
    ("ann", "message"),
    [
        (Residual(), "is part of a branch"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)), "does not know the layer '_3'"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "does not know the layer 'gain__1_output'"),
    ],
)
def test_what_is_no_chain_is_refused(ann: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EventDriven(to_spiking(ann, inputs(8, 4)))


@pytest.mark.parametrize(
    "first",
    [
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 2, dilation=2)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding="same")),
    ],
)
def test_convolutions_that_are_not_plain_are_refused(first: nn.Module) -> None:
    ann = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    ann(inputs(1, 2, 8, 8))
    with pytest.raises(ValueError, match="does not know the layer"):
        EventDriven(to_spiking(ann, inputs(8, 2, 8, 8)))


def test_a_chain_without_a_linear_readout_is_refused() -> None:
    ann = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(ValueError, match="chains that end in a Linear layer"):
        EventDriven(to_spiking(ann, inputs(8, 2, 8, 8)))


def test_a_state_of_another_network_is_named() -> None:
    events = EventDriven(exact(mlp(), inputs(8, 4), 1))
    with pytest.raises(ValueError, match="state must hold 2 carries, one per LIF layer, got 1"):
        events(inputs(1, 4), [np.zeros((1, 16), np.float32)])
    with pytest.raises(ValueError, match=r"the carry of .* must have shape \(1, 16\), got \(1, 1\)"):
        events(inputs(1, 4), [np.zeros((1, 16), np.float32), np.zeros((1, 1), np.float32)])
