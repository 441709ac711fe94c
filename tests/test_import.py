"""Importing the package takes no longer than SB3 does, and changes nothing in the process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_large_beside_sb3() -> None:
    """Compilers and what scripts need are imported where they are used. Any of these takes longer than all of ours."""
    printed = run(
        """
        import sys
        import stable_baselines3
        before = set(sys.modules)
        from snn_rl import SpikingDQN
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
        """
    )
    new = set(printed.split())
    assert "snn_rl" in new
    assert not new & {"numba", "llvmlite", "triton", "tyro", "matplotlib", "PIL", "tqdm", "rich", "ray", "nir", "onnx"}


def test_names_are_imported_when_they_are_used() -> None:
    """Until then not even torch: for a help, it would take most of the time."""
    printed = run(
        """
        import sys
        import snn_rl, snn_rl.cli
        print([name for name in ("torch", "numpy", "gymnasium") if name in sys.modules])
        from snn_rl import load_policy, cli
        from snn_rl.rl.policy_file import load_policy as same
        print(load_policy is same, "SpikingDQN" in dir(snn_rl), hasattr(snn_rl, "nothing"), "torch" in sys.modules)
        """
    )
    assert printed.splitlines() == ["[]", "True True False True"]


def test_importing_changes_nothing_in_the_process() -> None:
    printed = run(
        """
        import os, signal, warnings
        import stable_baselines3, torch
        from torch.nn.modules import module
        from torch.optim import optimizer

        def state():
            named = [value for where in (module, optimizer) for name, value in vars(where).items() if "_global" in name]
            hooks = [len(value) for value in named if hasattr(value, "__len__")]
            settings = (
                torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                torch.get_float32_matmul_precision(), torch.initial_seed(), torch.random.get_rng_state().sum().item(),
            )
            handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            return hooks, settings, dict(os.environ), handlers, warnings.filters[:]

        before = state()
        assert len(before[0]) >= 6  # of modules and optimisers: they are where they were
        from snn_rl import SpikingDQN
        print(state() == before)
        """
    )
    assert printed.split() == ["True"]


def test_an_unrelated_optimiser_behaves_as_without_the_package() -> None:
    """A fused step between forward and backward: of a generator's loss through a discriminator, say."""
    code = """
        import torch
        {}
        torch.manual_seed(0)
        w, v = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
        optimizer = torch.optim.Adam(w.parameters(), fused=True)
        x = torch.randn(8, 4, requires_grad=True)
        loss = v(w(x)).sum()
        w(torch.randn(8, 4)).pow(2).sum().backward()
        optimizer.step()
        loss.backward()
        print(x.grad.sum().item())
    """
    assert run(code.format("from snn_rl import SpikingDQN")) == run(code.format(""))
