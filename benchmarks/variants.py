"""One network, many ways to run it: ours, other frameworks, and the limits, all with the same folded weights.

Every framework gets the best arrangement its neuron allows: time is folded into the batch of the synapses, the first
synapse runs once per frame, the readout once per frame, and only the neurons walk through time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from snn_rl import LIF, to_spiking

LEAK = 0.9

Neuron = Callable[[Tensor], Tensor]  # currents (T, batch, ...) -> spikes, from silence


def nature_cnn(width: float = 1.0, actions: int = 6) -> nn.Sequential:
    """Mnih et al. 2015, on a stack of four frames of 84 x 84; ``width`` multiplies all channels and units."""
    a, b, units = (round(width * n) for n in (32, 64, 512))
    return nn.Sequential(
        nn.Conv2d(4, a, 8, 4), nn.ReLU(), nn.Conv2d(a, b, 4, 2), nn.ReLU(), nn.Conv2d(b, b, 3, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(49 * b, units), nn.ReLU(), nn.Linear(units, actions),
    )  # fmt: skip


def vgg16(classes: int = 10) -> nn.Sequential:
    """VGG16 for 32 x 32 with average pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]:
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.AvgPool2d(2))
    layers += [
        nn.Flatten(),
        nn.Linear(512, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, classes),
    ]
    return nn.Sequential(*layers)


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, int, int]]] = {
    "nature": (nature_cnn, (4, 84, 84)),
    "vgg16": (vgg16, (3, 32, 32)),
}


class Folded(nn.Module):
    """A chain of layers with something in the place of each LIF layer, time folded into the batch."""

    def __init__(self, layers: list[nn.Module], timesteps: int, neurons: list[Neuron | None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.timesteps = timesteps
        self.neurons = neurons
        self.modules_of_neurons = nn.ModuleList([n for n in neurons if isinstance(n, nn.Module)])
        self.lif = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Identity)]

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        for i, layer in enumerate(self.layers):
            if i not in self.lif:
                x = layer(x)
                continue
            first = i == self.lif[0]
            neuron = self.neurons[self.lif.index(i)]
            if neuron is None:  # the frame's current once more for each micro-step, in the memory format that it has
                x = torch.cat([x] * self.timesteps) if first else x
            else:
                steps = 1 if first else self.timesteps
                current = x.unflatten(0, (steps, batch)).expand(self.timesteps, batch, *x.shape[1:])
                x = neuron(current).flatten(0, 1)
            if i == self.lif[-1]:
                x = x.unflatten(0, (self.timesteps, batch)).mean(0)
        return x


class Ours(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, with_state=False)[0]


def spikingjelly_neuron(threshold: float) -> Neuron:
    from spikingjelly.activation_based import functional, neuron, surrogate

    lif = neuron.LIFNode(
        tau=1 / (1 - LEAK), decay_input=False, v_threshold=threshold, v_reset=None, detach_reset=True, step_mode="m",
        surrogate_function=surrogate.PiecewiseQuadratic(),
    )  # fmt: skip

    class Reset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = lif

        def forward(self, current: Tensor) -> Tensor:
            functional.reset_net(self.lif)
            return self.lif(current)

    return Reset()


def snntorch_neuron(threshold: float) -> Neuron:
    import snntorch
    from snntorch import surrogate

    lif = snntorch.Leaky(
        beta=LEAK, threshold=threshold, reset_mechanism="subtract", reset_delay=True,
        spike_grad=surrogate.triangular(),
    )  # fmt: skip

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = lif

        def forward(self, current: Tensor) -> Tensor:
            membrane = self.lif.init_leaky()
            spikes = []
            for current_t in current:
                spikes_t, membrane = self.lif(current_t, membrane)
                spikes.append(spikes_t)
            return torch.stack(spikes)

    return Loop()


def norse_neuron(threshold: float) -> Neuron:
    from norse.torch.functional.lif_box import LIFBoxFeedForwardState, LIFBoxParameters, lif_box_feed_forward_step
    from norse.torch.functional.reset import reset_subtract

    # v' = v + dt / tau * (i - v): the leak is 1 - dt / tau, and the current comes scaled by dt / tau
    parameters = LIFBoxParameters(
        tau_mem_inv=torch.tensor((1 - LEAK) / 1e-3), v_th=torch.tensor(threshold * (1 - LEAK)), method="triangle",
        reset_method=reset_subtract,
    )  # fmt: skip

    def loop(current: Tensor) -> Tensor:
        state = LIFBoxFeedForwardState(v=torch.zeros_like(current[0]))
        spikes = []
        for current_t in current:
            spikes_t, state = lif_box_feed_forward_step(current_t, state, parameters)
            spikes.append(spikes_t)
        return torch.stack(spikes)

    return loop


# framework: its neuron, and whether its reset leaks (DIET-SNN's equation), as ours then does where outputs are compared
PEERS: dict[str, tuple[Callable[[float], Neuron], bool]] = {
    "spikingjelly": (spikingjelly_neuron, True),
    "snntorch": (snntorch_neuron, False),
    "norse": (norse_neuron, True),
}


def build(network: str, timesteps: int, x: Tensor, *, check: bool = True) -> dict[str, nn.Module]:
    """Every way to run ``network`` that is installed here, by name; outputs are compared with ours first.

    Raises:
        RuntimeError: another framework that computes something else.
    """
    torch.manual_seed(0)
    ann = NETWORKS[network][0]()
    for layer in ann:  # PyTorch's default lets the signal die out within a few layers
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    calibration = x.cpu()
    ours = to_spiking(ann, calibration, timesteps=timesteps, leak=LEAK)
    leaky = to_spiking(ann, calibration, timesteps=timesteps, leak=LEAK, leak_reset=True)
    layers = chain(ours)
    lifs = list(ours.lif_layers.values())

    def folded(neurons: list[Neuron | None]) -> nn.Module:
        return Folded(copy.deepcopy(layers), timesteps, neurons)

    variants: dict[str, nn.Module] = {
        "dense only": folded([None] * len(lifs)),
        "ANN": ann,
        "snn_rl": Ours(ours),
    }
    for name, (neuron, leak_reset) in PEERS.items():
        if find_spec(name) is None:
            continue
        peer = folded([neuron(lif.threshold.item()) for lif in lifs])
        if check:
            agree(name, peer, Ours(leaky if leak_reset else ours), calibration[:4])
        variants[name] = peer
    device = x.device
    variants = {name: v.to(device, memory_format=torch.channels_last) for name, v in variants.items()}  # type: ignore[call-overload]
    if check:
        for name, variant in variants.items():
            same_format(name, variant, x)
    return variants


def chain(snn: nn.Module) -> list[nn.Module]:
    """The layers of a converted chain, an Identity in the place of each LIF layer."""
    layers: list[nn.Module] = []
    for node in snn.graph.graph.nodes:
        if node.op == "call_module":
            module = copy.deepcopy(snn.graph.get_submodule(node.target))
            if isinstance(module, nn.Conv2d):
                module.__class__ = nn.Conv2d  # PyTorch's own backward pass, not that of `SpikingNetwork`
            layers.append(nn.Identity() if isinstance(module, LIF) else module)
        elif node.op == "call_function":
            assert node.target is torch.flatten, node.target
            layers.append(nn.Flatten())
    return layers


@torch.no_grad()
def agree(name: str, peer: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """Rounding may move a spike that stands at its threshold; more than a few would be another neuron."""
    theirs, expected = peer(x), ours(x)
    error = ((theirs - expected).abs().mean() / expected.abs().mean()).item()
    if not error < 0.02:
        raise RuntimeError(f"{name} computes something else: outputs differ by {error:.1%}")


@torch.no_grad()
def same_format(name: str, variant: nn.Module, x: Tensor) -> None:
    """Every convolution of every variant gets its input channels-last, or the comparison is not one of neurons."""

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs[0].is_contiguous(memory_format=torch.channels_last):
            raise RuntimeError(f"{name}: a convolution gets an input that is not channels-last: {module}")

    handles = [m.register_forward_pre_hook(look) for m in variant.modules() if isinstance(m, nn.Conv2d)]
    variant(x)
    for handle in handles:
        handle.remove()
