"""What is shipped loads, is what the table of contents says it is, and plays."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from agents import environment_of
from snn_rl.rl.evaluation import evaluate
from snn_rl.rl.policy_file import load_policy
from snn_rl.runs.recipe import TEST_SEEDS
from snn_rl.share.publish import MAX_BYTES, table_of_contents

FOLDER = Path(__file__).resolve().parents[1] / "agents" / "pretrained"
PUBLISHED = {path.parent.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*/results.json"))}
STAGES = [(recipe, stage) for recipe, results in PUBLISHED.items() for stage in results["stages"]]
# Return after a few seconds of play (emulator frames of an episode, least mean return): what a random agent never has.
SHORT = dict.fromkeys(("pong", "pong-lite", "pong-single-frame"), (2_400, -3.0))


@pytest.mark.parametrize(("recipe", "stage"), STAGES, ids=[f"{recipe}-{stage['stage']}" for recipe, stage in STAGES])
def test_a_shipped_file_plays(recipe: str, stage: dict[str, Any]) -> None:
    path = FOLDER / recipe / f"{stage['stage']}.safetensors"
    content = path.read_bytes()
    assert len(content) <= MAX_BYTES
    assert hashlib.sha256(content).hexdigest() == stage["sha256"]
    policy = load_policy(path)
    assert policy.timesteps == stage["timesteps"]
    assert policy.metadata["provenance"]["recipe"] == recipe
    frames, least = SHORT.get(recipe, (None, 0.9 * stage["eval"]["mean"]))
    short = {} if frames is None else {"max_episode_frames": frames}
    played = evaluate(policy, environment_of(policy, 4, TEST_SEEDS, **short), 4)
    assert played.mean >= least


@pytest.mark.parametrize("stage", ["T3", "T2", "T1"])
def test_pong_on_one_frame_is_lost_where_the_membranes_are_cleared(stage: str) -> None:
    policy = load_policy(FOLDER / "pong-single-frame" / f"{stage}.safetensors")
    frames, _ = SHORT["pong-single-frame"]
    returns = []
    for persistent in (True, False):
        policy.policy.net.persistent = persistent
        env = environment_of(policy, 2, TEST_SEEDS, max_episode_frames=frames)
        returns.append(evaluate(policy, env, 2).mean)
    assert returns[0] > 0 > -10 > returns[1]


def test_nothing_else_is_shipped_and_the_table_is_up_to_date(tmp_path: Path) -> None:
    listed = {FOLDER / recipe / f"{stage['stage']}.safetensors" for recipe, stage in STAGES}
    assert listed
    assert set(FOLDER.glob("*/*.safetensors")) == listed
    for recipe in PUBLISHED:
        (tmp_path / recipe).mkdir()
        (tmp_path / recipe / "results.json").write_text((FOLDER / recipe / "results.json").read_text())
    assert table_of_contents(tmp_path).read_text() == (FOLDER / "README.md").read_text()
