"""Importing the package takes no longer than SB3 does, and changes nothing in the process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What a program imports: names of the package, which are imported when they are first used, and single parts.
PARTS = (
    "from snn_rl import *",
    "from snn_rl import SpikingDQN",
    "import snn_rl.runs.agent, snn_rl.vision, snn_rl.share",
)
LARGE = {"numba", "llvmlite", "triton", "tyro", "matplotlib", "tqdm", "rich", "ray", "nir", "onnx", "tensorboard"}


@pytest.mark.parametrize("part", PARTS)
def test_importing_loads_nothing_large_beside_sb3(part: str) -> None:
    """Compilers and what scripts need are imported where they are used. Any of these takes longer than all of ours."""
    printed = run(
        f"""
        import sys
        import stable_baselines3
        before = set(sys.modules)
        {part}
        print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
        """
    )
    new = set(printed.split())
    assert "snn_rl" in new
    assert not new & LARGE


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


def test_the_package_alone_loads_none_of_its_parts() -> None:
    """So that `snn-rl --help` is there at once."""
    printed = run(
        "import sys, snn_rl; print(*(name for name in sys.modules if name.split('.')[0] in ('snn_rl', 'torch')))"
    )
    assert printed.split() == ["snn_rl"]


STATE = """
    import locale, logging, os, random, signal, sys, warnings
    import numpy, stable_baselines3, torch
    from torch.nn.modules import module
    from torch.optim import optimizer

    def state():
        named = logging.root.manager.loggerDict.values()
        loggers = [logging.root, *(log for log in named if hasattr(log, "handlers"))]
        return {
            "hooks": {
                f"{where.__name__}.{name}": len(value)
                for where in (module, optimizer)
                for name, value in vars(where).items()
                if "_global" in name and hasattr(value, "__len__")
            },
            "torch": (
                torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
                torch.get_default_device(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
                torch.get_float32_matmul_precision(), torch.multiprocessing.get_sharing_strategy(),
                torch.initial_seed(), torch.get_rng_state().tolist(),
            ),
            "numpy": (numpy.geterr(), numpy.get_printoptions(), numpy.random.get_state()[1].tolist()),
            "random": random.getstate(),
            "environment": dict(os.environ),
            "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
            "warnings": warnings.filters[:],
            "logging": [(log.name, log.level, log.handlers[:]) for log in loggers if log.level or log.handlers],
            "process": (os.getcwd(), os.nice(0), sys.path[:], sys.excepthook, locale.setlocale(locale.LC_ALL)),
        }
"""


@pytest.mark.parametrize("part", PARTS)
def test_importing_changes_nothing_in_the_process(part: str) -> None:
    printed = run(
        STATE
        + f"""
    before = state()
    assert len(before["hooks"]) >= 6  # of modules and optimisers: they are where they were
    {part}
    after = state()
    print(*(name for name in before if after[name] != before[name]))
    """
    )
    assert printed.split() == []


CHANGES = {
    "hooks": "optimizer.register_optimizer_step_post_hook(lambda *_: None)",
    "torch": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "numpy": "numpy.seterr(all='ignore')",
    "random": "random.random()",
    "environment": "os.environ['SNN_RL'] = '1'",
    "signals": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "warnings": "warnings.simplefilter('ignore')",
    "logging": "logging.getLogger('snn_rl').addHandler(logging.NullHandler())",
    "process": "sys.path.append('.')",
}


def test_each_change_would_be_noticed() -> None:
    lines = [
        f"before = state(); {line}; print(*(n for n in before if state()[n] != before[n]))" for line in CHANGES.values()
    ]
    printed = run(STATE + "".join(f"    {line}\n" for line in lines))
    assert printed.splitlines() == list(CHANGES)


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
    assert run(code.format("import snn_rl._public")) == run(code.format(""))
