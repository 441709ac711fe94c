"""What snn_rl, SpikingJelly, snnTorch, Norse, sinabs, SB3 and RL Zoo offer, and the table of it in docs/features.md.

    python benchmarks/features.py            # write docs/features.md
    python benchmarks/features.py --check    # compare it with what is found here; status 1 where they disagree
    python benchmarks/features.py --tests    # run the tests that the cells of snn_rl name

Every cell is a probe: something imported, run, or looked up in the source of the installed package; where no code can
show it, a citation, marked as one. "no" means that a search of the package's Python files found nothing, and names the
regular expression. A library that is not installed is named, and its cells in the document are left as they are.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DOCUMENT = ROOT / "docs" / "features.md"


@dataclass(frozen=True)
class Library:
    name: str
    packages: tuple[str, ...]  # as imported; the first must be installed
    distributions: tuple[str, ...]  # as pip calls them

    @functools.cached_property
    def missing(self) -> list[str]:
        return [name for name in self.distributions if _version(name) is None]

    @property
    def versions(self) -> str:
        return ", ".join(f"{name} {_version(name)}" for name in self.distributions)

    def files(self) -> Iterator[Path]:
        """Its Python files, without its tests."""
        for package in self.packages:
            folder = _folder(package)
            yield from (
                f for f in sorted(folder.rglob("*.py")) if not {"test", "tests"} & set(f.relative_to(folder).parts)
            )


SNN_RL = Library("snn_rl", ("snn_rl", "agents", "scripts"), ("snn_rl",))
SPIKINGJELLY = Library("SpikingJelly", ("spikingjelly",), ("spikingjelly",))
SNNTORCH = Library("snnTorch", ("snntorch",), ("snntorch",))
NORSE = Library("Norse", ("norse",), ("norse",))
SINABS = Library("sinabs", ("sinabs",), ("sinabs",))
SB3 = Library("SB3", ("stable_baselines3", "sb3_contrib"), ("stable_baselines3", "sb3_contrib"))
ZOO = Library("RL Zoo", ("rl_zoo3",), ("rl_zoo3",))
LIBRARIES = (SNN_RL, SPIKINGJELLY, SNNTORCH, NORSE, SINABS, SB3, ZOO)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder(package: str) -> Path:
    if (ROOT / package).is_dir():
        return ROOT / package
    spec = importlib.util.find_spec(package)  # does not run the package
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


# --- probes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    text: str  # what stands in the table
    evidence: str


Probe = Callable[[], Cell]


class NotFound(Exception):
    """What a probe looked for is not there: the table must say something else."""


def _resolve(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
        for name in filter(None, attribute.split(".")):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise NotFound(f"{path}: {error}") from error
    return found


def has(*paths: str, text: str = "yes", note: str = "") -> Probe:
    """Each ``module:attribute`` is there."""

    def probe() -> Cell:
        for path in paths:
            _resolve(path)
        return Cell(text, _join([", ".join(f"`{path.replace(':', '.')}`" for path in paths), note]))

    return probe


def defines(package: str, *names: str, text: str = "yes", note: str = "") -> Probe:
    """Each ``file.py:name`` is a class or function in the package's source, which is not imported."""

    def probe() -> Cell:
        for where in names:
            file, name = where.split(":")
            tree = ast.parse((_folder(package) / file).read_text())
            if name not in {getattr(node, "name", None) for node in tree.body}:
                raise NotFound(f"{package}/{file} defines no {name}")
        return Cell(text, _join([", ".join(f"`{package}/{name}`" for name in names), note]))

    return probe


def mentions(package: str, file: str, pattern: str, *, text: str = "yes", note: str = "") -> Probe:
    """A line of the package's file matches."""

    def probe() -> Cell:
        if not re.search(pattern, (_folder(package) / file).read_text()):
            raise NotFound(f"{package}/{file} has no {pattern}")
        return Cell(text, _join([f"`{package}/{file}` has `{pattern}`", note]))

    return probe


def says(distribution: str, sentence: str, *, text: str, note: str = "") -> Probe:
    """The description that the installed package carries in its metadata holds these words."""

    def probe() -> Cell:
        metadata = " ".join((importlib.metadata.distribution(distribution).read_text("METADATA") or "").split())
        if sentence not in metadata:
            raise NotFound(f"the description of {distribution} does not say {sentence!r}")
        return Cell(text, _join([f'its own description (METADATA): "{sentence}"', note]))

    return probe


def lacks(library: Library, pattern: str, *, text: str = "no", note: str = "") -> Probe:
    """No Python file of the library matches; examples and tests apart, that is where it would have to be."""

    def probe() -> Cell:
        for file in library.files():
            for number, line in enumerate(file.read_text(errors="ignore").splitlines(), 1):
                if re.search(pattern, line, re.IGNORECASE):
                    raise NotFound(f"{library.name} does have {pattern!r}: {file.name}:{number}: {line.strip()[:80]}")
        return Cell(text, _join([f"not found: searched for `{pattern}`", note]))

    return probe


def by_tests(*tests: str, text: str = "yes", note: str = "") -> Probe:
    """Tests of this repository, which are there; ``--tests`` runs them."""

    def probe() -> Cell:
        for test in tests:
            file, name = test.split("::")
            tree = ast.parse((ROOT / "tests" / file).read_text())
            if name not in {getattr(node, "name", None) for node in tree.body}:
                raise NotFound(f"tests/{file} has no {name}")
        TESTS.update(f"tests/{test}" for test in tests)
        return Cell(text, _join([", ".join(f"`pytest tests/{test}`" for test in tests), note]))

    return probe


def ships_no_weights(library: Library, note: str = "") -> Probe:
    endings = (".pt", ".pth", ".ckpt", ".zip", ".npz", ".safetensors")

    def probe() -> Cell:
        for package in library.packages:
            for file in _folder(package).rglob("*"):
                if file.suffix in endings:
                    raise NotFound(f"{library.name} ships {file.name}")
        return Cell("no", _join([f"not found: searched the package for files ending in {' '.join(endings)}", note]))

    return probe


TESTS: set[str] = set()  # those that a probe has named


def cites(address: str, *, text: str, note: str) -> Probe:
    """What no code here can show."""
    return lambda: Cell(text, f"citation, not probed: {note} ({address})")


def both(first: Probe, second: Probe, *, text: str | None = None) -> Probe:
    def probe() -> Cell:
        one, two = first(), second()
        return Cell(text or one.text, _join([one.evidence, two.evidence]))

    return probe


def ran(function: Callable[[], tuple[str, str]]) -> Probe:
    """What comes of running the library: the cell's text and what was seen."""
    return lambda: Cell(*function())


def _join(parts: Iterable[str]) -> str:
    return "; ".join(part for part in parts if part)


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*(_subclasses(child) for child in kind.__subclasses__()))


def _autograd_functions(module: ModuleType) -> list[type]:
    kinds = [k for k in vars(module).values() if isinstance(k, type)]
    return [k for k in kinds if issubclass(k, torch.autograd.Function) and k.__module__ == module.__name__]


def _count(names: Iterable[str], what: str, rule: str) -> tuple[str, str]:
    found = sorted(set(names))
    shown = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
    return str(len(found)), f"{len(found)} {what}, counted as {rule}: {shown}"


no_spikes = {SB3: lacks(SB3, "spik|membrane"), ZOO: lacks(ZOO, "spik|membrane")}
as_sb3 = has("rl_zoo3:ALGOS", text="as SB3", note="trains the classes of SB3 and sb3-contrib")


# --- what is run ----------------------------------------------------------------------------------


def rl_algorithms_of_snn_rl() -> tuple[str, str]:
    from stable_baselines3.common.base_class import BaseAlgorithm

    import snn_rl.rl

    names = [k.__name__ for k in vars(snn_rl.rl).values() if isinstance(k, type) and issubclass(k, BaseAlgorithm)]
    count, evidence = _count(names, "in `snn_rl.rl`", "subclasses of SB3's BaseAlgorithm")
    return f"{count} spiking (DQN)", evidence


def rl_algorithms_of_sb3() -> tuple[str, str]:
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.base_class import BaseAlgorithm

    found = []
    for module in (stable_baselines3, sb3_contrib):
        kinds = [getattr(module, name) for name in module.__all__]
        names = [k.__name__ for k in kinds if isinstance(k, type) and issubclass(k, BaseAlgorithm)]
        found.append(_count(names, f"in `{module.__name__}`", "subclasses of BaseAlgorithm in `__all__`"))
    return f"{found[0][0]}, and {found[1][0]} in sb3-contrib; none spiking", _join(e for _, e in found)


def rl_algorithms_of_zoo() -> tuple[str, str]:
    from rl_zoo3 import ALGOS

    names = [name for name in ALGOS if name != "spiking_dqn"]  # which `snn_rl.share.zoo.register` may have added
    count, evidence = _count(names, "in `rl_zoo3.ALGOS`", "its keys")
    return f"{count}; none spiking", evidence


def state_in_predict() -> tuple[str, str]:
    import numpy as np

    from snn_rl import SpikingDQN

    agent = SpikingDQN("MlpPolicy", "CartPole-v1", buffer_size=100, device="cpu", seed=0)
    observation = np.full((2, 4), 0.5, dtype=np.float32)
    _, once = agent.predict(observation, None, np.array([True, True]), deterministic=True)
    _, twice = agent.predict(observation, once, np.array([False, True]), deterministic=True)
    kept, cleared = (any(not np.array_equal(a[i], b[i]) for a, b in zip(once, twice, strict=True)) for i in (0, 1))
    if not kept or cleared:
        raise NotFound(f"membranes kept: {kept}, cleared where an episode starts: {not cleared}")
    return "yes", "ran: of two environments, the one that goes on keeps its membranes, the one that starts is cleared"


def lstm_state_in_predict() -> tuple[str, str]:
    import numpy as np
    from sb3_contrib import RecurrentPPO

    agent = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=8, device="cpu", seed=0)
    _, state = agent.predict(np.zeros((2, 4), dtype=np.float32), None, np.array([True, True]))
    if state is None:
        raise NotFound("RecurrentPPO.predict returns no state")
    return "LSTM only", "ran: sb3-contrib's `RecurrentPPO.predict` takes and returns LSTM states; no spiking ones"


class Functional(nn.Module):
    """ReLU as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.conv(x)).flatten(1))


class Residual(nn.Module):
    """A sum of two branches between ReLU modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(256, 2)
        self.relu_a, self.relu_b = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu_a(self.a(x))
        return self.out(self.relu_b(self.b(x) + x).flatten(1))


def _sequential(pooling: nn.Module) -> nn.Module:
    convolution = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(*convolution, pooling, nn.Flatten(), nn.Linear(64, 2))


# name in the table, network, how many ReLUs have to become spiking layers
NETWORKS: tuple[tuple[str, Callable[[], nn.Module], int], ...] = (
    ("batch-norm and average pooling", lambda: _sequential(nn.AvgPool2d(2)), 1),
    ("functional ReLU", Functional, 1),
    ("residual sums", Residual, 2),
    ("max pooling", lambda: _sequential(nn.MaxPool2d(2)), 1),
)


def _conversions(convert: Callable[[nn.Module, Tensor], int], how: str) -> tuple[str, str]:
    """``convert`` converts, runs the result, and returns its number of spiking layers."""
    good, bad = [], []
    for name, make, wanted in NETWORKS:
        torch.manual_seed(0)
        try:
            spiking = convert(make().eval(), torch.rand(16, 1, 8, 8))
        except Exception as error:  # a refusal may be any
            bad.append(f"{name} refused ({type(error).__name__})")
            continue
        if spiking == wanted:
            good.append(name)
        else:
            bad.append(f"{name}: {spiking} of {wanted} ReLUs became spiking")
    return "yes: " + ", ".join(good), f"ran: `{how}`; converted: {', '.join(good)}; not: {'; '.join(bad) or 'none'}"


def conversion_here() -> tuple[str, str]:
    from snn_rl import LIF, to_spiking

    def convert(ann: nn.Module, x: Tensor) -> int:
        network = to_spiking(ann, x)
        network(x)
        return sum(isinstance(module, LIF) for module in network.modules())

    return _conversions(convert, "snn_rl.to_spiking, torch.fx")


def conversion_spikingjelly() -> tuple[str, str]:
    from spikingjelly.activation_based import ann2snn, neuron

    def convert(ann: nn.Module, x: Tensor) -> int:
        data = torch.utils.data.TensorDataset(x, torch.zeros(len(x)))
        recipe = ann2snn.RateCodingRecipe(torch.utils.data.DataLoader(data, batch_size=8))
        network = ann2snn.FXConverter(recipe).convert(ann)
        network(x)
        return sum(isinstance(module, neuron.BaseNode) for module in network.modules())

    text, evidence = _conversions(convert, "ann2snn.FXConverter(RateCodingRecipe(...)), torch.fx")
    _resolve("spikingjelly.activation_based.ann2snn:STATransformerRecipe")
    return f"{text}; transformers", _join([evidence, "transformers by `ann2snn.STATransformerRecipe`, not run"])


def conversion_sinabs() -> tuple[str, str]:
    from sinabs import layers
    from sinabs.from_torch import from_model

    def convert(ann: nn.Module, x: Tensor) -> int:
        network = from_model(ann, batch_size=len(x)).spiking_model
        network(x)
        return sum(isinstance(module, layers.StatefulLayer) for module in network.modules())

    return _conversions(convert, "sinabs.from_torch.from_model, which replaces modules")


def _subtracts(after: float) -> tuple[str, str]:
    """``after``: membrane after a spike at 1.3 with threshold 1."""
    if abs(after - 0.3) > 1e-4:
        raise NotFound(f"a membrane of 1.3 was {after:.3f} after its spike, not 0.3")
    return "yes", "ran: threshold 1, a membrane of 1.3 is 0.3 after its spike"


def subtraction_here() -> tuple[str, str]:
    from snn_rl import LIF

    return _subtracts(LIF(1.0, leak=1.0)(torch.tensor([[1.3]]))[1].item())


def subtraction_spikingjelly() -> tuple[str, str]:
    from spikingjelly.activation_based import neuron

    node = neuron.LIFNode(v_reset=None, decay_input=False)
    node(torch.tensor([1.3]))
    return _subtracts(node.v.item())


def subtraction_snntorch() -> tuple[str, str]:
    import snntorch

    _, membrane = snntorch.Leaky(beta=1.0, reset_mechanism="subtract", reset_delay=False)(torch.tensor([1.3]))
    return _subtracts(membrane.item())


def subtraction_norse() -> tuple[str, str]:
    import norse.torch as norse
    from norse.torch.functional.reset import reset_subtract

    cell = norse.LIFBoxCell(norse.LIFBoxParameters(reset_method=reset_subtract), dt=0.01)  # one step is the input
    return _subtracts(cell(torch.tensor([1.3]))[1].v.item())


def subtraction_sinabs() -> tuple[str, str]:
    from sinabs import layers

    layer = layers.IAF()
    layer(torch.full((1, 1, 1), 1.3))
    return _subtracts(layer.v_mem.item())


def _learns(threshold: bool, leak: bool, how: str) -> tuple[str, str]:
    both_or_one = {(True, True): "both", (True, False): "threshold", (False, True): "leak", (False, False): "no"}
    got = {True: "a gradient", False: "none"}
    return both_or_one[threshold, leak], f"ran: {how}, one backward pass: threshold {got[threshold]}, leak {got[leak]}"


def _nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient != 0).any())


CURRENT = torch.tensor([0.6, 0.7, 0.8, 0.2])  # two to three spikes of a threshold of 1 in four steps


def learnable_here() -> tuple[str, str]:
    from snn_rl import LIF

    layer = LIF(1.0, leak=0.9)
    layer(CURRENT.view(4, 1, 1))[0].sum().backward()
    return _learns(_nonzero(layer.raw_threshold.grad), _nonzero(layer.raw_leak.grad), "`snn_rl.LIF`")


def learnable_spikingjelly() -> tuple[str, str]:
    from spikingjelly.activation_based import neuron

    plif = neuron.ParametricLIFNode(step_mode="m")
    plif(2 * CURRENT.view(4, 1)).sum().backward()
    named = [k.__name__ for k in (neuron.DSRIFNode, neuron.DSRLIFNode) if "v_threshold" in dict(k().named_parameters())]
    text, evidence = _learns(False, _nonzero(plif.w.grad), "`neuron.ParametricLIFNode`")
    return f"{text}; threshold in DSR neurons", _join(
        [evidence, f"`v_threshold` is a parameter of {' and '.join(named)}"]
    )


def learnable_snntorch() -> tuple[str, str]:
    import snntorch

    layer = snntorch.Leaky(beta=0.9, learn_beta=True, learn_threshold=True)
    membrane, spikes = torch.zeros(1), []
    for current in CURRENT:
        spike, membrane = layer(current.view(1), membrane)
        spikes.append(spike)
    torch.stack(spikes).sum().backward()
    how = "`snntorch.Leaky(learn_beta=True, learn_threshold=True)`"
    return _learns(_nonzero(layer.threshold.grad), _nonzero(layer.beta.grad), how)


def learnable_norse() -> tuple[str, str]:
    import norse.torch as norse

    leak, threshold = nn.Parameter(torch.tensor(100.0)), nn.Parameter(torch.tensor(1.0))
    cell, state, spikes = norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=leak, v_th=threshold), dt=0.005), None, []
    for current in 2 * CURRENT:
        spike, state = cell(current.view(1), state)
        spikes.append(spike)
    torch.stack(spikes).sum().backward()
    text, evidence = _learns(_nonzero(threshold.grad), _nonzero(leak.grad), "`LIFBoxCell` given nn.Parameters")
    registered = [name for name, _ in cell.named_parameters()]
    note = f"they are {'' if registered else 'not '}among the cell's `parameters()`"
    return f"{text}, registered by hand", _join([evidence, note])


def learnable_sinabs() -> tuple[str, str]:
    from sinabs import layers

    threshold = nn.Parameter(torch.tensor(1.0))
    layer = layers.LIF(tau_mem=10.0, spike_threshold=threshold, train_alphas=True, norm_input=False)
    layer(CURRENT.view(1, 4, 1)).sum().backward()
    how = "`layers.LIF(train_alphas=True)` given a threshold that is an nn.Parameter"
    return _learns(_nonzero(threshold.grad), _nonzero(layer.alpha_mem.grad), how)


def neurons_here() -> tuple[str, str]:
    import snn_rl.core.neuron

    names = [
        k.__name__
        for k in vars(snn_rl.core.neuron).values()
        if isinstance(k, type) and k.__module__ == "snn_rl.core.neuron"
    ]
    return _count(names, "neuron", "classes of `snn_rl.core.neuron`")


def neurons_spikingjelly() -> tuple[str, str]:
    from spikingjelly.activation_based import base, neuron

    kinds = [
        k
        for k in vars(neuron).values()
        if isinstance(k, type) and issubclass(k, (base.MemoryModule, base.MultiStepModule))
    ]
    names = [k.__name__ for k in kinds if "Base" not in k.__name__]
    return _count(names, "neurons", "modules of `activation_based.neuron` without Base in their name")


def neurons_snntorch() -> tuple[str, str]:
    import snntorch

    kind = importlib.import_module("snntorch._neurons.neurons").SpikingNeuron
    names = {k.__name__ for k in _subclasses(kind)} & set(dir(snntorch)) - {"SpikingNeuron", "LIF"}
    return _count(names, "neurons", "public subclasses of SpikingNeuron, but LIF, a base")


def neurons_norse() -> tuple[str, str]:
    import norse.torch
    from norse.torch.module import snn

    kinds = _subclasses(snn.SNNCell) | _subclasses(snn.SNNRecurrentCell)
    names = {k.__name__.replace("Recurrent", "") for k in kinds if hasattr(norse.torch, k.__name__)}
    return _count(names - {"SNNCell"}, "cells", "subclasses of SNNCell and SNNRecurrentCell, recurrent or not")


def neurons_sinabs() -> tuple[str, str]:
    from sinabs import layers

    names = {re.sub("Recurrent|Squeeze", "", k.__name__) for k in _subclasses(layers.StatefulLayer)}
    return _count(
        names - {"StatefulLayer"}, "neurons", "subclasses of StatefulLayer, recurrent and squeezing ones aside"
    )


def surrogates_here() -> tuple[str, str]:
    import snn_rl.core.surrogate

    names = [k.__name__ for k in _autograd_functions(snn_rl.core.surrogate)]
    return _count(names, "surrogate", "autograd functions of `snn_rl.core.surrogate`")


def surrogates_spikingjelly() -> tuple[str, str]:
    from spikingjelly.activation_based import surrogate

    kinds = _subclasses(surrogate.SurrogateFunctionBase) - {surrogate.SurrogateFunctionBase}
    return _count((k.__name__ for k in kinds), "surrogates", "subclasses of SurrogateFunctionBase")


def surrogates_snntorch() -> tuple[str, str]:
    from snntorch import surrogate

    names = [k.__name__ for k in _autograd_functions(surrogate)]
    return _count(names, "surrogates", "autograd functions of `snntorch.surrogate`")


def surrogates_norse() -> tuple[str, str]:
    from norse.torch.functional import threshold

    names = [v.__name__ for name, v in vars(threshold).items() if name.endswith("_fn") and callable(v)]
    return _count(names, "surrogates", "functions ..._fn in `norse.torch.functional.threshold`")


def surrogates_sinabs() -> tuple[str, str]:
    from sinabs.activation import surrogate_gradient_fn as module

    names = [k.__name__ for k in vars(module).values() if isinstance(k, type) and k.__module__ == module.__name__]
    return _count(names, "surrogates", "classes of `sinabs.activation.surrogate_gradient_fn`")


def _explicit(same: bool, how: str) -> tuple[str, str]:
    if not same:
        raise NotFound(f"{how}: the same input and state gave two results")
    return "yes", f"ran: {how} twice with one input and one state: one result"


def explicit_here() -> tuple[str, str]:
    from snn_rl import to_spiking

    ann, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(3, 4)
    network = to_spiking(ann, x)
    same = torch.equal(network(x)[0], network(x)[0])  # nor does it remember where no state is given
    return _explicit(same, "a network of `to_spiking`, from silence,")


def hidden_spikingjelly() -> tuple[str, str]:
    from spikingjelly.activation_based import functional, neuron

    node, x = neuron.LIFNode(), torch.full((1,), 0.6)
    node(x)
    once = node.v.clone()
    node(x)
    if torch.equal(once, node.v):
        raise NotFound("LIFNode no longer remembers")
    v = torch.zeros(1)
    step = [functional.lif_multi_step(x.view(1, 1), v)[1] for _ in range(2)]
    _resolve("spikingjelly.activation_based.base:to_functional_forward")
    if not torch.equal(*step):
        raise NotFound("functional.lif_multi_step remembers")
    return (
        "on request",
        "ran: `neuron.LIFNode` keeps its membrane in the module (`functional.reset_net` clears it); "
        "`functional.lif_multi_step(x, v)` takes and returns it; "
        "`base.to_functional_forward` makes a function of a module",
    )


def hidden_snntorch() -> tuple[str, str]:
    import snntorch

    layer, x, membrane = snntorch.Leaky(beta=0.9), torch.full((1,), 0.6), torch.zeros(1)
    same = torch.equal(layer(x, membrane)[1], layer(x, membrane)[1])
    remembers = not torch.equal(layer(x)[1], layer(x)[1])
    text, evidence = _explicit(same, "`snntorch.Leaky(x, mem)`")
    if not remembers:
        return text, evidence
    return "yes, where passed", _join([evidence, "called without `mem` it remembers the last one"])


def explicit_norse() -> tuple[str, str]:
    import norse.torch as norse

    cell, x = norse.LIFBoxCell(), torch.full((1,), 0.6)
    return _explicit(torch.equal(cell(x)[1].v, cell(x)[1].v), "`LIFBoxCell`, from silence,")


def hidden_sinabs() -> tuple[str, str]:
    from sinabs import layers

    layer, x = layers.IAF(), torch.full((1, 1, 1), 0.6)
    layer(x)
    once = layer.v_mem.clone()
    layer(x)
    if torch.equal(once, layer.v_mem):
        raise NotFound("IAF no longer remembers")
    return "no", "ran: `layers.IAF` keeps its membrane in the buffer `v_mem`; `reset_states` clears it"


def _onnx_names(module: nn.Module, arguments: tuple[Any, ...], *, dynamo: bool) -> str:
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/neuron.onnx"
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(module.eval(), arguments, path, dynamo=dynamo)
        graph = onnx.load(path).graph
    return f"{len(graph.input)} inputs ({', '.join(i.name for i in graph.input)}), {len(graph.output)} outputs"


class _SpikingJellyStep(nn.Module):
    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from spikingjelly.activation_based import functional, surrogate

        return functional.lif_step(x, v, 2.0, True, 1.0, None, surrogate.Sigmoid(spiking=True))


def onnx_spikingjelly() -> tuple[str, str]:
    names = _onnx_names(_SpikingJellyStep(), (torch.zeros(1, 1), torch.zeros(1, 1)), dynamo=True)
    return (
        "by hand",
        f"ran: `torch.onnx.export` of a module around `functional.lif_step(x, v, ...)`: {names}; no exporter",
    )


def onnx_snntorch() -> tuple[str, str]:
    import snntorch

    layer = snntorch.Leaky(beta=0.9, surrogate_disable=True)
    names = _onnx_names(layer, (torch.zeros(1, 1), torch.zeros(1, 1)), dynamo=False)
    return (
        "by hand",
        f"ran: `torch.onnx.export(Leaky(surrogate_disable=True), (x, mem), dynamo=False)`: {names}; no exporter",
    )


def onnx_norse() -> tuple[str, str]:
    import norse.torch as norse

    names = _onnx_names(
        norse.LIFBoxCell(), (torch.zeros(1, 1), norse.LIFBoxFeedForwardState(torch.zeros(1, 1))), dynamo=True
    )
    return (
        "by hand",
        f"ran: `torch.onnx.export(LIFBoxCell(), (x, state), dynamo=True)`: {names}; no exporter of its own",
    )


def gpu_of_snn_rl() -> tuple[str, str]:
    paragraph = next((p for p in (ROOT / "docs/benchmarks.md").read_text().split("\n\n") if p.startswith("CUDA:")), "")
    measured = "no such machine has been at hand" not in " ".join(paragraph.split())
    text = "Triton" if measured else "Triton, not yet run on a GPU"
    return text, "what has been run on a GPU: `docs/benchmarks.md`, the paragraph that begins with CUDA"


def event_datasets_of_spikingjelly() -> tuple[str, str]:
    files = [f.stem for f in (_folder("spikingjelly") / "datasets").glob("*.py")]
    names = set(files) - {"__init__", "base", "transform", "utils"}
    return _count(names, "data sets", "modules of `spikingjelly.datasets`")


def event_datasets_of_snntorch() -> tuple[str, str]:
    files = [f.stem for f in (_folder("snntorch") / "spikevision/spikedata").glob("*.py")]
    if "DeprecationWarning" not in (_folder("snntorch") / "spikevision/__init__.py").read_text():
        raise NotFound("snntorch.spikevision is no longer deprecated")
    count, evidence = _count(set(files) - {"__init__"}, "data sets", "modules of `snntorch.spikevision.spikedata`")
    return f"{count}, deprecated", _join([evidence, "importing it warns that it is deprecated, for Tonic"])


def tuning_of_zoo() -> tuple[str, str]:
    source = (_folder("rl_zoo3") / "hyperparams_opt.py").read_text()
    names = re.findall(r"^def sample_(\w+)_params", source, re.MULTILINE)
    count, evidence = _count(names, "search spaces", "functions sample_..._params of `rl_zoo3.hyperparams_opt`")
    return f"yes: Optuna, {count} search spaces", evidence


# --- rows -----------------------------------------------------------------------------------------

SJ = "spikingjelly.activation_based"
EX = "activation_based/examples"
NO_AGENTS = r"q.?learning|\bdqn\b|replay_?(buffer|memory)"
ROWS: dict[str, dict[Library, Probe]] = {
    "Spiking Q-learning agent": {
        SNN_RL: both(has("snn_rl:SpikingDQN"), by_tests("rl/test_dqn.py::test_it_learns_a_task_that_needs_memory")),
        SPIKINGJELLY: defines(
            "spikingjelly",
            f"{EX}/spiking_dqn_state.py:DQSN",
            f"{EX}/dsqn/train.py:test",
            text="example scripts",
        ),
        SNNTORCH: lacks(SNNTORCH, NO_AGENTS),
        NORSE: lacks(NORSE, NO_AGENTS),
        SINABS: lacks(SINABS, NO_AGENTS),
        **no_spikes,
    },
    "Reinforcement-learning algorithms": {
        SNN_RL: ran(rl_algorithms_of_snn_rl),
        SPIKINGJELLY: both(
            defines("spikingjelly", f"{EX}/spiking_dqn_state.py:train", f"{EX}/spiking_a2c.py:ActorCritic"),
            both(
                mentions("spikingjelly", f"{EX}/spiking_ppo.py", "clip_param|ratio"),
                defines("spikingjelly", f"{EX}/ilc_san/hybrid_td3_cuda_norm.py:spike_td3"),
            ),
            text="spiking DQN, A2C, PPO, TD3 (example scripts)",
        ),
        SNNTORCH: lacks(SNNTORCH, "reinforce|policy.gradient|actor.?critic"),
        NORSE: defines("norse", "task/cartpole.py:LSNNPolicy", text="spiking policy gradient (example script)"),
        SINABS: lacks(SINABS, "reinforce|policy.gradient|actor.?critic"),
        SB3: ran(rl_algorithms_of_sb3),
        ZOO: ran(rl_algorithms_of_zoo),
    },
    "Membranes carried by `predict(observation, state, episode_start)`": {
        SNN_RL: both(ran(state_in_predict), by_tests("rl/test_dqn.py::test_episode_start_clears_only_its_environment")),
        **{library: lacks(library, "episode_start") for library in (SPIKINGJELLY, SNNTORCH, NORSE, SINABS)},
        SB3: ran(lstm_state_in_predict),
        ZOO: both(as_sb3, mentions("rl_zoo3", "enjoy.py", "episode_start=episode_start")),
    },
    "Off-policy replay of sequences with burn-in": {
        SNN_RL: both(
            has("snn_rl.rl:SequenceReplayBuffer"),
            by_tests(
                "rl/test_replay.py::test_windows_are_what_was_played",
                "rl/test_dqn.py::test_gradients_flow_through_the_trained_frames_only",
            ),
        ),
        SPIKINGJELLY: lacks(SPIKINGJELLY, "burn_?in", note="the examples replay single transitions"),
        SNNTORCH: lacks(SNNTORCH, r"replay"),
        NORSE: lacks(NORSE, r"burn_?in|replay_?(buffer|memory)"),
        SINABS: lacks(SINABS, "replay|burn_?in"),
        SB3: lacks(SB3, "burn_?in", note="sb3-contrib's RecurrentPPO learns from sequences, on-policy"),
        ZOO: lacks(ZOO, "burn_?in"),
    },
    "Several environments at once": {
        SNN_RL: by_tests(
            "rl/test_dqn.py::test_exploration_draws_per_environment_and_never_freezes_the_membranes",
            "envs/test_classic.py::test_copy_i_is_gymnasiums_game_of_seed_plus_i",
            text="any SB3 VecEnv",
        ),
        SPIKINGJELLY: defines(
            "spikingjelly", f"{EX}/common/multiprocessing_env.py:SubprocVecEnv", text="in example scripts"
        ),
        **{library: lacks(library, "VecEnv") for library in (SNNTORCH, NORSE, SINABS)},
        SB3: has("stable_baselines3.common.vec_env:SubprocVecEnv", "stable_baselines3.common.vec_env:DummyVecEnv"),
        ZOO: mentions("rl_zoo3", "exp_manager.py", "SubprocVecEnv", text="yes: a flag"),
    },
    "Neuron models": {
        SNN_RL: ran(neurons_here),
        SPIKINGJELLY: ran(neurons_spikingjelly),
        SNNTORCH: ran(neurons_snntorch),
        NORSE: ran(neurons_norse),
        SINABS: ran(neurons_sinabs),
        **no_spikes,
    },
    "Surrogate gradients": {
        SNN_RL: ran(surrogates_here),
        SPIKINGJELLY: ran(surrogates_spikingjelly),
        SNNTORCH: ran(surrogates_snntorch),
        NORSE: ran(surrogates_norse),
        SINABS: ran(surrogates_sinabs),
        **no_spikes,
    },
    "Reset by subtraction": {
        SNN_RL: ran(subtraction_here),
        SPIKINGJELLY: ran(subtraction_spikingjelly),
        SNNTORCH: ran(subtraction_snntorch),
        NORSE: ran(subtraction_norse),
        SINABS: ran(subtraction_sinabs),
        **no_spikes,
    },
    "Threshold and leak learned": {
        SNN_RL: ran(learnable_here),
        SPIKINGJELLY: ran(learnable_spikingjelly),
        SNNTORCH: ran(learnable_snntorch),
        NORSE: ran(learnable_norse),
        SINABS: ran(learnable_sinabs),
        **no_spikes,
    },
    "State as an argument, none hidden": {
        SNN_RL: both(ran(explicit_here), by_tests("core/test_network.py::test_a_network_keeps_no_state")),
        SPIKINGJELLY: ran(hidden_spikingjelly),
        SNNTORCH: ran(hidden_snntorch),
        NORSE: ran(explicit_norse),
        SINABS: ran(hidden_sinabs),
        **no_spikes,
    },
    "Local learning rules (STDP)": {
        SNN_RL: lacks(SNN_RL, "stdp|hebb"),
        SPIKINGJELLY: has(f"{SJ}.learning:STDPLearner", f"{SJ}.learning:MSTDPLearner"),
        SNNTORCH: has("snntorch.functional.stdp_learner:STDPLearner"),
        NORSE: has("norse.torch.functional.stdp:stdp_step_linear"),
        SINABS: lacks(SINABS, "stdp|hebb"),
        **no_spikes,
    },
    "ANN to SNN": {
        SNN_RL: both(
            ran(conversion_here),
            by_tests("core/test_convert.py::test_what_cannot_be_converted_is_refused_by_node_name"),
        ),
        SPIKINGJELLY: ran(conversion_spikingjelly),
        SNNTORCH: lacks(SNNTORCH, r"ann2snn|ann_?to_?snn|nn\.ReLU|fx\.symbolic_trace"),
        NORSE: lacks(NORSE, r"ann2snn|ann_?to_?snn|nn\.ReLU|fx\.symbolic_trace"),
        SINABS: ran(conversion_sinabs),
        **no_spikes,
    },
    "Temporal pruning to one micro-step": {
        SNN_RL: both(
            has("snn_rl:prune_timesteps"),
            by_tests(
                "core/test_prune.py::test_rates_per_micro_step_stay",
                "runs/test_agent.py::test_the_parents_weights_are_the_childs_start",
            ),
        ),
        **{library: lacks(library, r"\bprun") for library in (SPIKINGJELLY, SNNTORCH, NORSE, SINABS)},
        **no_spikes,
    },
    "Fused LIF over time, CPU": {
        SNN_RL: both(
            has("snn_rl.core.scan._cpu:cpu_scan"),
            by_tests("core/test_scan.py::test_same_as_the_reference"),
            text="yes: numba",
        ),
        SPIKINGJELLY: says("spikingjelly", "CPU uses Torch; CUDA eager prefers compatible native CUDA", text="no"),
        SNNTORCH: both(
            has("snntorch:LeakyParallel", "snntorch:StateLeaky"),
            mentions("snntorch", "_neurons/leakyparallel.py", "There is no explicit reset mechanism"),
            text="without reset",
        ),
        NORSE: lacks(NORSE, "numba|load_inline|CppExtension", note="`torch.compile` and `torch.jit` are the user's"),
        SINABS: lacks(SINABS, "numba|load_inline|CppExtension"),
        **no_spikes,
    },
    "Fused LIF over time, CUDA": {
        SNN_RL: both(
            both(ran(gpu_of_snn_rl), defines("snn_rl", "core/scan/_cuda.py:cuda_scan")),
            by_tests("core/test_scan.py::test_triton_agrees", "core/test_scan.py::test_triton_kernels_compile"),
        ),
        SPIKINGJELLY: both(
            defines("spikingjelly", "_ops/lif/triton.py:_forward_kernel", "_ops/lif/triton.py:_backward_kernel"),
            says("spikingjelly", "automatic Torch/Triton/native CUDA execution", text=""),
            text="yes: Triton, native CUDA",
        ),
        SNNTORCH: has(
            "snntorch:LeakyParallel", "snntorch:StateLeaky", text="without reset", note="by torch's RNN and convolution"
        ),
        NORSE: lacks(NORSE, "import triton|cupy|load_inline|CUDAExtension"),
        SINABS: mentions(
            "sinabs",
            "from_torch.py",
            "import sinabs.exodus.layers",
            text="in another package",
            note="sinabs-exodus, not run",
        ),
        **no_spikes,
    },
    "Spike rates and energy": {
        SNN_RL: both(
            has("snn_rl:activity"),
            by_tests("core/test_activity.py::test_operations_and_energy_by_hand"),
            text="rates, operations, energy",
        ),
        SPIKINGJELLY: has(
            f"{SJ}.op_counter.simple_energy:estimate_simple_energy",
            f"{SJ}.op_counter.synop:SynOpCounter",
            f"{SJ}.monitor:OutputMonitor",
            text="rates, operations, energy",
        ),
        SNNTORCH: lacks(SNNTORCH, "energy|synop|firing_rate"),
        NORSE: lacks(NORSE, r"energy(?!-efficient)|synop|firing_rate"),
        SINABS: both(has("sinabs.synopcounter:SNNAnalyzer"), lacks(SINABS, r"\benergy\b"), text="rates, operations"),
        **no_spikes,
    },
    "NIR, out and in": {
        SNN_RL: both(
            has("snn_rl.share:write_nir", "snn_rl.share:read_nir"),
            by_tests("share/test_nir.py::test_a_file_comes_back_as_the_network_it_was"),
        ),
        SPIKINGJELLY: has(f"{SJ}.nir_exchange:export_to_nir", f"{SJ}.nir_exchange:import_from_nir"),
        SNNTORCH: has("snntorch.export_nir:export_to_nir", "snntorch.import_nir:import_from_nir"),
        NORSE: has("norse.torch.utils.export_nir:to_nir", "norse.torch.utils.import_nir:from_nir"),
        SINABS: has("sinabs:to_nir", "sinabs:from_nir"),
        SB3: lacks(SB3, r"\bnir\b"),
        ZOO: lacks(ZOO, r"\bnir\b"),
    },
    "ONNX with membranes as inputs and outputs": {
        SNN_RL: both(
            has("snn_rl.share:write_onnx"),
            by_tests("share/test_onnx.py::test_inputs_are_named_and_the_batch_is_free"),
        ),
        SPIKINGJELLY: both(ran(onnx_spikingjelly), lacks(SPIKINGJELLY, "onnx")),
        SNNTORCH: ran(onnx_snntorch),
        NORSE: ran(onnx_norse),
        SINABS: lacks(SINABS, "onnx"),
        SB3: cites(
            "https://stable-baselines3.readthedocs.io/en/master/guide/export.html",
            text="by hand, no membranes",
            note="SB3 has no exporter; its documentation shows how to write one for a policy",
        ),
        ZOO: lacks(ZOO, "onnx"),
    },
    "Neuromorphic chips": {
        SNN_RL: lacks(SNN_RL, "loihi|lava|speck|dynap|lynxi", text="through NIR only"),
        SPIKINGJELLY: defines(
            "spikingjelly",
            "activation_based/lava_exchange.py:CubaLIFNode",
            "activation_based/lynxi_exchange.py:to_lynxi_supported_module",
            text="Loihi (Lava), Lynxi",
        ),
        SNNTORCH: lacks(SNNTORCH, "loihi|lava|speck|dynap|lynxi", text="through NIR only"),
        NORSE: lacks(NORSE, "loihi|lava|speck|dynap|lynxi", text="through NIR only"),
        SINABS: defines(
            "sinabs",
            "backend/dynapcnn/dynapcnn_network.py:DynapcnnNetwork",
            text="Speck, DYNAP-CNN",
            note="found in the source; importing it installs samna from another server",
        ),
        **no_spikes,
    },
    "Event data sets": {
        SNN_RL: lacks(SNN_RL, r"\bdvs|n-?mnist|heidelberg"),
        SPIKINGJELLY: ran(event_datasets_of_spikingjelly),
        SNNTORCH: ran(event_datasets_of_snntorch),
        NORSE: defines(
            "norse", "dataset/spiking_heidelberg.py:SpikingHeidelbergDigitsDataset", text="1 (Heidelberg digits)"
        ),
        SINABS: lacks(SINABS, r"n-?mnist|gesture|heidelberg|import tonic"),
        **no_spikes,
    },
    "Agent files that run no code when loaded": {
        SNN_RL: both(
            has("snn_rl:load_policy"),
            by_tests("rl/test_policy_file.py::test_a_changed_description_is_refused"),
            text="yes: safetensors",
        ),
        SPIKINGJELLY: mentions(
            "spikingjelly",
            "activation_based/distributed/llm/sglang_export.py",
            "safetensors",
            text="for language models only",
            note="no agents",
        ),
        SNNTORCH: lacks(SNNTORCH, "safetensors", text="no agents"),
        NORSE: lacks(NORSE, "safetensors", text="no agents"),
        SINABS: lacks(SINABS, "safetensors", text="no agents"),
        SB3: both(
            lacks(SB3, "safetensors"),
            mentions("stable_baselines3", "common/save_util.py", "cloudpickle.loads"),
            text="no",
        ),
        ZOO: lacks(ZOO, "safetensors"),
    },
    "Hugging Face hub": {
        SNN_RL: both(has("snn_rl.share.hub:push"), by_tests("share/test_hub.py::test_what_is_pushed"), text="out"),
        **{
            library: lacks(library, "huggingface_hub|push_to_hub|from_pretrained.*hub")
            for library in (SPIKINGJELLY, SNNTORCH, NORSE, SINABS)
        },
        SB3: has("huggingface_sb3:load_from_hub", "huggingface_sb3:push_to_hub", text="in another package"),
        ZOO: defines(
            "rl_zoo3", "push_to_hub.py:package_to_hub", "load_from_hub.py:download_from_hub", text="out and in"
        ),
    },
    "A killed training goes on from the same command": {
        SNN_RL: by_tests("runs/test_agent.py::test_ten_kills_at_random_moments"),
        SPIKINGJELLY: mentions(
            "spikingjelly",
            f"{EX}/classify_dvsg.py",
            "-resume",
            text="a flag in example scripts",
            note="none of its agents",
        ),
        SNNTORCH: lacks(SNNTORCH, r"\bresum|checkpoint"),
        NORSE: lacks(NORSE, r"\bresum"),
        SINABS: lacks(SINABS, r"\bresum|checkpoint"),
        SB3: has("stable_baselines3.common.callbacks:CheckpointCallback", text="checkpoints, by your own script"),
        ZOO: mentions("rl_zoo3", "train.py", "--trained-agent", text="checkpoints, with another command"),
    },
    "Hyperparameter search": {
        SNN_RL: lacks(
            SNN_RL,
            "import optuna",
            note="RL Zoo's `-optimize` has no search space for `spiking_dqn` either, `docs/zoo.md`",
        ),
        **{library: lacks(library, r"optuna|ray\.tune") for library in (SPIKINGJELLY, SNNTORCH, NORSE, SINABS, SB3)},
        ZOO: ran(tuning_of_zoo),
    },
    "Several GPUs or machines": {
        SNN_RL: by_tests(
            "vision/test_training.py::test_two_processes_train_as_one_does",
            "cli/test_sweep.py::test_a_killed_worker_and_runs_that_fail_lose_no_other",
            text="sweeps of agents (Ray), data-parallel classifiers",
            note="two processes of one machine under torchrun, two Ray workers of one machine",
        ),
        SPIKINGJELLY: both(
            defines("spikingjelly", "activation_based/distributed/tensor_parallel/channel.py:ChannelShardConv2d"),
            says("spikingjelly", "Experimental distributed execution for multi-GPU workloads", text=""),
            text="yes, called experimental",
        ),
        SNNTORCH: lacks(SNNTORCH, "DistributedDataParallel|torchrun|init_process_group"),
        NORSE: mentions("norse", "task/mnist_pl.py", "LightningModule", text="by Lightning, in an example"),
        SINABS: lacks(SINABS, "DistributedDataParallel|torchrun|init_process_group"),
        SB3: lacks(SB3, "DistributedDataParallel|torchrun|init_process_group"),
        ZOO: mentions("rl_zoo3", "train.py", "--storage", text="search only", note="trials share a database"),
    },
    "Trained agents": {
        SNN_RL: by_tests("test_pretrained.py::test_a_shipped_file_plays", text="yes: CartPole, Pong"),
        **{library: ships_no_weights(library) for library in (SPIKINGJELLY, SNNTORCH, NORSE, SINABS)},
        SB3: ships_no_weights(SB3, note="RL Zoo's are made with it"),
        ZOO: says(
            "rl_zoo3", "200+ Trained Agents", text="200+, none spiking", note="outside the package, not downloaded"
        ),
    },
}


# --- the document ---------------------------------------------------------------------------------

INTRODUCTION = """# Features, side by side

Written by `make features`, from probes of the installed packages; `python benchmarks/features.py --check` compares this
page with what is found, as `make test` does for the packages in `.venv`. "no" means that the Python files of the
package, tests apart, were searched and nothing was found. The second part of the page says for every cell what was run,
found or searched. A cell says what is there, not how good it is; speed is in [benchmarks.md](benchmarks.md). Packages
beside these, such as Tonic, sinabs-exodus and Lava, are not compared. SB3 stands for stable-baselines3 and sb3-contrib.
"""


def found(only: Sequence[Library]) -> dict[tuple[str, str], Cell]:
    """What the probes find: (row, library) to cell."""
    cells = {}
    for row, probes in ROWS.items():
        for library in only:
            try:
                cells[row, library.name] = probes[library]()
            except Exception as error:  # whatever a library raises, the cell is what is at stake
                cells[row, library.name] = Cell("?", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return cells


def render(cells: dict[tuple[str, str], Cell], versions: dict[str, str]) -> str:
    names = [library.name for library in LIBRARIES]
    lines = [INTRODUCTION, "Versions: " + "; ".join(versions[name] for name in names) + ".", ""]
    lines += [f"| | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(cells[row, name].text for name in names)} |" for row in ROWS]
    lines += ["", "## What each cell rests on"]
    for row in ROWS:
        lines += ["", f"### {row}", ""]
        lines += [f"- {name}: **{cells[row, name].text}**. {_markdown(cells[row, name].evidence)}" for name in names]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """Asterisks and bars outside code mean what they say."""
    return "`".join(
        part if i % 2 else part.replace("*", r"\*").replace("|", r"\|") for i, part in enumerate(text.split("`"))
    )


def parse(text: str) -> tuple[dict[tuple[str, str], Cell], dict[str, str]]:
    """The cells and versions of a document that `render` wrote; the table and the list below it must say the same."""
    cells, row, table = {}, "", {}
    names = [library.name for library in LIBRARIES]
    versions: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("Versions: "):
            versions = dict(zip(names, line.removeprefix("Versions: ").removesuffix(".").split("; "), strict=False))
        elif line.startswith("| ") and not line.startswith("| |"):
            first, *texts = (part.strip() for part in line.strip("|").split(" | "))
            table.update({(first, name): text for name, text in zip(names, texts, strict=False)})
        elif line.startswith("### "):
            row = line.removeprefix("### ")
        elif match := re.fullmatch(r"- ([^:]+): \*\*(.*?)\*\*\. (.*)", line):
            cells[row, match[1]] = Cell(match[2], match[3])
    for key, text in table.items():
        if key in cells and cells[key].text != text:
            cells[key] = Cell(f"{text} (table), {cells[key].text} (list)", cells[key].evidence)
    return cells, versions


def disagreements(document: dict[tuple[str, str], Cell], now: dict[tuple[str, str], Cell]) -> list[str]:
    lines = []
    for key, cell in now.items():
        written = document.get(key)
        if written is None:
            lines.append(f"{' / '.join(key)}: not in the document; found {cell.text!r}: {cell.evidence}")
        elif (written.text, written.evidence) != (cell.text, _markdown(cell.evidence)):
            lines.append(
                f"{' / '.join(key)}: the document says {written.text!r}: {written.evidence}\n"
                f"    found {cell.text!r}: {cell.evidence}"
            )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--tests", action="store_true", help="run the tests of this repository that cells name")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="in place of docs/features.md")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # of torch and Triton

    installed = [library for library in LIBRARIES if not library.missing]
    for library in LIBRARIES:
        if library.missing:
            print(f"{library.name}: not installed here ({', '.join(library.missing)}); its cells are not probed")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        now = found(installed)
    if options.tests:
        return subprocess.run([sys.executable, "-m", "pytest", *sorted(TESTS)], cwd=ROOT, check=False).returncode
    for (row, name), cell in now.items():
        print(f"{row} / {name}: {cell.text}: {cell.evidence}")

    document, versions = parse(options.document.read_text()) if options.document.is_file() else ({}, {})
    current = {library.name: library.versions for library in installed}
    others = [
        f"{versions[name]} in the document, {v} here" for name, v in current.items() if versions.get(name, v) != v
    ]
    print("\n".join(["", *(f"versions differ from the document's: {line}" for line in others)]).rstrip())
    unknown = [f"{' / '.join(key)}: {cell.evidence}" for key, cell in now.items() if cell.text == "?"]
    if options.check:
        problems = disagreements(document, now)
        print("\n".join(problems) or f"{len(now)} cells agree with {options.document.name}")
        return 1 if problems else 0
    if unknown:
        print("\n".join(["nothing written; the table expects what is not so:", *unknown]))
        return 1
    empty = [
        key for row in ROWS for key in ((row, library.name) for library in LIBRARIES) if key not in {**document, **now}
    ]
    if empty:
        print(f"nothing written: no cell for {empty[0]}, and its library is not installed")
        return 1
    kept = {key: Cell(cell.text, cell.evidence) for key, cell in document.items() if key not in now}
    text = render({**{k: unescaped(c) for k, c in kept.items()}, **now}, {**versions, **current})
    options.document.write_text(text)
    print(f"wrote {options.document.name}: {len(now)} cells probed, {len(ROWS) * len(LIBRARIES) - len(now)} kept")
    return 0


def unescaped(cell: Cell) -> Cell:
    return Cell(cell.text, cell.evidence.replace(r"\*", "*").replace(r"\|", "|"))


if __name__ == "__main__":
    sys.exit(main())
