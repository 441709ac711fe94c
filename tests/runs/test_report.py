"""The report says what results.json says, for whole and partial runs, and is never half-written."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import snn_rl.runs.report as report
from scripts.report import main
from snn_rl.runs.report import AGENT_FIGURES, CLASSIFIER_FIGURES, FIGURES, write_report
from snn_rl.runs.results import load_results


def stage(timesteps: int | None, mean: float) -> dict[str, Any]:
    spiking = timesteps is not None
    return {
        "stage": f"T{timesteps}" if spiking else "ann",
        "timesteps": timesteps,
        "parent": None,
        "env_steps": 12_345,
        "updates": 678,
        "wall_seconds": 90.0,
        "eval": {"returns": [mean - 1, mean + 1], "mean": mean, "std": 1.0, "episodes": 2, "protocol": "greedy"},
        "validation": [],
        "curve": {"env_steps": [100, 200], "returns": [1.0, 2.0]} if not spiking else {"env_steps": [], "returns": []},
        "spike_rate": {"mean": 0.125, "layers": {"a": 0.1, "b": 0.2}} if spiking else None,
        "energy": {
            "ann_over_snn": 7.55,
            "ann_ops": 1000.0,
            "snn_ops": 432.0,
            "memory_accesses": {"weights": 10.0, "membranes": 20.0, "total": 30.0, "ann": 40.0},
        }
        if spiking
        else None,
        "threshold": {"a": 1.0, "b": 0.9} if spiking else {},
        "leak": {"a": 0.8, "b": 0.7} if spiking else {},
    }


RESULTS: dict[str, Any] = {
    "recipe": "<script>alert(1)</script>",
    "env_id": "Game & Co",
    "seed": 3,
    "versions": {"torch": "2.13.0"},
    "hardware": "a <machine>",
    "stages": [stage(None, 20.5), stage(5, 19.25), stage(1, 17.125)],
}


def write(path: Path, results: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.json").write_text(json.dumps(results))
    return path


class Cells(HTMLParser):
    """All table rows of a page, and all tags in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1].append(data)
            self.inside = False


def test_the_tables_hold_the_numbers_of_the_results(tmp_path: Path) -> None:
    page = Cells(write_report(write(tmp_path, RESULTS)).read_text())
    assert ["ann", "20.50 ± 1.00", "2", "12,345", "678", "1.5", "-", "-"] in page.rows
    assert ["T1", "17.12 ± 1.00", "2", "12,345", "678", "1.5", "0.125", "7.55"] in page.rows
    assert ["T5", "1,000", "432", "7.55", "10", "20", "40"] in page.rows
    assert ["T5", "18.25 20.25"] in page.rows


def test_the_page_is_self_contained_and_runs_nothing(tmp_path: Path) -> None:
    page = Cells(write_report(write(tmp_path, RESULTS)).read_text())
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(AGENT_FIGURES | FIGURES)
    assert all(src is not None and src.startswith("data:image/png;base64,") for src in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}


def test_every_figure_is_a_png(tmp_path: Path) -> None:
    write_report(write(tmp_path, RESULTS))
    files = sorted(p.stem for p in (tmp_path / "figures").iterdir())
    assert files == sorted(AGENT_FIGURES | FIGURES)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "figures").iterdir())


@pytest.mark.parametrize("count", [1, 2])
def test_unfinished_runs_have_a_report_too(count: int, tmp_path: Path) -> None:
    results = {**RESULTS, "stages": RESULTS["stages"][:count]}
    page = Cells(write_report(write(tmp_path, results)).read_text())
    assert sum(row[:1] == ["ann"] for row in page.rows) == 2  # stages and returns


def test_figures_show_what_they_should() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    report.return_per_timesteps(axes, RESULTS)
    line = axes.containers[0].lines[0]  # type: ignore[attr-defined]
    assert line.get_xydata().tolist() == [[5, 19.25], [1, 17.125]]
    axes = Figure().add_subplot()
    report.layer_spike_rates(axes, RESULTS)
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.1, 0.2]] * 2


Place = tuple[str | int, ...]


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Where something stands in a JSON value, outermost first."""
    yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*at, key))


DELETED = object()


def damaged(results: Any, at: Place, value: Any) -> Any:
    """A copy with ``value`` at ``at``."""
    if not at:
        return value
    copied = copy.deepcopy(results)
    inner = copied
    for key in at[:-1]:
        inner = inner[key]
    if value is DELETED:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return copied


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("stages", 1, "energy"), DELETED, "stages[1].energy is missing"),
        (("hardware",), DELETED, "hardware is missing"),
        (("versions", "torch"), 2, "versions['torch'] must be text of one line, got 2"),
        (("env_id",), "a\nb", "env_id must be text of one line, got 'a\\nb'"),
        (("stages",), [], "holds no finished stage yet"),
        ((), [1, 2], "it has no list of stages"),
        (("stages", 1), 7, "stages[1] must be an object, got 7"),
        (("stages", 1, "eval", "mean"), None, "stages[1].eval.mean must be a finite number, got None"),
        (("stages", 1, "eval", "mean"), math.nan, "stages[1].eval.mean must be a finite number, got nan"),
        (("stages", 1, "eval", "mean"), True, "stages[1].eval.mean must be a finite number, got True"),
        (("stages", 1, "eval", "std"), -1.0, "stages[1].eval.std must be a finite number >= 0, got -1.0"),
        (("stages", 0, "eval", "returns"), DELETED, "stages[0].eval.returns is missing"),
        (("stages", 0, "eval", "returns", 1), "x", "stages[0].eval.returns[1] must be a finite number, got 'x'"),
        (("stages", 0, "curve", "returns", 1), DELETED, "stages[0].curve must hold as many env_steps as returns"),
        (("stages", 0, "validation"), [[1]], "stages[0].validation[0] must be a pair of numbers, got [1]"),
        (("stages", 2, "env_steps"), None, "stages[2].env_steps must be an integer >= 0, got None"),
        (("stages", 2, "timesteps"), 0, "stages[2].timesteps must be an integer >= 1, got 0"),
        (("stages", 2, "spike_rate"), None, "stages[2].spike_rate must be an object in a spiking stage, got None"),
        (("stages", 2, "leak"), None, "stages[2].leak must be an object, got None"),
        (("stages", 2, "leak", "b"), "x", "stages[2].leak['b'] must be a finite number, got 'x'"),
        (("stages", 2, "stage"), "T5", "stages[2].stage must be another name than those before it, got 'T5'"),
        (("stages", 2, "stage"), "../T1", "stages[2].stage must be a name of letters, digits, '.', '-', '_' and '+'"),
        (("stages", 2, "accuracy"), {}, "stages[2] is of a classifier, and stages[0] of an agent"),
    ],
)
def test_broken_results_are_named(at: Place, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_results(write(tmp_path, damaged(RESULTS, at, value)))
    assert str(tmp_path / "results.json") in str(raised.value)


def small(kind: Callable[[int | None, float], dict[str, Any]]) -> dict[str, Any]:
    """Two stages of a run, without what no figure and no table shows."""
    results = {**RESULTS, "stages": [kind(None, 0.5), kind(1, 0.25)]}
    for made in results["stages"]:
        del made["parent"]
        if "accuracy" in made:
            del made["env_steps"], made["curve"]["loss"]
    return copy.deepcopy(results)


VALUES = (DELETED, None, "x", "a\nb", "$\\foo$", "\ud800", True, -1.5, math.nan, 1e300, [], {}, [None], {"a": [1]})


@pytest.mark.parametrize("kind", ["agent", "classifier"])
def test_whatever_is_damaged_is_one_line_or_a_whole_report(kind: str, tmp_path: Path) -> None:
    whole = small(stage if kind == "agent" else classified)
    # of the ANN's stage the outermost alone: what is in it is in the other stage too
    where = [at for at in places(whole) if at and (at[:2] != ("stages", 0) or len(at) < 4)]
    damages = [(at, value) for at in where for value in VALUES]
    refused: list[str] = []
    for number, (at, value) in enumerate(damages):
        run = write(tmp_path / str(number), damaged(whole, at, value))
        try:
            written = write_report(run)
        except ValueError as error:
            refused.append(str(error))
            assert [path.name for path in run.iterdir()] == ["results.json"], (at, value)
        else:
            assert written.read_text().endswith("</html>\n")
    assert len(refused) > 400
    assert len(damages) > len(refused) + 30
    assert all(str(tmp_path) in message and "results.json" in message for message in refused)
    assert not [message for message in refused if "\n" in message]


@pytest.mark.parametrize("number", [0, 1e29, 1e-29])
def test_numbers_of_any_size_are_drawn(number: float, tmp_path: Path) -> None:
    results = small(stage)
    for at in list(places(results)):
        inner = results
        for key in at[:-1]:
            inner = inner[key]
        if at and isinstance(inner[at[-1]], float):
            inner[at[-1]] = number
    assert write_report(write(tmp_path, results)).is_file()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"stages": ' + "9" * 5_000 + "}", "\ufeff{}", '{"a": 1} x', '"\\ud800"']
)
def test_text_that_is_no_json_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]*results\.json[^\n]*$"):
        load_results(tmp_path)


def test_the_script_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no results at")
    assert error.count("\n") == 1
    (tmp_path / "results.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    assert "is not valid JSON" in capsys.readouterr().err
    write(tmp_path, RESULTS)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(write(tmp_path, RESULTS))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(*_: Any) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "_html", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def classified(timesteps: int | None, top1: float) -> dict[str, Any]:
    of_agent = stage(timesteps, 0.0)
    del of_agent["eval"]
    curve = {"epochs": [1, 2], "loss": [2.0, 1.0], "accuracy": [0.5, 0.75]}
    accuracy = {"top1": top1, "top5": 1.0, "images": 10_000}
    return {**of_agent, "env_steps": None, "epochs": 2, "accuracy": accuracy, "curve": curve,
            "validation": [[1, 0.5], [2, 0.625]]}  # fmt: skip


def test_a_classifiers_report_shows_accuracies(tmp_path: Path) -> None:
    results = {**RESULTS, "stages": [classified(None, 0.9321), classified(5, 0.9217), classified(1, 0.9055)]}
    page = write_report(write(tmp_path, results)).read_text()
    for cell in ("93.21", "92.17", "90.55", "10,000"):
        assert f"<td>{cell}</td>" in page
    assert "All returns" not in page
    assert sorted(p.stem for p in (tmp_path / "figures").iterdir()) == sorted(CLASSIFIER_FIGURES | FIGURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": {"top1": "high", "top5": 1.0, "images": 3}}, "accuracy.top1 must be a finite number, got 'high'"),
        ({"curve": {"epochs": [1], "accuracy": []}}, "curve must hold as many epochs as accuracy"),
        ({"epochs": None}, "epochs must be a finite number, got None"),
    ],
)
def test_a_classifiers_broken_results_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"stages[0].{message}")):
        load_results(write(tmp_path, {**RESULTS, "stages": [{**classified(None, 0.9), **change}]}))
