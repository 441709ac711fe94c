"""The life of a run, of a task that counts: neither agent nor classifier, no network, no environment."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from snn_rl.base.files import atomic, read_json, write_json
from snn_rl.rl.environments import EnvironmentFailedError
from snn_rl.runs.life import live
from snn_rl.runs.stages import Stage, chain
from snn_rl.runs.task import Checkpoints, History, Measured, OutOfTimeError, Run, Task, Training


@dataclass(frozen=True)
class Recipe:
    name: str = "counts"
    schedule: Sequence[int] = (2, 1)
    cpu_threads: int | None = None
    until: int = 3

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def is_smoke(config: Mapping[str, Any]) -> bool:
        return False


class Killed(BaseException):
    pass


class Counting(Training):
    """Counts to the recipe's number, with a checkpoint at every step."""

    def __init__(self, task: Counts, stage: Stage) -> None:
        super().__init__(stage, task.run.folder(stage), History())
        self.task, self.at = task, 0
        self.is_trained = stage.timesteps is not None or task.ann is None

    def note(self, what: str) -> None:
        self.task.calls.append(f"{self.stage.name} {what}")
        self.task.at(self.task.calls[-1])

    def resume(self) -> str | None:
        if not (self.folder / "checkpoint.json").is_file():
            return None
        kept = read_json(self.folder / "checkpoint.json")
        self.at, self.history = kept["at"], History(**kept["history"])
        self.note(f"resumes at {self.at}")
        return f"{self.at} steps"

    def begin(self) -> None:
        self.note("begins")

    def train(self, checkpoints: Checkpoints) -> None:
        while self.at < self.task.recipe.until:
            self.at += 1
            self.history.note(self.at, float(self.at % 3))
            checkpoints.write()
            self.note(f"counts {self.at}")

    def save(self) -> None:
        write_json(self.folder / "checkpoint.json", {"at": self.at, "history": vars(self.history)})

    def choose(self) -> None:
        self.at = max(self.history.validation, key=lambda noted: noted[1])[0]  # type: ignore[assignment]

    def export(self) -> Measured | None:
        if not self.task.run.writes:
            return None
        with atomic(self.folder / "model.json") as temporary:
            temporary.write_text(str(self.at))
        self.note("is exported")
        return Measured({"steps": self.at}, {"score": self.at}, None, None)


@dataclass
class Counts(Task):
    run: Run
    ann: Path | None = None
    at: Callable[[str], object] = lambda call: None  # called at each call, with it
    calls: list[str] = field(default_factory=list)
    subject = "numbers"

    @property
    def recipe(self) -> Recipe:
        assert isinstance(self.run.recipe, Recipe)
        return self.run.recipe

    @property
    def stages(self) -> list[Stage]:  # type: ignore[override]
        return chain(self.recipe.schedule, self.ann)

    def check(self) -> Mapping[str, str]:
        return {}

    def training(self, stage: Stage) -> Training:
        return Counting(self, stage)


def counts(directory: Path, at: Callable[[str], object] = lambda call: None, **changes: Any) -> Counts:
    return Counts(Run(Recipe(**changes), directory, 0, "cpu"), at=at)


def raising(error: BaseException, when: str) -> Callable[[str], None]:
    def at(call: str) -> None:
        if call == when:
            raise error

    return at


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".lock"}


WHOLE = [
    f"{s} {what}"
    for s in ("ann", "T2", "T1")
    for what in ("begins", *(f"counts {i}" for i in (1, 2, 3)), "is exported")
]


def test_stages_are_begun_trained_chosen_and_exported_in_order(tmp_path: Path) -> None:
    task = counts(tmp_path)
    results = live(task)
    assert task.calls == WHOLE
    assert [(s["stage"], s["timesteps"], s["parent"]) for s in results["stages"]] == [
        ("ann", None, None),
        ("T2", 2, "ann"),
        ("T1", 1, "T2"),
    ]
    for stage in results["stages"]:
        assert stage["steps"] == stage["score"] == 2  # the best of 1, 2 and 0
        assert stage["validation"] == [[1, 1.0], [2, 2.0], [3, 0.0]]
    assert (results["recipe"], results["env_id"], results["seed"]) == ("counts", "numbers", 0)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    made = {f"{stage}/{name}" for stage in ("ann", "T2", "T1") for name in ("metrics.json", "model.json")}
    assert files_of(tmp_path) == made | {"run.json", "results.json"}  # no checkpoint is left


@pytest.mark.parametrize("moment", WHOLE)
def test_a_kill_at_any_moment_costs_what_was_not_written_yet(moment: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        live(counts(tmp_path, raising(Killed(), moment)))
    killed = WHOLE.index(moment)
    stage, _, what = moment.partition(" ")
    task = counts(tmp_path)
    results = live(task)
    assert [s["score"] for s in results["stages"]][: ["ann", "T2", "T1"].index(stage)] == [2] * [
        "ann",
        "T2",
        "T1",
    ].index(stage)
    if what == "begins":
        assert task.calls == WHOLE[killed:]
    elif what == "is exported":  # its last checkpoint stands, and nothing is counted again
        assert task.calls == [f"{stage} resumes at 3", *WHOLE[killed:]]
    else:
        assert task.calls == [f"{stage} resumes at {what[-1]}", *WHOLE[killed + 1 :]]


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    results = live(counts(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    again = counts(tmp_path)
    assert live(again) == results
    assert again.calls == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == before


def test_what_is_given_is_exported_and_not_trained(tmp_path: Path) -> None:
    task = counts(tmp_path)
    task.ann = tmp_path / "ann.zip"
    results = live(task)
    assert task.calls == ["ann begins", "ann is exported", *WHOLE[5:]]
    assert results["stages"][0]["parent"] == str(task.ann)


def test_a_failing_environment_and_too_little_memory_are_one_line(tmp_path: Path) -> None:
    broken = EnvironmentFailedError("the environment failed")
    broken.__cause__ = KeyError("inside")
    with pytest.raises(
        ValueError, match=r"^T2: the environment failed; once that is repaired, the same call"
    ) as raised:
        live(counts(tmp_path, raising(broken, "T2 counts 2")))
    assert raised.value.__cause__ is broken.__cause__
    with pytest.raises(
        ValueError, match=r"^T2 takes more memory than there is \(MemoryError: 9 GB\); lower batch_size$"
    ):
        live(counts(tmp_path, raising(MemoryError("9\nGB"), "T2 counts 3")))
    task = counts(tmp_path)
    live(task)
    assert task.calls[0] == "T2 resumes at 3"


def test_a_run_out_of_time_stops_before_its_next_stage_but_always_does_one(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Late(Run):
        def is_late(self) -> bool:
            return True

    for name, then in (("ann", "T2"), ("T2", "T1")):
        task = Counts(Late(Recipe(), tmp_path, 0, "cpu"))
        with pytest.raises(OutOfTimeError, match=f"^out of time before {then}; the same call goes on$"):
            live(task)
        assert {call.split(" ")[0] for call in task.calls} == {name}
    assert [s["stage"] for s in live(Counts(Late(Recipe(), tmp_path, 0, "cpu")))["stages"]] == ["ann", "T2", "T1"]


def test_a_process_that_does_not_write_leaves_no_file(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Second(Run):
        @property
        def writes(self) -> bool:
            return False

    live(counts(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    live(Counts(Second(Recipe(), tmp_path, 0, "cpu")))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    live(counts(tmp_path))
    with pytest.raises(ValueError, match="belongs to another run: its until is 3, not 4"):
        live(counts(tmp_path, until=4))
