"""Networks whose weights are computed, shared, wrapped or watched: converted exactly, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from snn_rl import to_spiking
from snn_rl.core.plain import plain_copy


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.3)
    prune.l1_unstructured(layer, "weight", 0.2)  # a container of two masks
    return layer


def symmetric_bias(layer: nn.Module) -> nn.Module:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    return parametrize.register_parametrization(layer, "bias", Doubled())


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "bias": symmetric_bias,
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "pruned": pruned,
    "pruned norm": lambda layer: pruned(parametrizations.weight_norm(layer, "bias")),
}


def convolutional(wrap: Callable[[nn.Module], nn.Module], norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        wrap(nn.Conv2d(2, 4, 3)),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        wrap(nn.Conv2d(4, 8, 3)),
        nn.ReLU(),
        nn.Flatten(),
        wrap(nn.Linear(128, 3)),
    )
    x = torch.rand(32, 2, 8, 8)
    for _ in range(5):  # statistics, and power iterations
        net(x).square().sum().backward()
    return net


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", WRAPS)
def test_weights_that_are_computed_are_converted_as_they_are(name: str, norm: bool) -> None:
    ann = convolutional(WRAPS[name], norm)
    before = {key: value.clone() for key, value in ann.state_dict().items()}
    x = torch.rand(16, 2, 8, 8)
    network = to_spiking(ann, x, 100.0, 600, leak=1.0).eval()
    assert all(torch.equal(value, before[key]) for key, value in ann.state_dict().items())
    with torch.no_grad():
        want, got = ann.eval()(x), network(x)[0]
    assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", WRAPS)
def test_a_plain_copy_computes_the_same_to_the_bit_and_leaves_the_network_whole(name: str) -> None:
    ann = convolutional(WRAPS[name], norm=True).eval()
    x = torch.rand(16, 2, 8, 8)
    with torch.no_grad():
        want = ann(x)
        plain = plain_copy(ann)
        torch.testing.assert_close(plain(x), want, rtol=1e-6, atol=1e-6)
        assert torch.equal(ann(x), want)
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())
    assert {type(module) for module in plain} <= {
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.Identity,
        nn.Flatten,
        nn.Linear,
    }
    for layer in (plain[0], plain[3], plain[6]):
        assert {key for key, _ in layer.named_parameters()} == {"weight", "bias"}
        assert not layer._forward_pre_hooks
    ann.train()(x).sum().backward()  # and goes on being trained


def test_a_weight_that_was_loaded_since_the_last_call_is_the_one_that_is_converted() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        ann, other = (nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)) for _ in "ab")
    ann(torch.rand(2, 4))
    ann.load_state_dict(other.state_dict())  # the layer's weight is computed anew at its next call alone
    with torch.no_grad():
        torch.testing.assert_close(plain_copy(ann)(torch.eye(4)), other(torch.eye(4)))


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_layers_that_share_a_parameter_get_one_each(what: str) -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    setattr(ann[4], what, getattr(ann[2], what))
    x = torch.randn(64, 8)
    with torch.no_grad():
        want, got = ann(x), to_spiking(ann, x, 100.0, 600, leak=1.0)(x)[0]
    assert (got - want).norm() < 0.01 * want.norm()
    assert getattr(ann[4], what) is getattr(ann[2], what)


def test_a_tied_parametrization_is_computed_for_each_layer() -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    ann[2].weight = ann[0].weight
    parametrize.register_parametrization(ann[0], "weight", Symmetric())  # which ann[2] is not
    x = torch.randn(64, 4)
    with torch.no_grad():
        torch.testing.assert_close(plain_copy(ann)(x), ann(x))


def test_frozen_weights_stay_frozen() -> None:
    ann = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ann[0].weight.requires_grad = False
    network = to_spiking(ann, torch.rand(8, 4))
    weights = [network.graph.get_submodule(name).weight for name in ("0", "2")]
    assert [weight.requires_grad for weight in weights] == [False, True]


class Halved(nn.Linear):
    """A known layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Standardised(nn.Conv2d):
    """Weight standardisation, in the method that `nn.Conv2d.forward` calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Named(nn.Linear):
    """A subclass that computes what its base class does."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.label = "hidden"


def test_a_subclass_that_computes_what_its_base_does_is_converted() -> None:
    torch.manual_seed(0)
    ann, x = nn.Sequential(Named(4), nn.ReLU(), Named(4)), torch.rand(64, 4)
    with torch.no_grad():
        torch.testing.assert_close(to_spiking(ann, x, 100.0, 400, leak=1.0)(x)[0], ann(x), atol=0.02, rtol=0)


def test_a_subclass_with_a_forward_of_its_own_is_refused_by_node() -> None:
    with pytest.raises(ValueError, match=r"node '_0_weight': .* computes with '0\.weight' itself; call an nn\.Linear"):
        to_spiking(nn.Sequential(Halved(4, 4), nn.ReLU()), torch.rand(8, 4))
    with pytest.raises(ValueError, match=r"node '_0_weight': .* computes with '0\.weight' itself"):
        to_spiking(nn.Sequential(Standardised(1, 2, 3), nn.ReLU()), torch.rand(8, 1, 4, 4))
    ann = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    ann[0].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"cannot convert node '_0' \(Linear\): it computes its output in its own way"):
        to_spiking(ann, torch.rand(8, 4))


def test_quantisation_aware_layers_are_refused() -> None:
    qat = pytest.importorskip("torch.ao.nn.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    layer = qat.Linear(4, 4, qconfig=quantization.get_default_qat_qconfig())
    with pytest.raises(ValueError, match=r"cannot convert node '_0' \(Linear\): it computes its output in its own way"):
        to_spiking(nn.Sequential(layer, nn.ReLU()), torch.rand(8, 4))


HOOKED: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda m: m.register_forward_hook(lambda _m, _i, out: 2 * out),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda _m, inputs: (2 * inputs[0],)),
}


@pytest.mark.parametrize("where", ["", "0", "1"])
@pytest.mark.parametrize("kind", HOOKED)
def test_a_hook_is_refused_and_named(kind: str, where: str) -> None:
    ann = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    HOOKED[kind](ann.get_submodule(where))
    named = f"layer '{where}', a (Linear|ReLU)" if where else "the network, a Sequential"
    with pytest.raises(ValueError, match=f"cannot convert {named}: it has a {kind}, .*remove the hook"):
        to_spiking(ann, torch.rand(8, 4))


def test_hooks_of_the_backward_pass_stay_with_the_ann() -> None:
    ann = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    seen: list[str] = []
    for name, layer in ann.named_children():
        layer.register_full_backward_hook(lambda _m, _i, _o, name=name: seen.append(name))
        layer.register_full_backward_pre_hook(lambda _m, _o, name=name: seen.append(name))
    network = to_spiking(ann, torch.rand(8, 4))
    network(torch.rand(8, 4))[0].sum().backward()
    assert not seen
    ann(torch.rand(8, 4, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["0", "0", "1", "1", "2", "2"]


def test_layers_may_have_any_name_that_a_module_lets_them_have() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.put, self.module_of = nn.Linear(4, 4), nn.Linear(4, 4)
            self.drop, self.drop_frame = nn.Dropout(0.5), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop_frame(self.drop(torch.relu(self.module_of(torch.relu(self.put(x))))))

    net, x = Named().eval(), torch.rand(32, 4)
    with torch.no_grad():
        torch.testing.assert_close(to_spiking(net, x, 100.0, 400, leak=1.0)(x)[0], net(x), atol=0.03, rtol=0)


def test_a_layer_of_a_name_that_is_taken_is_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.graph(x))

    with pytest.raises(ValueError, match="a layer of the name 'graph', which is taken; rename the layer"):
        to_spiking(Named(), torch.rand(8, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch.compile itself
def test_wrapped_networks_are_refused_with_what_to_pass() -> None:
    net, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(32, 8)
    for wrapped, way_out in (
        (nn.DataParallel(net), r"the network, a DataParallel: pass the network inside it, its \.module"),
        (nn.Sequential(nn.DataParallel(net)), "layer '0', a DataParallel: pass"),
        (torch.compile(net), r"a OptimizedModule: pass the network that torch.compile got, its \._orig_mod"),
    ):
        with pytest.raises(ValueError, match=f"cannot convert {way_out}|{way_out}"):
            to_spiking(wrapped, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_networks_are_refused() -> None:
    net, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(32, 8)
    for scripted in (torch.jit.script(net), torch.jit.trace(net, x)):
        with pytest.raises(ValueError, match=r"pass the network from before torch\.jit\.script or torch\.jit\.trace"):
            to_spiking(scripted, x)


def test_what_is_no_network_or_has_no_shape_yet_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got function"):
        to_spiking(lambda x: x, torch.rand(8, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer '0', a LazyLinear: .*run the network once on an input"):
        to_spiking(nn.Sequential(nn.LazyLinear(4), nn.ReLU()), torch.rand(8, 4))


def test_a_synchronised_batch_norm_is_folded_like_any_other() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(32, 8)
    net(x)
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in twin.modules())
    one, other = to_spiking(net, x), to_spiking(twin, x)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Unseen(nn.Module):
    """Does something that tracing does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if isinstance(x, torch.fx.Proxy) else self.net(1.1 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_traced_network_is_compared_with_the_network_itself(dtype: torch.dtype, offset: float) -> None:
    """Whatever all outputs have in common: an offset does not hide that they differ."""
    ann = Unseen()
    ann.net[2].bias.data.add_(offset)
    if dtype == torch.float16 and offset:
        pytest.skip("half precision rounds numbers around a thousand to halves")
    with pytest.raises(ValueError, match=r"output differs from that of Unseen by .* tracing does not see"):
        to_spiking(ann.to(dtype), torch.rand(8, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_deep_network_is_not_mistaken_for_another(dtype: torch.dtype) -> None:
    """Folding batch-norm rounds; twelve times, in any precision."""
    torch.manual_seed(0)
    blocks = [layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())]
    ann = nn.Sequential(*blocks, nn.Linear(32, 3))
    for _ in range(5):
        ann(torch.randn(256, 32))
    x = torch.randn(64, 32)
    assert len(to_spiking(ann.to(dtype), x).lif_layers) == 12
    to_spiking(ann.to(dtype), x[:1])
    to_spiking(ann.to(dtype), x[:1].expand(8, -1))  # the outputs of the samples do not differ
