"""Kernels without numba, without a cache and with a damaged one: the same numbers, and one line that says so."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from snn_rl.core.scan import _kernel_cache

ROOT = Path(__file__).resolve().parents[2]

# Prints what was warned of, whether the LIF layers run as the reference does, and how an agent acts.
PROGRAM = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np
    import torch
    from snn_rl import SpikingDQN
    from snn_rl.core.scan import lif_scan, reference_scan

    torch.manual_seed(0)
    results = []
    for scan in (lif_scan, reference_scan):
        drawn = torch.randn(6, 2, 50, generator=torch.Generator().manual_seed(1))
        inputs = [drawn, torch.tensor(0.5), torch.tensor(0.9)]
        current, v, leak = (x.requires_grad_() for x in inputs)
        spikes, carry = scan(current, None, v, leak)
        (spikes.sum() + carry.square().sum()).backward()
        results.append([spikes, carry, *(x.grad for x in inputs)])
    agent = SpikingDQN(
        "MlpPolicy", "CartPole-v1", policy_kwargs={"timesteps": 2, "net_arch": [16]}, buffer_size=50, device="cpu"
    )
    observations = np.random.default_rng(0).normal(size=(20, 1, 4)).astype(np.float32)
    state, acted = None, []
    for observation in observations:
        action, state = agent.predict(observation, state, np.zeros(1, bool), deterministic=True)
        acted.append(int(action[0]))
    expected, state = [], None
    for observation in observations:
        with torch.no_grad():
            q_values, state = agent.q_net.network(torch.from_numpy(observation), state)
        expected.append(int(q_values.argmax()))
print(json.dumps({
    "same": all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results)) and acted == expected,
    "events": agent.q_net._events is not None,
    "warned": [str(w.message) for w in caught if "snn_rl" in str(w.message) or "ompiled" in str(w.message)],
}))
"""


def run(source: Path = ROOT, **environment: str) -> dict[str, Any]:
    told = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(source)}
    told |= environment
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=told, cwd=source, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_compilation_the_reference_runs() -> None:
    found = run(NUMBA_DISABLE_JIT="1")
    assert found["same"]
    assert not found["events"]
    assert found["warned"] == ["no compiled LIF layers, several times slower on the CPU: NUMBA_DISABLE_JIT is set"]


def test_where_nothing_can_be_written_each_start_compiles(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "snn_rl", tmp_path / "snn_rl", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [tmp_path / "snn_rl", *filter(Path.is_dir, (tmp_path / "snn_rl").rglob("*"))]:
        (folder / "__pycache__").touch()  # a file: not even root can make a folder of it
    found = run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "snn_rl" / "__pycache__"), HOME=str(tmp_path / "none"))
    assert found["same"]
    assert found["events"]
    (warned,) = found["warned"]
    assert "cannot be kept, and each start compiles anew" in warned
    assert "set NUMBA_CACHE_DIR" in warned
    assert "\n" not in warned


def test_a_damaged_cache_is_compiled_anew_once(tmp_path: Path) -> None:
    assert run(NUMBA_CACHE_DIR=str(tmp_path)) == {"same": True, "events": True, "warned": []}
    kept = list(tmp_path.rglob("*.nb[ci]"))
    assert len(kept) > 10
    for path in kept:
        path.write_bytes(path.read_bytes()[:-100])
    found = run(NUMBA_CACHE_DIR=str(tmp_path))
    assert found["same"]
    assert found["events"]
    (warned,) = found["warned"]
    assert warned.startswith(f"compiled kernels are damaged, and are compiled anew ({tmp_path}")
    assert "\n" not in warned
    assert run(NUMBA_CACHE_DIR=str(tmp_path)) == {"same": True, "events": True, "warned": []}


# --- one small kernel, of which the files can be damaged in every way


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a kernel of its own, which is kept beside it."""
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    path = tmp_path / "kernels.py"
    path.write_text(
        "from snn_rl.core.scan._cpu import compiled\n\n@compiled()\ndef twice_and(x, y):\n    return 2.0 * x + y\n"
    )
    return path


def start(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, int, list[str]]:
    """As a new process would: what the kernel gives, whether it was found (1 or 0), and what was warned of."""
    monkeypatch.setattr(_kernel_cache, "_warned", set())
    spec = importlib.util.spec_from_file_location("kernels", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec.loader.exec_module(loaded)
        value = loaded.twice_and(3.0, 0.5)
        loaded.twice_and(3, 5)  # another signature, another warning if it were not for once
    return value, len(loaded.twice_and.stats.cache_hits), [str(w.message) for w in caught]


def index_and_data(path: Path) -> tuple[Path, list[Path]]:
    (index,) = (path.parent / "kept").rglob("*.nbi")
    return index, sorted((path.parent / "kept").rglob("*.nbc"))


def test_a_kernel_is_found_at_the_next_start(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(module, monkeypatch) == (6.5, 0, [])
    assert start(module, monkeypatch) == (6.5, 2, [])
    _, data = index_and_data(module)
    assert len(data) == 2


@pytest.mark.parametrize("which", ["index", "data"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100, bytes(4096), None])
def test_damaged_files_are_written_anew(
    module: Path, monkeypatch: pytest.MonkeyPatch, which: str, content: bytes | None
) -> None:
    start(module, monkeypatch)
    index, data = index_and_data(module)
    for path in [index] if which == "index" else data:
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2] if content is None else content)
    value, found, (warned,) = start(module, monkeypatch)
    assert (value, found) == (6.5, 0)
    assert warned.startswith(f"compiled kernels are damaged, and are compiled anew ({module.parent / 'kept'}")
    assert "\n" not in warned
    assert start(module, monkeypatch) == (6.5, 2, [])


def test_no_single_bit_of_the_machine_code_goes_unnoticed(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(module, monkeypatch)
    _, data = index_and_data(module)
    raw = data[0].read_bytes()
    noticed = 0
    for position in range(0, len(raw), len(raw) // 40):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        data[0].write_bytes(bytes(damaged))
        value, found, warned = start(module, monkeypatch)
        assert value == 6.5
        assert found == (0 if warned else 2)
        noticed += len(warned)
    assert noticed >= 39, noticed


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "denied")])
def test_where_a_kernel_cannot_be_kept_it_runs(module: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    value, found, (warned,) = start(module, monkeypatch)
    assert (value, found) == (6.5, 0)
    assert warned.startswith(f"compiled kernels cannot be kept, and each start compiles anew ({module.parent / 'kept'}")
    assert error.strerror is not None
    assert error.strerror in warned
