"""Conversion: what it accepts, what it refuses and how, and that the result is the ANN in spikes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from snn_rl import LIF, SpikingNetwork, activity, count_spikes, prune_timesteps, to_spiking
from snn_rl.core.network import FrameDropout, Gain


class Residual(nn.Module):
    """Batch-norm, a reused ReLU module, an in-place addition, the functional spellings, dropout, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        shortcut = x
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.conv3(x)
        x += shortcut
        x = self.drop(torch.relu(x))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(x.view(x.size(0), -1))


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(0)
    net = Residual()
    for _ in range(5):
        net(torch.randn(16, 3, 8, 8))  # batch-norm statistics that are not the initial ones
    return net.eval()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def test_with_many_timesteps_the_network_is_the_ann(residual: nn.Module) -> None:
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        expected = residual(x)
        errors = [
            (to_spiking(residual, x, 100.0, timesteps, leak=1.0)(x)[0] - expected).abs().max().item()
            for timesteps in (10, 100, 1000)
        ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01 * expected.abs().max().item()


def dense_block(m: nn.ModuleList, x: Tensor) -> Tensor:
    """As DenseNet: each layer sees all that came before it, spikes and the analogue input among them."""
    seen = [x]
    for layer in m[:2]:
        seen.append(torch.relu(layer(torch.cat(seen, 1))))
    return m[2](torch.cat([*seen, seen[1] + x], dim=-1))


def shuffled(m: nn.ModuleList, x: Tensor) -> Tensor:
    """Parts of a signal that go different ways: by `split`, by slices of images, by entries."""
    left, right = x.split([3, 3], dim=1)
    spikes = torch.relu(torch.concat((m[0](torch.cat([left, x.narrow(1, 3, 3)], 1)), m[1](x)), dim=1))
    image = spikes.view(x.size(0), 3, 2, 2)
    pooled = F.avg_pool2d(torch.relu(image[:, :, :1]), (1, 2))[:, :, 0, 0]  # a ReLU of spikes, and its output pooled
    return m[2](torch.cat([pooled, torch.unflatten(right, 1, (3, 1))[..., 0]], 1))


def two_branches(m: nn.ModuleList, x: Tensor) -> Tensor:
    """What a ReLU gets is a concatenation of currents, a spike's way around, and the output of it all."""
    spikes = torch.relu(m[0](x[:, :6]))
    again = torch.relu(torch.cat([m[1](spikes), spikes[:, 0:1], x[:, None, 5]], axis=1))
    return torch.cat([m[2](x), again.reshape(-1, 4, 2).flatten(1)], 1)


@pytest.mark.parametrize(
    ("forward", "layers"),
    [
        (dense_block, ((6, 6), (12, 5), (23, 3))),
        (shuffled, ((6, 6), (6, 6), (6, 3))),
        (two_branches, ((6, 6), (6, 6), (6, 3))),
    ],
)
def test_concatenations_and_slices_converge_to_the_ann(forward: Callable[..., Tensor], layers: Any) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in layers)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.layers, x)

    torch.manual_seed(0)
    ann, x = Branches().double(), torch.randn(64, 6).double()
    with torch.no_grad():
        expected = ann(x)
        for rescale in (True, False):
            errors = []
            for timesteps in (6, 60, 600):
                network = to_spiking(ann, x, 100.0, timesteps, leak=1.0, rescale=rescale).eval()
                out = network(x)[0]
                frames, starts = torch.stack([x, x.flip(0)]), torch.ones(2, 64)  # the same, frame by frame
                torch.testing.assert_close(network.unroll(frames, None, starts)[0], torch.stack([out, out.flip(0)]))
                errors.append((out - expected).abs().max().item())
            assert errors[0] > errors[1] > errors[2]
            assert errors[2] < 0.01 * expected.abs().max().item()


def test_what_is_concatenated_has_one_scale_and_spikes_stay_spikes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(11, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([x, torch.relu(self.a(x)), torch.relu(self.b(x))], 1))

    torch.manual_seed(0)
    ann, x = Mixed(), torch.randn(256, 3)
    network = to_spiking(ann, x, 90.0)
    # one threshold is the scale: the input and the other layer's spikes have gains, the first layer's spikes have none
    with torch.no_grad():
        a, b = (torch.quantile(layer(x), 0.9).item() for layer in (ann.a, ann.b))
    gains = sorted(module.factor.item() for module in network.modules() if isinstance(module, Gain))
    assert gains == pytest.approx(sorted([1 / a, b / a]), rel=1e-3)


@pytest.mark.parametrize("make", [mlp, Residual])
def test_rescaled_and_raw_thresholds_give_the_same_spikes(make: type[nn.Module]) -> None:
    ann = make().double().eval()
    x = torch.randn(32, 4).double() if make is mlp else torch.randn(32, 3, 8, 8).double()
    rescaled, raw = to_spiking(ann, x, timesteps=7), to_spiking(ann, x, timesteps=7, rescale=False)
    assert all(lif.threshold.item() == 1.0 for lif in rescaled.lif_layers.values())
    assert any(lif.threshold.item() != 1.0 for lif in raw.lif_layers.values())
    spikes: dict[str, list[Tensor]] = {"rescaled": [], "raw": []}
    outputs = []
    for name, net in (("rescaled", rescaled), ("raw", raw)):
        for lif in net.lif_layers.values():
            lif.register_forward_hook(lambda _m, _i, out, name=name: spikes[name].append(out[0]))
        outputs.append(net(x)[0])
    assert any(s.any() for s in spikes["raw"])
    for ours, theirs in zip(spikes["rescaled"], spikes["raw"], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_thresholds_are_the_percentile_of_the_relu_inputs() -> None:
    ann = mlp()
    x = torch.randn(500, 4)
    net = to_spiking(ann, x, percentile=90.0, rescale=False)
    with torch.no_grad():
        first = ann[0](x)
        second = ann[2](torch.relu(first))
    expected = [np.percentile(h.numpy(), 90.0) for h in (first, second)]
    assert [lif.threshold.item() for lif in net.lif_layers.values()] == pytest.approx(expected, rel=1e-5)


def test_batches_calibrate_as_one_array_does() -> None:
    ann, x = mlp(), torch.randn(100, 4)

    def batches() -> Iterator[np.ndarray]:
        for part in x.split(32):
            yield part.numpy()

    one, many = to_spiking(ann, x.numpy()), to_spiking(ann, batches())
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_mostly_negative_relu_input_still_gets_a_positive_threshold() -> None:
    ann = mlp()
    with torch.no_grad():
        ann[0].bias.fill_(-3.0)  # the 90th percentile is negative
        ann[2].bias.fill_(-1000.0)  # never positive at all
    net = to_spiking(ann, torch.randn(2000, 4), rescale=False)
    first, second = (lif.threshold.item() for lif in net.lif_layers.values())
    assert first > 0
    assert second == 1.0


def test_the_ann_is_left_as_it_was(residual: nn.Module) -> None:
    residual.train()
    before = copy.deepcopy(residual.state_dict())
    net = to_spiking(residual, torch.randn(8, 3, 8, 8))
    assert residual.training
    assert net.training
    assert any(isinstance(m, nn.BatchNorm2d) for m in residual.modules())
    for name, tensor in residual.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_biases_are_kept_and_batch_norm_is_gone(residual: nn.Module) -> None:
    net = to_spiking(residual, torch.randn(8, 3, 8, 8))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 3
    assert all(m.bias is not None for m in convolutions)
    assert (
        sum(isinstance(m, Gain) for m in net.modules()) == 1
    )  # the identity shortcut has no weights to absorb a scale
    assert len(net.lif_layers) == 3


class Spellings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.layers[0](x))
        x = F.relu(self.layers[1](x))
        x = self.layers[2](x).relu()
        x = torch.relu(self.layers[3](x))
        return self.layers[4](x)


def test_every_spelling_of_relu() -> None:
    net = to_spiking(Spellings(), torch.randn(8, 4))
    assert len(net.lif_layers) == 4
    assert all(isinstance(m, LIF) for m in net.lif_layers.values())


class Around(nn.Module):
    """A module between a layer of ReLUs and the readout."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.middle = middle
        self.fc = nn.Linear(4 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.middle(torch.relu(self.conv(x))), 1))


@pytest.mark.parametrize(
    ("middle", "name", "way_out"),
    [
        (nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(2)), "middle_1", "right behind a ReLU"),
        (nn.GELU(), "middle", "train the ANN with ReLU"),
        (nn.Sigmoid(), "middle", "use Linear, Conv"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.AvgPool2d(1)), "middle_0", "right behind a Linear or Conv"),
        (nn.LayerNorm(4), "middle", "use Linear, Conv"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_node_name(middle: nn.Module, name: str, way_out: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot convert node '{name}' .*{way_out}"):
        to_spiking(Around(middle), torch.randn(2, 1, 5, 5))


class Forward(nn.Module):
    """A small network whose forward is given."""

    def __init__(self, forward: object) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.fc2(torch.tanh(m.fc1(x))), "cannot convert node 'tanh'"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x)) + 1.0), "cannot convert node 'add'.*constants into a bias"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x)) * 2), "cannot convert node 'mul'"),
        (lambda m, x: m.fc1(torch.relu(m.fc1(x))), "'fc1' is used twice; give each use its own layer"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x))[:2]), "cannot convert node 'getitem'.*take slices"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x))[:, x[0] > 0]), "cannot convert node 'getitem'"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x))[:, [1, 0, 2, 3]]), "cannot convert node 'getitem'"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x))[..., :1, :]), "cannot convert node 'getitem'"),
        (lambda m, x: m.fc2(torch.cat([torch.relu(m.fc1(x))] * 2)), "cannot convert node 'cat'.*not along the batch"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x)).split(2)[0]), "cannot convert node 'split'"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x)).chunk(2, 1)[0]), "cannot convert node 'chunk'"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x)).narrow(0, 0, 2)), "cannot convert node 'narrow'"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x)).view(2, -1, 4)), "cannot convert node 'view'.*keep the batch"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x)).view(x.size(1), x.size(0))), "cannot convert node 'getitem|size"),
        (lambda m, x: m.fc2(torch.relu(m.fc1(x)).mean(0, keepdim=True)), "cannot convert node 'mean'"),
        (lambda m, x: m.fc2(F.dropout(torch.relu(m.fc1(x)), 0.5)), "dropout that is always on"),
        (lambda m, x: (m.fc2(torch.relu(m.fc1(x))), x), "must return one tensor"),
        (lambda m, x: m.fc2(m.fc1(x)), "no ReLU"),
        (lambda m, x: m.fc1(x) if x.sum() > 0 else m.fc2(x), "must not branch on values"),
    ],
)
def test_functions_that_cannot_be_converted_are_refused(forward: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_spiking(Forward(forward), torch.randn(6, 4))


def in_place_relu(m: Forward, h: Tensor) -> Tensor:
    return nn.functional.relu(h, inplace=True)


def changed_behind_a_view(m: Forward, x: Tensor) -> Tensor:
    h = m.fc1(x)
    return m.fc2(torch.relu_(torch.flatten(h, 1)) + h)


def a_statement(m: Forward, x: Tensor) -> Tensor:
    h = torch.relu(m.fc1(x))
    h.add_(x)
    return m.fc2(h)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (a_statement, "'add_': it changes 'relu' in place, which node 'fc2' reads afterwards"),
        (
            lambda m, x: m.fc2(in_place_relu(m, h := m.fc1(x)) + h),
            "'relu': it changes 'fc1' in place, which node 'add'",
        ),
        (changed_behind_a_view, "'relu_': it changes 'fc1' in place, which node 'add' reads"),
        (lambda m, x: (h := m.fc1(x), m.act(h), m.fc2(h))[2], "'act': it changes 'fc1' in place, which node 'fc2'"),
    ],
)
def test_what_is_changed_in_place_and_read_again_is_refused(forward: object, message: str) -> None:
    network = Forward(forward)
    network.act = nn.ReLU(inplace=True)
    with pytest.raises(ValueError, match=f"cannot convert node {message}"):
        to_spiking(network, torch.randn(6, 4))


def test_operations_in_place_that_nobody_sees_are_converted() -> None:
    def forward(m: Forward, x: Tensor) -> Tensor:
        h = in_place_relu(m, m.fc1(x))
        torch.relu(m.fc1(h))  # of no effect: neither converted nor calibrated
        h += torch.relu_(m.fc2(h))
        return m.fc3(h)

    torch.manual_seed(0)
    ann = Forward(forward)
    ann.fc3 = nn.Linear(4, 2)
    x = torch.randn(64, 4)
    network = to_spiking(ann, x, percentile=100.0, timesteps=400, leak=1.0)
    assert len(network.lif_layers) == 2
    with torch.no_grad():
        torch.testing.assert_close(network(x)[0], ann(x.clone()), atol=0.03, rtol=0)


def test_volumes_and_sequences_are_converted_too() -> None:
    torch.manual_seed(0)
    for conv, shape in ((nn.Conv1d, (2, 8)), (nn.Conv3d, (2, 6, 6, 6))):
        x = torch.rand(16, *shape)
        ann = nn.Sequential(conv(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        ann(x)
        network = to_spiking(ann, x, percentile=100.0, timesteps=400, leak=1.0)
        with torch.no_grad():
            torch.testing.assert_close(network(x)[0], ann(x), atol=0.03, rtol=0)


def test_a_long_calibration_is_sampled_without_favouring_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snn_rl.core.convert.MAX_CALIBRATION_VALUES", 4096)
    ann = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    nn.init.ones_(ann[0].weight)
    values = torch.linspace(0, 1, 100_000)[:, None]  # sorted, so that each batch holds a range of its own
    network = to_spiking(ann, values.split(1000), percentile=90.0, rescale=False)
    (lif,) = network.lif_layers.values()
    assert lif.threshold.item() == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (np.zeros((0, 4)), "calibration batch 0 must be"),
        (None, "calibration must be an array, a tensor, a DataLoader or an iterable of batches, got NoneType"),
        (TensorDataset(torch.zeros(3, 4)), "calibration must be .*, got TensorDataset"),
        ([{"x": torch.zeros(3, 4)}], r"calibration batch 0 must be an array or a tensor, got dict; .*\(x for x, _ in"),
        (["images"], "calibration batch 0 must be an array or a tensor, got str"),
        ([(torch.zeros(3, 4), torch.zeros(3))], "calibration batch 0 must be an array or a tensor, got tuple"),
        ([], "at least one batch, got none"),
        (np.full((3, 4), np.nan), "calibration batch 0 must be finite"),
        (np.zeros((3, 5)), r"calibration batch 0 of shape \(3, 5\) does not fit the network"),
        ([np.zeros((3, 4)), np.full((3, 4), np.inf)], "calibration batch 1 must be finite"),
    ],
)
def test_bad_calibration_is_refused(calibration: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_spiking(mlp(), calibration)  # type: ignore[arg-type]


def test_a_loader_of_pairs_calibrates_by_its_inputs() -> None:
    ann, x = mlp(), torch.rand(32, 4)
    for data in (TensorDataset(x), TensorDataset(x, torch.zeros(32, dtype=torch.long))):
        one, many = to_spiking(ann, x), to_spiking(ann, DataLoader(data, 8))
        for a, b in zip(one.parameters(), many.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_bad_percentile_is_named(percentile: float) -> None:
    with pytest.raises(ValueError, match=rf"percentile must lie in \(0, 100\], got {percentile}"):
        to_spiking(mlp(), torch.randn(8, 4), percentile=percentile)


@pytest.mark.parametrize("timesteps", [0, -1, 2.0, True])
def test_bad_timesteps_are_named(timesteps: object) -> None:
    with pytest.raises(ValueError, match="timesteps must be an integer >= 1, got"):
        to_spiking(mlp(), torch.randn(8, 4), timesteps=timesteps)  # type: ignore[arg-type]


def test_dropout_rests_while_thresholds_are_calibrated() -> None:
    torch.manual_seed(0)
    with_dropout = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU())
    without = nn.Sequential(*(layer for layer in with_dropout if not isinstance(layer, nn.Dropout)))
    x = torch.rand(1000, 8)
    thresholds = [
        [lif.threshold.item() for lif in to_spiking(ann, x, rescale=False).lif_layers.values()]
        for ann in (with_dropout, without)
    ]
    assert thresholds[0] == thresholds[1]


def test_dropout_draws_one_mask_for_all_micro_steps() -> None:
    torch.manual_seed(0)
    drop = FrameDropout(0.5).train()
    out = drop(torch.ones(3, 4, 2, 50))  # frames, steps, batch
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out == out[:, :1]).all()
    assert not (out[0] == out[1]).all()
    assert torch.equal(drop.eval()(out), out)


def test_dropout_in_a_network_trains_and_rests(residual: nn.Module) -> None:
    net = to_spiking(residual, torch.randn(8, 3, 8, 8))
    assert isinstance(net, SpikingNetwork)
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(0)
    net.train()
    assert not torch.equal(net(x)[0], net(x)[0])
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])


class Pooled(nn.Module):
    """Max pooling in every place that is converted: on the input's side, behind a ReLU, in front of one, at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.max_pool2d(self.conv1(x), 2, 1))  # of analogue currents
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.relu(self.pool(self.conv3(x)))
        return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1))


def pooled() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Pooled().eval(), torch.rand(32, 1, 14, 14)


def test_max_pooling_of_spikes_is_exact_at_one_timestep() -> None:
    ann, x = pooled()
    network = to_spiking(ann, x, 90.0, 1)
    assert list(network.spike_pools) == ["pool", "pool_1", "adaptive_max_pool2d"]
    conv1, conv2, conv3, fc = (network.graph.get_submodule(name) for name in ("conv1", "conv2", "conv3", "fc"))
    with torch.no_grad():  # every layer by hand: a neuron fires where its current exceeds 1
        h = (F.max_pool2d(conv1(x), 2, 1) > 1).float()
        h = F.max_pool2d((conv2(h) > 1).float(), 2)
        h = F.max_pool2d((conv3(h) > 1).float(), 2)
        torch.testing.assert_close(network(x)[0], fc(h.amax((2, 3))))


def test_max_pooling_runs_at_every_micro_step_behind_the_last_lif_layer_too() -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 2))
    nn.init.uniform_(ann[0].weight, 0.5, 1.0)
    nn.init.zeros_(ann[0].bias)
    network = to_spiking(ann, torch.rand(32, 1, 2), timesteps=4)
    x = torch.rand(8, 1, 2)
    with torch.no_grad():
        (lif,) = network.lif_layers.values()
        spikes, _ = lif(network.graph.get_submodule("0")(x)[None], hold=4)  # (4, batch, 2, 2)
        either = spikes.amax(-1).mean(0)  # the share of micro-steps in which one of the two fires
        torch.testing.assert_close(network(x)[0], network.graph.get_submodule("4")(either))
        assert not torch.equal(either, spikes.mean(0).amax(-1))  # for which it must not be mistaken


def test_max_pooling_is_counted_as_the_spikes_that_it_lets_through() -> None:
    ann, x = pooled()
    network = to_spiking(ann, x, 90.0, 3)
    seen: list[Tensor] = []
    network.spike_pools["pool"].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad(), count_spikes(network) as counter:
        counter.counted = np.arange(32) < 8
        network(x)
    rates = counter.rates()
    (spikes,) = seen  # (3 * 32, 8, 5, 5)
    assert rates["pool"] == pytest.approx(3 * spikes.unflatten(0, (3, 32))[:, :8].mean().item())
    measured = activity(network, rates, (1, 14, 14))
    assert set(measured.layers) == set(network.lif_layers)
    # the third convolution's additions are those of the spikes behind the pooling
    ops = {"conv1": 4 * 9 * 144, "conv2": 8 * 4 * 9 * 81, "conv3": 8 * 8 * 9 * 16, "fc": 40}
    lif1, _, _ = network.lif_layers
    additions = rates[lif1] * ops["conv2"] + rates["pool"] * ops["conv3"] + rates["adaptive_max_pool2d"] * ops["fc"]
    assert measured.snn_ops == pytest.approx(ops["conv1"] + additions)


def test_pruning_timesteps_goes_through_max_pooling() -> None:
    ann, x = pooled()
    network = to_spiking(ann, x, 90.0, 3)
    pruned = prune_timesteps(network, 1, x[None])
    assert pruned.timesteps == 1
    assert pruned(x)[0].shape == (32, 5)


class Between(nn.Module):
    """Two layers of spikes, and a function of them and of what enters the second in front of the readout."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1), between
        self.last = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.flatten(self.between(h, self.second(h)), 1))


@pytest.mark.parametrize(
    "between",
    [
        lambda h, current: F.max_pool1d(h + torch.relu(current), 2),  # of sums
        lambda h, current: torch.relu(F.avg_pool1d(F.max_pool1d(current, 2), 1)),  # of currents
        lambda h, current: F.max_pool1d(F.avg_pool1d(h, 2), 2),  # of means
        lambda h, current: torch.relu(p := F.max_pool1d(current, 2)) + p,  # the ReLU behind it is not alone
    ],
)
def test_max_pooling_of_anything_but_spikes_is_refused(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    ann, x = Between(between), torch.randn(6, 2, 8)
    ann(x)
    with pytest.raises(ValueError, match=r"cannot convert node 'max_pool1d' .*: place max pooling right behind a ReLU"):
        to_spiking(ann, x)


def test_pooling_by_a_size_of_the_input_is_refused() -> None:
    ann, x = Between(lambda h, current: F.max_pool1d(h, h.size(0))), torch.randn(2, 2, 8)
    ann(x)
    with pytest.raises(
        ValueError, match=r"cannot convert node 'max_pool1d': sizes other than .* nn\.AdaptiveAvgPool2d"
    ):
        to_spiking(ann, x)


def test_max_pooling_with_indices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot convert node '_2'.*returns indices"):
        to_spiking(
            nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU(), nn.MaxPool1d(2, return_indices=True)), torch.rand(2, 1, 4)
        )


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.BatchNorm1d(6), nn.Linear(6, 8)], (6,)),
        ([nn.Flatten(), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 8)], (2, 3)),
        ([nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 8, bias=False)], (2, 3, 3)),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=2), nn.Flatten()], (4, 3, 3)),
        ([nn.BatchNorm1d(6, affine=False), nn.Linear(6, 8)], (6,)),
    ],
)
def test_batch_norm_in_front_of_the_first_layer_folds_into_it(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(*layers, nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    for _ in range(20):
        ann(3 + 2 * torch.randn(64, *shape).double())
    for module in ann:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    x = 3 + 2 * torch.randn(64, *shape).double()
    network = to_spiking(ann, x, 100.0, 2000, leak=1.0).eval()
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in network.modules())
    with torch.no_grad():
        torch.testing.assert_close(network(x)[0], ann.eval()(x), atol=0.01, rtol=0)


def test_batch_norm_in_front_of_padding_is_refused() -> None:
    ann = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3, padding=1), nn.ReLU())
    ann(1 + torch.rand(8, 1, 4, 4))
    with pytest.raises(ValueError, match=r"cannot convert node '_0': batch-norm in front of a layer .* no padding"):
        to_spiking(ann, torch.rand(8, 1, 4, 4))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm1d(4), nn.Linear(4, 4)],  # channels, then features
        [nn.Linear(4, 4), nn.BatchNorm1d(4)],
        [nn.Linear(4, 6), nn.BatchNorm1d(4)],
        [nn.BatchNorm1d(4), nn.Linear(8, 4)],
    ],
)
def test_batch_norm_over_another_dimension_than_the_layer_is_refused(layers: list[nn.Module]) -> None:
    """An offset of all outputs must not hide it."""
    ann = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(64, 4, 8 if layers[-1] is layers[1] and getattr(layers[1], "in_features", 4) == 8 else 4)
    for _ in range(20):
        ann(x * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None] + 1)
    ann[-1].bias.data.add_(1000)
    with pytest.raises(
        ValueError, match=r"'_[01]': batch-norm next to a Linear layer needs inputs of shape \(batch, fea"
    ) as caught:
        to_spiking(ann, x)
    assert "\n" not in str(caught.value)


def test_batch_norm_in_front_of_valid_padding_folds_and_a_frozen_layer_stays_frozen() -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3, padding="valid", bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )
    for _ in range(5):
        ann(1 + torch.rand(8, 1, 4, 4))
    x = 1 + torch.rand(32, 1, 4, 4)
    network = to_spiking(ann.requires_grad_(False), x, 100.0, 1000, leak=1.0).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(x)[0], ann.eval()(x), atol=0.01, rtol=0)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        f"graph.{name}.{raw}" for name in network.lif_layers for raw in ("raw_threshold", "raw_leak")
    }
