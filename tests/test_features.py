"""docs/features.md says what is found in the packages that are installed here, and notices where it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import features

ROOT = Path(__file__).resolve().parents[1]


def test_the_document_agrees_with_what_is_installed() -> None:
    """In a process of its own: the other libraries' warnings are not ours."""
    command = [sys.executable, "benchmarks/features.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout[-3000:] + checked.stderr
    assert int(checked.stdout.splitlines()[-1].split()[0]) >= len(features.ROWS)


def test_what_is_read_is_what_was_written() -> None:
    text = features.DOCUMENT.read_text()
    cells, versions = features.parse(text)
    assert len(cells) == len(features.ROWS) * len(features.LIBRARIES)
    kept = {key: features.unescaped(cell) for key, cell in cells.items()}
    assert features.render(kept, versions) == text


def test_a_cell_that_says_something_else_is_noticed() -> None:
    text = features.DOCUMENT.read_text()
    now = {key: features.unescaped(cell) for key, cell in features.parse(text)[0].items()}
    assert features.disagreements(features.parse(text)[0], now) == []
    for old, new in (
        ("| Hyperparameter search | no |", "| Hyperparameter search | yes |"),  # the table alone
        ("- snn_rl: **1**. 1 neuron", "- snn_rl: **2**. 1 neuron"),  # the list alone
        ("searched for `import optuna`", "searched for `tuner`"),  # what was searched
    ):
        assert text.count(old) == 1
        assert len(features.disagreements(features.parse(text.replace(old, new))[0], now)) == 1


def test_a_search_that_finds_something_is_no_no() -> None:
    for probe in (features.lacks(features.SNN_RL, "SpikingDQN"), features.has("snn_rl:SpikingPPO")):
        with pytest.raises(features.NotFound, match="Spiking"):
            probe()
