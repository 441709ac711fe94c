"""The report says what results.json says, for whole and partial runs, and is never half-written."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import snn_rl.report as report
from scripts.report import main
from snn_rl.report import AGENT_FIGURES, CLASSIFIER_FIGURES, FIGURES, load_results, write_report


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


def broken(change: str) -> Any:
    results = copy.deepcopy(RESULTS)
    if change == "stage key":
        del results["stages"][1]["energy"]
    elif change == "key":
        del results["hardware"]
    elif change == "no stages":
        results["stages"] = []
    elif change == "list":
        return [1, 2]
    elif change == "mean":
        results["stages"][1]["eval"]["mean"] = None
    elif change == "returns":
        del results["stages"][0]["eval"]["returns"]
    elif change == "curve":
        results["stages"][0]["curve"]["returns"].pop()
    elif change == "steps":
        results["stages"][2]["env_steps"] = None
    elif change == "rate":
        results["stages"][2]["spike_rate"] = None
    elif change == "leak":
        results["stages"][2]["leak"] = None
    return results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage key", r"stage 1 lacks \['energy'\]"),
        ("key", r"lacks \['hardware'\]"),
        ("no stages", "holds no finished stage"),
        ("list", "no list of stages"),
        ("mean", "stage 1: eval must hold the numbers mean, std and episodes"),
        ("returns", "stage 0: eval.returns must be a list"),
        ("curve", "stage 0: curve must hold the lists env_steps and returns, of one length"),
        ("steps", "stage 2: env_steps must be a number, got None"),
        ("rate", "stage 2: spike_rate must hold mean and layers"),
        ("leak", "stage 2: leak must map layers to numbers, got None"),
    ],
)
def test_broken_results_are_named(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_results(write(tmp_path, broken(change)))


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
        ({"accuracy": {"top1": "high", "top5": 1.0, "images": 3}}, "accuracy must hold the numbers"),
        ({"curve": {"epochs": [1], "accuracy": []}}, "curve must hold the lists epochs and accuracy"),
        ({"epochs": None}, "epochs must be a number, got None"),
    ],
)
def test_a_classifiers_broken_results_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_results(write(tmp_path, {**RESULTS, "stages": [{**classified(None, 0.9), **change}]}))
