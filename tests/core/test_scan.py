"""The compiled LIF scans against the reference in plain PyTorch: forward bit for bit, and all four gradients.

Where there is no CUDA device, Triton's interpreter runs the CUDA kernels, and its compiler shows that they compile.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses import FakeTensorMode

from snn_rl.core.scan import _cpu, lif_scan, reference_scan

Gradients = tuple[Tensor | None, ...]


def run(scan: Any, inputs: list[Tensor | None], weights: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """Spikes, carry, and the gradients of a weighted sum of both to current, carry, threshold and leak."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    spikes, carry = scan(*leaves, *rest)
    loss = (spikes * weights[0]).sum() + (carry * weights[1]).sum()
    return spikes, carry, *torch.autograd.grad(loss, [x for x in leaves if x is not None])


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float) -> None:
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        if i < 2:
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        else:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(1.0, b.abs().max().item() if b.numel() else 0))


def example(
    steps: int, batch: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, hold: int = 1, seed: int = 0
) -> tuple[list[Tensor | None], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, generator=generator)

    inputs: list[Tensor | None] = [normal(steps, batch, *shape), normal(batch, *shape)]
    inputs += [torch.tensor(0.8, dtype=dtype), torch.tensor(0.9, dtype=dtype)]
    return inputs, [normal(steps * hold, batch, *shape), normal(batch, *shape)]


@settings(max_examples=150, deadline=None)
@given(
    frames=st.integers(1, 4),
    steps=st.integers(1, 16),
    hold=st.integers(1, 5),
    batch=st.integers(0, 5),
    shape=st.lists(st.integers(1, 5), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    threshold=st.floats(-0.5, 2.0, width=32),
    leak=st.floats(-0.5, 1.5, width=32),
    leak_reset=st.booleans(),
    masked=st.booleans(),
    silent=st.booleans(),
    order=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    seed=st.integers(0, 1000),
)
def test_same_as_the_reference(
    frames: int, steps: int, hold: int, batch: int, shape: list[int], dtype: torch.dtype, threshold: float, leak: float,
    leak_reset: bool, masked: bool, silent: bool, order: str, seed: int,
) -> None:  # fmt: skip
    # thresholds and leaks beyond their bounds as well: both clamp them, and drop the same gradients
    inputs, weights = example(frames * steps, batch, tuple(shape), dtype, hold, seed)
    current = inputs[0]
    assert current is not None
    if order == "transposed":
        current = current.transpose(0, -1).contiguous().transpose(0, -1)
    elif order == "strided":
        current = torch.stack([current, current], -1)[..., 0]
    elif order == "expanded":
        current = current[:1].expand_as(current)
    inputs = [current, None if silent else inputs[1], torch.tensor(threshold).to(dtype), torch.tensor(leak).to(dtype)]
    keep = (torch.arange(frames * batch).reshape(frames, batch) % 3 > 0).to(dtype) if masked else None
    rest = (keep, hold, leak_reset)
    # the surrogate's slope is 1 / v: at the least threshold of 1e-6 rounding is as large as the gradient
    rtol = 1e-9 if dtype == torch.float64 else 1e-4 if threshold > 0.01 else 1e-2
    ours, expected = run(_cpu.cpu_scan, inputs, weights, *rest), run(reference_scan, inputs, weights, *rest)
    assert_same(ours, expected, rtol)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 17, 64])
@pytest.mark.parametrize("neurons", [1, 7, 1023, 1024, 1025, 5000])
def test_blocks_and_steps(steps: int, neurons: int) -> None:
    inputs, weights = example(steps, 3, (neurons,), torch.float64)
    for keep in (None, torch.tensor([[1.0, 0.0, 1.0]]).double()):
        ours = run(_cpu.cpu_scan, inputs, weights, keep)
        assert_same(ours, run(reference_scan, inputs, weights, keep), 1e-10)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, weights = example(5, 4, (50_000,))
    torch.set_num_threads(1)
    alone = run(_cpu.cpu_scan, inputs, weights)
    torch.set_num_threads(2)
    assert _cpu._threads(10**6) == min(2, _cpu._THREADS)
    for ours, expected in zip(run(_cpu.cpu_scan, inputs, weights), alone, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("threads")
def test_several_threads_scan_at_once() -> None:
    torch.set_num_threads(2)
    inputs, weights = example(5, 4, (50_000,))
    expected = run(_cpu.cpu_scan, inputs, weights)
    results: list[tuple[Tensor, ...]] = []

    def work() -> None:
        for _ in range(5):
            results.append(run(_cpu.cpu_scan, inputs, weights))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 20
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


def _scan_in_child(queue: Any) -> None:
    torch.set_num_threads(1)
    inputs, _ = example(5, 4, (50_000,))
    with torch.no_grad():
        queue.put(lif_scan(*inputs)[0].sum().item())  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.usefixtures("threads")
def test_a_forked_child_scans() -> None:
    torch.set_num_threads(2)
    inputs, _ = example(5, 4, (50_000,))
    with torch.no_grad():
        expected = lif_scan(*inputs)[0].sum().item()  # type: ignore[arg-type]  # OpenMP has run in this process
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_scan_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("hold", [1, 3])
def test_channels_last_stays_channels_last(hold: int) -> None:
    inputs, weights = example(2, 3, (4, 5, 6), hold=hold)
    expected = run(reference_scan, inputs, weights, None, hold)
    current = inputs[0]
    assert current is not None
    inputs[0] = current.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3))
    ours = run(_cpu.cpu_scan, inputs, weights, None, hold)
    assert_same(ours, expected, 1e-5)
    for x in (ours[0].flatten(0, 1), ours[1], ours[2].flatten(0, 1), ours[3]):
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_only_one_output_is_used() -> None:
    inputs, weights = example(4, 2, (3,), torch.float64)
    for i in range(2):
        grads = []
        for scan in (_cpu.cpu_scan, reference_scan):
            leaves = [x.clone().requires_grad_() for x in inputs if x is not None]
            grads.append(torch.autograd.grad((scan(*leaves)[i] * weights[i]).sum(), leaves))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    inputs, _ = example(2, 2, (3,))
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    (grad,) = torch.autograd.grad(lif_scan(*leaves)[1].square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_half_precision_is_computed_in_single() -> None:
    inputs, _ = example(6, 2, (40,))
    halves = [x.bfloat16() for x in inputs if x is not None]
    spikes, carry = lif_scan(*halves)
    expected, expected_carry = lif_scan(*[x.float() for x in halves])
    assert spikes.dtype == torch.bfloat16
    assert carry.dtype == torch.float32
    assert torch.equal(spikes.float(), expected)
    assert torch.equal(carry, expected_carry)


def test_membranes_of_another_precision_are_taken() -> None:
    inputs, _ = example(3, 2, (4,))
    assert inputs[0] is not None
    assert inputs[1] is not None
    assert torch.equal(lif_scan(inputs[0], inputs[1].double(), *inputs[2:])[0], lif_scan(*inputs)[0])  # type: ignore[arg-type]


def test_nan_goes_through_to_the_gradient() -> None:
    current = torch.tensor([[[float("nan"), 0.9]]], requires_grad=True)
    v, leak = torch.tensor(1.0), torch.tensor(0.9)
    results = []
    for scan in (lif_scan, reference_scan):
        spikes, _ = scan(current, None, v, leak)
        results.append(torch.autograd.grad(spikes.sum(), current)[0])
    assert results[0].isnan().tolist() == [[[True, False]]]
    torch.testing.assert_close(results[0], results[1], equal_nan=True)


def test_the_slope_of_the_surrogate_is_not_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code outlives the process that wrote it: a constant inside would outlive its value."""
    current = torch.ones(1, 1, 1, requires_grad=True)
    v, leak = torch.tensor(1.0), torch.tensor(0.9)

    def slope() -> float:
        return torch.autograd.grad(lif_scan(current, None, v, leak)[0].sum(), current)[0].item()

    assert slope() == pytest.approx(0.3)
    monkeypatch.setattr(_cpu, "GAMMA", 1.0)
    assert slope() == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_what_traces_sees_the_reference() -> None:
    inputs, _ = example(3, 2, (4,))
    tensors = tuple(x for x in inputs if x is not None)
    traced = torch.jit.trace(lambda *x: lif_scan(*x), tensors, check_trace=False)
    for ours, expected in zip(traced(*tensors), lif_scan(*tensors), strict=True):
        assert torch.equal(ours, expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        spikes, _ = lif_scan(torch.empty(3, 2, 4), None, torch.tensor(1.0), torch.tensor(0.9))
        assert spikes.shape == (3, 2, 4)


# --- Triton


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    """The CUDA kernels; interpreted where there is no such device (see conftest.py)."""
    return pytest.importorskip("snn_rl.core.scan._cuda")


@pytest.mark.parametrize(
    ("frames", "steps", "hold", "dtype", "threshold", "leak", "masked", "leak_reset", "silent"),
    [
        (1, 1, 1, torch.float64, 0.8, 0.9, False, False, True),
        (1, 5, 1, torch.float32, 0.8, 0.9, False, False, False),
        (1, 1, 5, torch.float64, 0.8, 0.9, False, True, False),
        (2, 3, 4, torch.float64, 0.8, 0.9, True, False, True),
        (7, 5, 1, torch.float64, 0.8, 0.9, True, True, False),  # 35 steps: two launches, cut between frames
        (5, 2, 5, torch.float64, 0.8, 0.9, False, False, False),  # 50 steps
        (1, 64, 1, torch.float64, 0.5, 1.0, False, False, True),
        (1, 3, 1, torch.float64, -1.0, -0.5, False, False, False),  # both out of bounds
        (1, 3, 1, torch.float64, 0.8, 1.5, False, True, False),
    ],
)
def test_triton_agrees(
    cuda: ModuleType, frames: int, steps: int, hold: int, dtype: torch.dtype, threshold: float, leak: float,
    masked: bool, leak_reset: bool, silent: bool,
) -> None:  # fmt: skip
    batch = 3
    inputs, weights = example(frames * steps, batch, (11, 9), dtype, hold)
    inputs = [inputs[0], None if silent else inputs[1], torch.tensor(threshold).to(dtype), torch.tensor(leak).to(dtype)]
    keep = (torch.arange(frames * batch).reshape(frames, batch) % 3 > 0).to(dtype) if masked else None
    where = "cuda" if torch.cuda.is_available() else "cpu"
    moved = [None if x is None else x.to(where) for x in inputs]
    on_device = None if keep is None else keep.to(where)
    ours = run(cuda.cuda_scan, moved, [w.to(where) for w in weights], on_device, hold, leak_reset)
    expected = run(reference_scan, inputs, weights, keep, hold, leak_reset)
    # the surrogate's slope is 1 / v: at the least threshold of 1e-6 rounding is as large as the gradient
    rtol = 1e-4 if dtype == torch.float32 else 1e-9 if threshold > 0 else 1e-6
    assert_same(tuple(x.cpu() for x in ours), expected, rtol)


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 1), (3, 2, 4, 5, 6), (3, 2, 257)])
def test_triton_takes_every_shape_and_order(cuda: ModuleType, shape: tuple[int, ...]) -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, weights = example(shape[0], shape[1], shape[2:])
    expected = run(reference_scan, inputs, weights)
    inputs, weights = [x.to(where) for x in inputs if x is not None], [w.to(where) for w in weights]
    current = inputs[0]
    assert current is not None
    orders = [current, current.transpose(0, -1).contiguous().transpose(0, -1)]
    if current.dim() == 5:
        orders.append(
            current.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, current.shape[:2])
        )
    for order in orders:
        ours = run(cuda.cuda_scan, [order, *inputs[1:]], weights)
        assert_same(tuple(x.cpu() for x in ours), expected, 1e-4)
    if current.dim() == 5:
        assert ours[0].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert ours[2].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("i", [0, 1])
def test_triton_where_one_output_is_used(cuda: ModuleType, i: int) -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, weights = example(4, 2, (3,), torch.float64)
    grads = []
    for scan, device in ((cuda.cuda_scan, where), (reference_scan, "cpu")):
        leaves = [x.to(device).clone().requires_grad_() for x in inputs if x is not None]
        grads.append(torch.autograd.grad((scan(*leaves)[i] * weights[i].to(device)).sum(), leaves))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-9, atol=1e-9)


def test_triton_in_half_precision(cuda: ModuleType) -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, weights = example(6, 2, (40,))
    current = inputs[0]
    assert current is not None
    results = []
    for scan, device in ((cuda.cuda_scan, where), (reference_scan, "cpu")):
        leaves = [x.to(device).requires_grad_() for x in (current.bfloat16(), *inputs[1:]) if x is not None]
        spikes, carry = scan(*leaves)
        assert spikes.dtype == torch.bfloat16
        assert carry.dtype == torch.float32
        loss = (spikes.float() * weights[0].to(device)).sum() + (carry * weights[1].to(device)).sum()
        results.append((spikes, carry, *torch.autograd.grad(loss, leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-2, atol=1e-2)


COMPILE = """
import sys
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from snn_rl.core.scan import _cuda

for kernel in (_cuda._forward, _cuda._backward):
    for number, steps, hold, frame, given in (("fp32", 5, 1, 5, False), ("bf16", 12, 3, 6, True)):
        types = dict.fromkeys(kernel.arg_names, "constexpr")
        for name in ("current", "spikes", "grad_spikes", "grad_current"):
            types[name] = "*" + number
        for name in ("carry_at", "raw_v", "raw_leak", "sums"):
            types[name] = "*fp32"
        for name in ("carry_0", "keep", "grad_carry", "grad_carry_0"):
            types[name] = "*fp32" if given else "constexpr"
        types.update(neurons="i32", rows="i32", width="i32")
        types = {name: types[name] for name in kernel.arg_names}
        values = dict(STEPS=steps, HOLD=hold, FRAME=frame, LEAK_RESET=given, MIN=1e-6, SLOPE=0.3, TYPE=tl.float32)
        values.update(SIZE=_cuda.BLOCK)
        constants = {
            (i,): values.get(name) for i, name in enumerate(kernel.arg_names) if types[name] == "constexpr"
        }
        source = ASTSource(kernel, signature=types, constexprs=constants)
        compiled = compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
        assert "fma.rn" not in compiled.asm["ptx"], "forward and backward may round differently"
        assert ".local" not in compiled.asm["ptx"], "membrane potentials do not stay in registers"
        print(kernel.__name__, number, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests above have run the compiled kernels")
def test_triton_kernels_compile() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*(["_forward", "fp32", "True", "_forward", "bf16", "True"]),
                                   *(["_backward", "fp32", "True", "_backward", "bf16", "True"])]  # fmt: skip


@pytest.mark.parametrize("where", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_without_a_carry_the_rest_is_the_same(request: pytest.FixtureRequest, where: str, steps: int) -> None:
    if where == "triton":
        scan, device = request.getfixturevalue("cuda").cuda_scan, "cuda" if torch.cuda.is_available() else "cpu"
    else:
        scan, device = {"cpu": _cpu.cpu_scan, "reference": reference_scan}[where], "cpu"
    inputs, weights = example(steps, 3, (11,), torch.float64)
    results = []
    for with_carry in (True, False):
        leaves = [x.detach().to(device).requires_grad_() for x in inputs if x is not None]
        spikes, carry = scan(*leaves, with_carry=with_carry)
        assert carry.shape == ((3, 11) if with_carry else (0,))
        loss = (spikes * weights[0].to(device)).sum()
        results.append((spikes, *torch.autograd.grad(loss, leaves)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    with torch.no_grad():
        assert torch.equal(scan(*leaves, with_carry=False)[0], results[0][0])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of Triton's interpreter: inf times 0
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cleared_membrane_is_silent_whatever_it_held(value: float, cuda: ModuleType) -> None:
    """Not only membranes from before, but also those of a frame in the middle; gradients do not pass either way."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    (current, carry, threshold, leak), _ = example(6, 2, (5,), torch.float64)
    assert current is not None
    assert carry is not None
    carry[0] = value
    current[3, 1] = value  # the last step of the second frame
    clear, sound = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]).double(), current.clone()
    sound[3, 1] = 0
    from_silence = torch.cat([torch.zeros_like(carry[:1]), carry[1:]])
    _, want_carry = reference_scan(sound, from_silence, threshold, leak, clear)
    for scan, device in ((reference_scan, "cpu"), (_cpu.cpu_scan, "cpu"), (cuda.cuda_scan, where)):
        moved = [x.to(device).requires_grad_() for x in (current, carry, threshold, leak)]
        spikes, last = scan(*moved, clear.to(device))
        torch.testing.assert_close(last.cpu(), want_carry)
        (grad,) = torch.autograd.grad(last.sum(), moved[0], retain_graph=True)
        assert torch.isfinite(grad[4:]).all()
        (grad_carry,) = torch.autograd.grad(spikes[:2].sum(), moved[1])
        assert torch.equal(grad_carry[0].cpu(), torch.zeros(5).double())
