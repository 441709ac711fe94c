"""docs/features.md says what is found in the packages that are installed here, and notices where it does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import features

ROOT = Path(__file__).resolve().parents[1]
DATA = json.loads(features.DATA.read_text())
LIBRARIES, CLAIMS = features.read(DATA)
SNN_RL = LIBRARIES[0]


def test_the_document_agrees_with_what_is_installed() -> None:
    """In a process of its own: the other libraries' warnings are not ours."""
    command = [sys.executable, "benchmarks/features.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout[-3000:] + checked.stderr
    assert int(checked.stdout.splitlines()[-1].split()[0]) >= len(DATA["rows"])


def test_every_cell_rests_on_something() -> None:
    assert len(CLAIMS) == len(DATA["rows"]) * len(LIBRARIES)
    for claim in CLAIMS:
        kinds = [line.split(" ")[0] for line in claim.evidence]
        assert set(kinds) <= features.CHECKS.keys(), claim
        assert set(kinds) - {"note"}, claim
        assert claim.library is not SNN_RL or not {"measured", "cites"} & set(kinds), claim  # tests show it


@pytest.mark.parametrize(
    "change",
    [
        ("| Hyperparameter search | no |", "| Hyperparameter search | yes |"),  # the table alone
        ("- snn_rl: **1: LIF**.", "- snn_rl: **2: LIF**."),  # the list alone
        ("searched for `import optuna`", "searched for `tuner`"),  # what was searched
    ],
)
def test_a_document_that_says_something_else_is_noticed(
    change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = features.DOCUMENT.read_text()
    assert text.count(change[0]) == 1
    (tmp_path / "features.md").write_text(text.replace(*change))
    monkeypatch.setattr(features, "DOCUMENT", tmp_path / "features.md")
    monkeypatch.setattr(features.Claim, "faults", lambda self: [])
    assert features.main(["--check"]) == 1
    assert "features.md is not as features.json has it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("evidence", "fault"),
    [
        ("imports snn_rl:SpikingPPO", "has no attribute 'SpikingPPO'"),
        ("imports snn_rl.nowhere:LIF", "No module named 'snn_rl.nowhere'"),
        ("defines snn_rl/core/neuron.py:GRU", "it is not defined there"),
        ("defines snn_rl/nowhere.py:LIF", "No such file"),
        ("has snn_rl/core/neuron.py izhikevich", "it is not found there"),
        ("lacks spikingdqn", r"found in \w+\.py:\d+: .*SpikingDQN"),
        ("no_files .pt .py", r"there is \w+\.py"),
        ("says It wins every game.", "its description does not say so"),
        ("tested core/test_neuron.py::test_nothing", "there is no such test"),
    ],
)
def test_a_claim_that_is_not_so_is_noticed(evidence: str, fault: str) -> None:
    (found,) = features.Claim("Row", SNN_RL, "yes", [evidence]).faults()
    assert re.match(rf"Row / snn_rl: 'yes', by {re.escape(repr(evidence))}: .*{fault}", found), found


def test_a_measurement_counts_for_its_own_version_alone() -> None:
    here = SNN_RL.here()
    older = features.Library("snn_rl", SNN_RL.packages, {"snn_rl": "0.0.1"})
    assert features.measured(features.Library("snn_rl", SNN_RL.packages, here), "3 of 4") is None
    assert "measure again" in str(features.measured(older, "3 of 4"))
    nowhere = features.Library("nowhere", ["nowhere"], {"no-such-distribution": "1.0"})
    assert not nowhere.is_installed
