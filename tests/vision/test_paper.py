"""The paper's tables: the right runs from the right ANN, resumable, and a table that says what they measured."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import reproduce as script
from scripts import train_vision
from snn_rl import vision
from snn_rl.vision import VISION_RECIPES, VisionRecipe
from snn_rl.vision.paper import TABLES, reproduce


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 4)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def recipe(images: Path) -> VisionRecipe:
    smoke = VISION_RECIPES["vgg6-cifar10"].smoke()
    sizes = {"image_size": 8, "validation_images": 10, "calibration_images": 10, "batch_size": 10}
    return dataclasses.replace(smoke, name="tiny", dataset=str(images), schedule=(3, 2, 1), cpu_threads=1, **sizes)


def stages(directory: Path, experiment: str) -> list[dict]:  # type: ignore[type-arg]
    return json.loads((directory / experiment / "seed-0" / "results.json").read_text())["stages"]


def test_table_4_compares_gradual_with_direct(recipe: VisionRecipe, tmp_path: Path) -> None:
    page = reproduce("table4", tmp_path, recipe=recipe, device="cpu").read_text()
    assert [s["stage"] for s in stages(tmp_path, "tiny")] == ["ann", "T3", "T2", "T1"]
    ann = str(tmp_path / "tiny" / "seed-0" / "ann" / "model.safetensors")
    for t in (2, 1):
        direct = stages(tmp_path, f"tiny-direct-T{t}")
        assert [s["stage"] for s in direct] == ["ann", f"T{t}"]
        assert direct[0]["parent"] == ann
        top1 = f"{100 * direct[1]['accuracy']['top1']:.2f}"
        rate = f"{direct[1]['spike_rate']['mean']:.3f}"
        assert f"| tiny-direct-T{t} | T{t} | {top1} | - | {rate} |" in page
    assert (tmp_path / "table4.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_grows_in_slices(recipe: VisionRecipe, tmp_path: Path) -> None:
    longer = dataclasses.replace(recipe, ann=dataclasses.replace(recipe.ann, epochs=2), schedule=(1,))
    longer = dataclasses.replace(longer, snn=dataclasses.replace(recipe.snn, epochs=2))
    with pytest.raises(vision.OutOfTimeError):
        reproduce("skipping", tmp_path, recipe=longer, device="cpu", deadline=lambda: 0.0)
    assert not (tmp_path / "skipping.md").exists()  # nothing is finished yet
    pages = []
    for _ in range(12):
        with suppress(vision.OutOfTimeError):
            reproduce("skipping", tmp_path, recipe=longer, device="cpu", deadline=lambda: 0.0)
        pages.append((tmp_path / "skipping.md").read_text())
    assert "| tiny-5-3-1 | not run yet |" in pages[0]
    assert "| tiny-5-3-1 | T1 |" in pages[-1]


@pytest.mark.parametrize("table", sorted(TABLES))
def test_every_table_is_made_of_legal_recipes(table: str) -> None:
    experiments = TABLES[table](None)
    assert len({e.name for e in experiments}) == len(experiments)
    for experiment in experiments:
        recipe = experiment.recipe
        if experiment.ann_of is not None:  # it must be the very network and data of that ANN
            base = VISION_RECIPES[experiment.ann_of]
            for field in (
                "model",
                "dataset",
                "image_size",
                "width",
                "batch_norm",
                "dropout",
                "ann",
                "validation_images",
            ):
                assert getattr(recipe, field) == getattr(base, field)


def test_an_equal_budget_is_equal(recipe: VisionRecipe) -> None:
    base = dataclasses.replace(recipe, schedule=(5, 4, 3, 2, 1), snn=dataclasses.replace(recipe.snn, epochs=4))
    budgets = {sum(map(e.recipe.snn_epochs, e.recipe.schedule)) for e in TABLES["budget"](base)}
    assert budgets == {20}


def test_fields_of_the_recipe_are_flags_of_reproduce(images: Path, tmp_path: Path) -> None:
    flags = ["sparse", "--recipe", "vgg6-cifar10", "--smoke", "--dataset", str(images), "--image-size", "8"]
    flags += ["--validation-images", "10", "--calibration-images", "10", "--batch-size", "10", "--schedule", "1"]
    assert script.main([*flags, "--run-dir", str(tmp_path), "--device", "cpu", "--cpu-threads", "1"]) == 0
    assert [s["stage"] for s in stages(tmp_path, "vgg6-cifar10-sparse")] == ["ann", "T1", "T1-sparse90"]


def test_sparse_runs_the_ann_it_needs(recipe: VisionRecipe, tmp_path: Path) -> None:
    reproduce("sparse", tmp_path, recipe=dataclasses.replace(recipe, schedule=(1,)), device="cpu")
    assert [s["stage"] for s in stages(tmp_path, "tiny-sparse")] == ["ann", "T1", "T1-sparse90"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "unknown table 'table9'; there are table1, table4"),
        (["table4", "--smoke"], "--smoke changes a recipe: say which with --recipe"),
        (["table4", "--width", "0.5"], "--width 0.5 changes a recipe: say which with --recipe"),
        (["table4", "--recipe", "vgg6-cifar10", "--width", "0"], "width must be > 0, got 0"),
        (["table4", "--recipe", "vgg6-cifar10", "--dataset", "nowhere"], "no data set nowhere"),
        (["table4", "--recipe", "vgg5"], "unknown recipe 'vgg5'; there are vgg6-cifar10"),
    ],
)
def test_bad_calls_of_reproduce_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert script.main([*arguments, "--run-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which recipe: vgg6-cifar10"),
        (["--width", "1", "vgg6-cifar10"], "say which recipe: vgg6-cifar10"),
        (["vgg5"], "unknown recipe 'vgg5'; there are vgg6-cifar10"),
        (["vgg6-cifar10", "--dataset", "nowhere", "--minutes", "-1"], "minutes must be >= 0, got -1"),
        (["vgg6-cifar10", "--width", "0"], "width must be > 0, got 0"),
        (["vgg6-cifar10", "--snn.optimizer", "lion"], "snn.optimizer must be one of sgd, adam, got 'lion'"),
        (["vgg6-cifar10", "--augmentation", "mixup"], "augmentation must be one of none, crop-flip"),
        (["vgg6-cifar10", "--sparsity", "1"], "sparsity must be < 1"),
        (["vgg6-cifar10", "--calibration-images", "9999"], "calibration_images must be <= validation_images (5000)"),
        (["vgg6-cifar10", "--name", "other"], "name say which recipe this is"),
        (["vgg6-cifar10", "--dataset", "nowhere"], "nowhere"),
    ],
)
def test_bad_calls_of_train_vision_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_vision.main([*arguments, "--device", "cpu"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert message in last


def test_help_needs_no_recipe_and_lists_the_fields_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in ((["--help"], "vgg16-cifar10"), (["vgg6-cifar10", "--help"], "--snn.percentile")):
        with pytest.raises(SystemExit) as stop:
            train_vision.main(arguments)
        assert stop.value.code == 0
        assert word in capsys.readouterr().out


def test_a_small_folder_is_told_what_to_set(images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["vgg6-cifar10", "--dataset", str(images), "--run-dir", str(tmp_path), "--device", "cpu"]
    assert train_vision.main(flags) == 2
    assert "validation_images: 5000 held-out images would take" in (err := capsys.readouterr().err)
    assert "of 40 training images, and with them calibration_images, 1000, and batch_size, 128" in err


def test_time_that_is_up_is_status_3(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["vgg6-cifar10", "--smoke", "--dataset", str(images), "--image-size", "8", "--validation-images", "10"]
    flags += ["--calibration-images", "10", "--batch-size", "10", "--ann.epochs", "2", "--schedule", "1"]
    flags += ["--run-dir", str(tmp_path), "--device", "cpu", "--cpu-threads", "1"]
    assert train_vision.main([*flags, "--minutes", "0"]) == 3
    assert "out of time in ann after 1 of 2 epochs; the same call goes on" in capsys.readouterr().err
    assert train_vision.main(flags) == 0
    assert "T1" in capsys.readouterr().out
