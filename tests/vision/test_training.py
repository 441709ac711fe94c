"""Classifiers through all stages on images small enough to be learnt in seconds."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from snn_rl import vision
from snn_rl.runs.stages import Stage
from snn_rl.vision import VISION_RECIPES, VisionRecipe, classifier_training, load_classifier
from snn_rl.vision._run import Run
from snn_rl.vision._updates import softened_divergence
from snn_rl.vision.paper import reproduce
from snn_rl.vision.recipe import AnnTraining, SnnTraining

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, red, green and blue squares in noise, 8 x 8."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split, number in (("train", 30), ("test", 12)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = draw.integers(0, 90, (8, 8, 3))
                pixels[2:6, 2:6, channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def recipe(images: Path) -> VisionRecipe:
    return VisionRecipe(
        name="squares",
        dataset=str(images),
        model="vgg6",
        image_size=8,
        width=0.0625,
        augmentation="crop-flip",
        validation_images=15,
        calibration_images=15,
        batch_size=15,
        ann=AnnTraining(epochs=4, optimizer="adam", learning_rate=5e-3),
        snn=SnnTraining(epochs=6, learning_rate=5e-3),
        schedule=(2, 1),
        cpu_threads=1,
    )


def weights(run_dir: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / stage / "model.safetensors")


def assert_same_run(a: Path, b: Path, stages: tuple[str, ...]) -> None:
    for stage in stages:
        ours, theirs = weights(a, stage), weights(b, stage)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (stage, name)
        metrics = [json.loads((d / stage / "metrics.json").read_text()) for d in (a, b)]
        for key in ("accuracy", "validation", "curve", "updates", "spike_rate"):
            assert metrics[0][key] == metrics[1][key], (stage, key)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    vision.run(recipe.__wrapped__(images), directory, device="cpu")  # type: ignore[attr-defined]
    return directory


def test_every_stage_learns_and_leaves_its_files(undisturbed: Path) -> None:
    results = json.loads((undisturbed / "results.json").read_text())
    assert [s["stage"] for s in results["stages"]] == ["ann", "T2", "T1"]
    assert results["recipe"] == "squares"
    for stage in results["stages"]:
        assert stage["accuracy"]["images"] == 36
        assert stage["accuracy"]["top1"] > 0.8  # chance is a third
        assert stage["accuracy"]["top5"] == 1.0  # of three classes
        files = {p.name for p in (undisturbed / stage["stage"]).iterdir() if "tfevents" not in p.name}
        assert files == {"metrics.json", "model.safetensors"}
    ann, t2, t1 = results["stages"]
    assert ann["spike_rate"] is None
    assert len(t2["spike_rate"]["layers"]) == 5
    assert t2["energy"]["memory_accesses"]["membranes"] > t1["energy"]["memory_accesses"]["membranes"] == 0
    assert set(t1["threshold"]) == set(t1["leak"]) == set(t1["spike_rate"]["layers"])


def test_reported_accuracy_is_that_of_the_shared_file(undisturbed: Path, images: Path) -> None:
    classifier = load_classifier(undisturbed / "T1" / "model.safetensors")
    assert classifier.timesteps == 1
    assert classifier.classes == ("blue", "green", "red")
    correct = 0
    for label, name in enumerate(classifier.classes):
        stack = [np.asarray(Image.open(p)).transpose(2, 0, 1) for p in sorted((images / "test" / name).iterdir())]
        correct += int((classifier.predict(torch.from_numpy(np.stack(stack))) == label).sum())
    metrics = json.loads((undisturbed / "T1" / "metrics.json").read_text())
    assert correct / 36 == pytest.approx(metrics["accuracy"]["top1"])


@pytest.mark.parametrize("killed_after", [2, 5, 8, 11])
def test_a_run_killed_within_a_stage_ends_like_an_undisturbed_one(
    killed_after: int, recipe: VisionRecipe, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = classifier_training.evaluate
    calls = 0

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == killed_after:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(classifier_training, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        vision.run(recipe, tmp_path, device="cpu")
    monkeypatch.setattr(classifier_training, "evaluate", evaluate)
    vision.run(recipe, tmp_path, device="cpu")
    assert_same_run(tmp_path, undisturbed, ("ann", "T2", "T1"))


def test_a_run_in_slices_ends_like_an_undisturbed_one(recipe: VisionRecipe, undisturbed: Path, tmp_path: Path) -> None:
    slices = 0
    while not (tmp_path / "T1" / "metrics.json").is_file():
        slices += 1
        assert slices <= 16, "more slices than epochs"
        with suppress(vision.OutOfTimeError):
            vision.run(recipe, tmp_path, device="cpu", minutes=0.0)
    assert slices > 1
    assert_same_run(tmp_path, undisturbed, ("ann", "T2", "T1"))


def test_an_ann_of_another_run_enters_at_conversion(recipe: VisionRecipe, undisturbed: Path, tmp_path: Path) -> None:
    ann = undisturbed / "ann" / "model.safetensors"
    results = vision.run(recipe, tmp_path, device="cpu", ann=ann)
    assert results["stages"][0]["updates"] == 0
    assert results["stages"][0]["parent"] == str(ann)
    assert_same_run(tmp_path, undisturbed, ("T2", "T1"))


def test_what_is_no_such_ann_is_refused(recipe: VisionRecipe, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a spiking network of T = 2; --ann takes an ANN"):
        vision.run(recipe, tmp_path / "a", device="cpu", ann=undisturbed / "T2" / "model.safetensors")
    wider = dataclasses.replace(recipe, width=0.125)
    with pytest.raises(ValueError, match=r"was trained with architecture .*0.0625.*, but squares has .*0.125"):
        vision.run(wider, tmp_path / "b", device="cpu", ann=undisturbed / "ann" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"was trained with seed 0, but squares has 1: .*has not seen the images held out"
    ):
        vision.run(recipe, tmp_path / "d", seed=1, device="cpu", ann=undisturbed / "ann" / "model.safetensors")
    with pytest.raises(ValueError, match=r"no file at nowhere; --ann takes the model.safetensors of another run's ANN"):
        vision.run(recipe, tmp_path / "c", device="cpu", ann=Path("nowhere"))
    assert not list(tmp_path.iterdir())


def test_the_folder_of_another_run_is_left_alone(recipe: VisionRecipe, undisturbed: Path, tmp_path: Path) -> None:
    for name in ("results.json", "T1/model.safetensors", "ann/checkpoint.pt"):
        folder = tmp_path / Path(name).name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of somebody else")
        with pytest.raises(ValueError, match=f"holds {name} but no run.json, .*; use another --run-dir"):
            vision.run(recipe, folder, device="cpu")
        assert (folder / name).read_text() == "of somebody else"
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    smoke = dataclasses.replace(recipe.smoke(), dataset=recipe.dataset)
    for other, seed, message in (
        (smoke, 1, "it is no smoke run, as this is"),
        (dataclasses.replace(recipe, batch_size=5), 1, "its seed is 0, not 1"),
        (dataclasses.replace(recipe, snn=dataclasses.replace(recipe.snn, epochs=7)), 0, "its snn.epochs is 6, not 7"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run: {message}; give the options that began it"):
            vision.run(other, undisturbed, seed, device="cpu")
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before


def test_fields_that_a_recipe_has_gained_since_count_as_their_defaults(
    recipe: VisionRecipe, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "older"
    shutil.copytree(undisturbed, folder)
    config = json.loads((folder / "run.json").read_text())
    del config["recipe"]["sparsity"], config["recipe"]["snn"]["distillation_weight"], config["recipe"]["cpu_threads"]
    (folder / "run.json").write_text(json.dumps(config))
    results = json.loads((undisturbed / "results.json").read_text())
    assert vision.run(recipe, folder, device="cpu") == results
    with pytest.raises(ValueError, match=r"its sparsity is 0.0, not 0.5"):
        vision.run(dataclasses.replace(recipe, sparsity=0.5), folder, device="cpu")


def test_thresholds_are_calibrated_on_all_classes(
    recipe: VisionRecipe, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of a folder lie class by class: its first few are of one class alone."""
    seen: list[torch.Tensor] = []
    to_spiking = classifier_training.to_spiking

    def look(ann: torch.nn.Module, calibration: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(calibration)
        return to_spiking(ann, seen, *args, **kwargs)

    monkeypatch.setattr(classifier_training, "to_spiking", look)
    few = dataclasses.replace(recipe, calibration_images=6)
    vision.run(few, tmp_path, device="cpu", ann=undisturbed / "ann" / "model.safetensors")
    images = torch.cat(seen)
    assert len(images) == 6
    brightest = images[:, :, 2:6, 2:6].mean((2, 3)).argmax(1)
    assert brightest.bincount(minlength=3).tolist() == [2, 2, 2]


def test_pruned_weights_stay_pruned_and_save_energy(recipe: VisionRecipe, undisturbed: Path, tmp_path: Path) -> None:
    sparse = dataclasses.replace(recipe, sparsity=0.75)
    results = vision.run(sparse, tmp_path, device="cpu", ann=undisturbed / "ann" / "model.safetensors")
    assert [s["stage"] for s in results["stages"]] == ["ann", "T2", "T1", "T1-sparse75"]
    last, before = weights(tmp_path, "T1-sparse75"), weights(tmp_path, "T1")
    changed = False
    for name, weight in last.items():
        if weight.dim() > 1:
            assert int((weight == 0).sum()) == int(0.75 * weight.numel())
            changed |= not torch.equal(weight[weight != 0], before[name][weight != 0])
            smallest = before[name].abs().flatten().sort().values[int(0.75 * weight.numel())]
            assert before[name].abs()[weight == 0].max() <= smallest
    assert changed  # the others were trained on
    t1, pruned = results["stages"][2:]
    assert pruned["energy"]["memory_accesses"]["weights"] == pytest.approx(
        t1["energy"]["memory_accesses"]["weights"] / 4, rel=0.01
    )
    assert pruned["energy"]["ann_ops"] == t1["energy"]["ann_ops"]


def test_a_stage_stops_early_where_it_no_longer_improves(recipe: VisionRecipe, tmp_path: Path) -> None:
    still = dataclasses.replace(recipe, ann=dataclasses.replace(recipe.ann, epochs=1), schedule=(1,))
    still = dataclasses.replace(still, snn=SnnTraining(epochs=50, learning_rate=0.0, patience=3))
    results = vision.run(still, tmp_path, device="cpu")
    assert results["stages"][1]["epochs"] == 4  # the first was the best, three more were not better


def test_the_divergence_from_a_teacher_by_hand() -> None:
    logits, wanted = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    p = [1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))]  # of the teacher, at half its logits
    q = [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]
    by_hand = 4 * sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    assert softened_divergence(logits, wanted).item() == pytest.approx(by_hand, rel=1e-5)
    assert softened_divergence(wanted, wanted).item() == pytest.approx(0.0, abs=1e-6)


def test_a_network_learns_from_its_ann_alone(recipe: VisionRecipe, undisturbed: Path, tmp_path: Path) -> None:
    taught = dataclasses.replace(recipe, snn=dataclasses.replace(recipe.snn, distillation_weight=1.0))
    results = vision.run(taught, tmp_path, device="cpu", ann=undisturbed / "ann" / "model.safetensors")
    for stage in results["stages"][1:]:
        assert stage["curve"]["loss"][-1] < stage["curve"]["loss"][0]
        assert stage["accuracy"]["top1"] > 0.8


def test_a_budget_of_epochs_is_divided(recipe: VisionRecipe, tmp_path: Path) -> None:
    results = vision.run(dataclasses.replace(recipe, total_snn_epochs=3), tmp_path, device="cpu")
    assert [s["epochs"] for s in results["stages"]] == [4, 1, 2]  # what is left over goes to the last


def test_stages_of_the_same_compute_have_epochs_that_grow_as_t_falls(recipe: VisionRecipe) -> None:
    same = dataclasses.replace(recipe, schedule=(5, 4, 3, 2, 1), snn=SnnTraining(epochs=30, same_compute=True))
    assert [same.snn_epochs(t) for t in same.schedule] == [6, 8, 10, 15, 30]
    assert [recipe.snn_epochs(t) for t in recipe.schedule] == [6, 6]


def test_thresholds_that_fall_with_t_keep_spike_rates(recipe: VisionRecipe, undisturbed: Path, tmp_path: Path) -> None:
    change = {}
    for keep_rates in (True, False):
        snn = SnnTraining(epochs=1, learning_rate=0.0, keep_rates=keep_rates)
        still = dataclasses.replace(recipe, snn=snn)
        ann = undisturbed / "ann" / "model.safetensors"
        results = vision.run(still, tmp_path / str(keep_rates), device="cpu", ann=ann)
        t2, t1 = (np.array(list(stage["spike_rate"]["layers"].values())) for stage in results["stages"][1:])
        awake = t2 > 0.05
        assert awake.sum() >= 3
        change[keep_rates] = t1[awake] / (t2[awake] / 2)  # per micro-step
    assert change[True] == pytest.approx(1, abs=0.1)  # calibrated on other images than these
    assert (change[False] < change[True]).all()
    assert change[False].mean() < 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: dataclasses.replace(r, batch_size=100), "batch_size must be <= 75, the images left to train on"),
        (
            lambda r: dataclasses.replace(r, ann=dataclasses.replace(r.ann, learning_rate=1e30)),
            r"the loss of ann is (nan|inf) in epoch \d; train with a lower learning rate than 1e\+30 in another",
        ),
        (lambda r: dataclasses.replace(r, dataset="nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_named(
    change: Callable[[VisionRecipe], VisionRecipe], message: str, recipe: VisionRecipe, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        vision.run(change(recipe), tmp_path, device="cpu")


def test_a_call_that_could_not_begin_leaves_the_folder_free(recipe: VisionRecipe, tmp_path: Path) -> None:
    for wrong in ({"dataset": "nowhere"}, {"batch_size": 1_000}, {"image_size": 9}):
        with pytest.raises(ValueError, match=r"nowhere|batch_size|image_size"):
            vision.run(dataclasses.replace(recipe, **wrong), tmp_path / "run", device="cpu")
        assert not (tmp_path / "run").exists()
    with pytest.raises(vision.OutOfTimeError):
        vision.run(recipe, tmp_path, device="cpu", minutes=0.0)


def test_stages_of_one_epoch_stop_in_time_too(recipe: VisionRecipe, undisturbed: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(recipe, snn=dataclasses.replace(recipe.snn, epochs=1))
    with pytest.raises(vision.OutOfTimeError, match="out of time before T2"):
        vision.run(short, tmp_path, device="cpu", ann=undisturbed / "ann" / "model.safetensors", minutes=0.0)


def test_a_smoke_run_knows_all_classes(images: Path) -> None:
    """Images are thinned out evenly: a few drawn at random would miss classes."""
    smoke = dataclasses.replace(
        VISION_RECIPES["vgg6-cifar100"].smoke(), dataset=str(images), max_images=6, image_size=8
    )
    data = Run(
        dataclasses.replace(smoke, batch_size=6, validation_images=9, calibration_images=9), Path(), 0, "cpu"
    ).data
    assert data.train.labels.bincount().tolist() == [2, 2, 2]
    assert data.test.labels.bincount().tolist() == [2, 2, 2]
    assert len(data.validation) == 9


def test_a_damaged_checkpoint_is_named(recipe: VisionRecipe, tmp_path: Path) -> None:
    with pytest.raises(vision.OutOfTimeError):
        vision.run(recipe, tmp_path, device="cpu", minutes=0.0)
    (tmp_path / "ann" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"ann/checkpoint.pt is not a readable checkpoint .*remove it"):
        vision.run(recipe, tmp_path, device="cpu")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(launcher: list[str], script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, str(ROOT / "scripts" / script), *arguments],
        capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip


def test_two_processes_train_as_one_does(recipe: VisionRecipe, tmp_path: Path) -> None:
    """Without batch-norm, whose statistics are a process's own on the CPU; doubles would agree to the last bit.

    Thresholds do not fall with T: their quantile of so few currents jumps where rounding adds a single spike.
    """
    flags = ["--dataset", recipe.dataset, "--image-size", "8", "--width", "0.0625", "--dropout", "0.0"]
    flags += ["--no-batch-norm", "--validation-images", "15", "--calibration-images", "15", "--batch-size", "14"]
    flags += ["--ann.epochs", "2", "--ann.learning-rate", "0.05", "--snn.epochs", "1", "--schedule", "2", "1"]
    flags += ["--snn.no-keep-rates"]
    flags += ["--cpu-threads", "1", "--device", "cpu"]
    runs = {"one": [sys.executable], "two": TORCHRUN}
    for name, launcher in runs.items():
        run_dir = ["--run-dir", str(tmp_path / name)]
        done = start(launcher, "train_vision.py", "vgg6-cifar10", *flags, *run_dir, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("T2") == 1  # one of them prints
    for stage in ("ann", "T2", "T1"):
        one, two = weights(tmp_path / "one", stage), weights(tmp_path / "two", stage)
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-2, atol=1e-4)
        metrics = [json.loads((tmp_path / name / stage / "metrics.json").read_text()) for name in runs]
        assert metrics[0]["accuracy"]["images"] == metrics[1]["accuracy"]["images"] == 36
        assert metrics[0]["curve"]["loss"] == pytest.approx(metrics[1]["curve"]["loss"], rel=1e-3)
    assert "2 processes" in json.loads((tmp_path / "two" / "results.json").read_text())["hardware"]


def test_an_error_of_two_processes_is_one_line(recipe: VisionRecipe, tmp_path: Path) -> None:
    done = start(TORCHRUN, "train_vision.py", "vgg6-cifar10", "--dataset", "nowhere", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "nowhere" in done.stderr
    assert "gloo" not in done.stderr.lower()


def test_a_table_is_run_by_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a table is run by one process"):
        reproduce("table4", tmp_path)


def test_stages_of_the_same_timesteps_have_names_of_their_own() -> None:
    assert [Stage(None, None).name, Stage(1, "T2").name, Stage(1, "T1", "-sparse90").name] == [
        "ann",
        "T1",
        "T1-sparse90",
    ]
