"""A stage of a classifier: its network, its checkpoints, epochs of updates, and its export."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from snn_rl.base.files import atomic
from snn_rl.base.progress import bar, one_line
from snn_rl.core.convert import to_spiking
from snn_rl.core.network import SpikingNetwork
from snn_rl.core.prune import prune_timesteps
from snn_rl.runs import task
from snn_rl.runs.stages import Stage
from snn_rl.runs.task import Checkpoints, Measured, OutOfTimeError, Training
from snn_rl.vision._evaluation import EVAL_BATCH, evaluate, on_test_images
from snn_rl.vision._run import Run
from snn_rl.vision._updates import Updates, prune_weights
from snn_rl.vision.classifier import load_classifier, save_classifier
from snn_rl.vision.models import build

LOG = logging.getLogger(__name__)
MODEL = "model.safetensors"
BEST_MODEL = "best.safetensors"
CHECKPOINT = "checkpoint.pt"


@dataclass
class History(task.History):
    """What a stage has seen, kept in its checkpoint."""

    curve: dict[str, list[float]] = field(default_factory=lambda: {"epochs": [], "loss": [], "accuracy": []})
    updates: int = 0

    @property
    def epochs(self) -> int:
        return len(self.validation)

    def without_progress(self) -> int:
        """Epochs since the best validation accuracy."""
        accuracies = [accuracy for _, accuracy in self.validation]
        return 0 if not accuracies else len(accuracies) - 1 - accuracies.index(max(accuracies))


class ClassifierTraining(Training):
    """A stage that trains a network, ANN or spiking, by gradients on batches of images."""

    network: nn.Module
    history: History

    def __init__(self, run: Run, stage: Stage) -> None:
        super().__init__(stage, run.folder(stage), History())
        self.run = run

    def begin(self) -> None:
        self.network = self._new()
        self.updates = Updates(self.run, self.stage, self.network)

    def resume(self) -> str | None:
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return None
        self.begin()
        try:
            state = torch.load(path, map_location=self.run.device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.updates.optimizer.load_state_dict(state["optimizer"])
            self.history = History(**state["history"])
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(f"{path} is not a readable checkpoint ({one_line(error)}); remove it") from error
        return f"{self.history.epochs} of {self.updates.epochs} epochs"

    def save(self) -> None:
        with atomic(self.folder / CHECKPOINT) as temporary:
            state = {"network": self.network.state_dict(), "optimizer": self.updates.optimizer.state_dict()}
            torch.save({**state, "history": vars(self.history)}, temporary)

    def _new(self) -> nn.Module:
        """A stage's network before its first update: drawn, converted, or its parent's at fewer timesteps."""
        run, stage, recipe, data = self.run, self.stage, self.run.recipe, self.run.data
        torch.manual_seed(run.seed)
        if stage.timesteps is None:
            network: nn.Module = build(classes=len(data.train.classes), **run.architecture)
            if run.world > 1 and run.device.startswith("cuda"):
                network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            return network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert stage.parent is not None
        parent = load_classifier(run.directory / stage.parent / MODEL, run.device)
        network = parent.network

        def calibration(images: int) -> Iterator[Tensor]:
            # evenly spread: the images of a folder lie class by class
            spread = torch.arange(images) * len(data.validation) // images
            batches = (data.validation.read(index, None)[0].to(run.device) for index in spread.split(EVAL_BATCH))
            return map(parent.prepare, batches)

        if isinstance(network, SpikingNetwork):
            if stage.variant:
                prune_weights(network, recipe.sparsity)
            elif recipe.snn.keep_rates:  # one batch, of which a layer's currents are kept: few of large images
                few = max(16, EVAL_BATCH * 64**2 // max(64, recipe.image_size) ** 2)
                (images,) = calibration(min(recipe.calibration_images, few))
                network = prune_timesteps(network, stage.timesteps, images.unsqueeze(0))
            else:
                network.timesteps = stage.timesteps
            return network
        return to_spiking(
            network,
            calibration(recipe.calibration_images),
            recipe.snn.percentile,
            stage.timesteps,
            leak=recipe.snn.leak,
            leak_reset=recipe.snn.leak_reset,
        )

    def train(self, checkpoints: Checkpoints) -> None:
        run, history, updates, name = self.run, self.history, self.updates, self.stage.name
        if len(run.of_all(history.epochs)) > 1:  # which also waits: the first process writes the next checkpoint
            raise ValueError(
                f"the processes found different checkpoints: {run.directory} must be a folder they all share"
            )
        updates.start(
            load_classifier(run.directory / "ann" / MODEL, run.device).network if updates.teacher_weight else None
        )
        total = updates.epochs * updates.per_epoch
        with self._log() as writer, bar(run.progress_bar, name, total, "update", history.updates) as tick:
            while not self._is_over():
                loss, accuracy = updates.train_epoch(history.epochs, tick)
                self._note(loss, accuracy, checkpoints, writer)
                if not self._is_over() and run.is_late():
                    done = f"{history.epochs} of {updates.epochs} epochs"
                    raise OutOfTimeError(f"out of time in {name} after {done}; the same call goes on")
        run.wait()

    def _is_over(self) -> bool:
        patience = getattr(self.updates.config, "patience", None)
        is_stuck = patience is not None and self.history.without_progress() >= patience
        return is_stuck or self.history.epochs >= self.updates.epochs

    def _note(self, loss: float, accuracy: float, checkpoints: Checkpoints, writer: SummaryWriter | None) -> None:
        """Validate after an epoch, and write a checkpoint."""
        run, history, updates = self.run, self.history, self.updates
        validation = evaluate(run, self.network, run.data.validation).top1
        history.updates += updates.per_epoch
        epoch = history.epochs + 1
        for key, value in (("epochs", epoch), ("loss", loss), ("accuracy", accuracy)):
            history.curve[key].append(value)
        is_best = validation >= history.best  # of equals the one trained longer
        history.note(epoch, validation)
        if writer is None:
            return
        LOG.info(
            "%s after %d of %d epochs: %.2f %% on validation",
            self.stage.name,
            epoch,
            updates.epochs,
            100 * validation,
        )
        _write_log(writer, self.network, history, updates.learning_rate)
        if is_best:
            save_classifier(run.classifier(self.network, self.stage), self.folder / BEST_MODEL)
        checkpoints.write()

    @contextmanager
    def _log(self) -> Iterator[SummaryWriter | None]:
        if not self.run.writes:
            yield None
            return
        with SummaryWriter(str(self.folder), purge_step=self.history.epochs + 1) as writer:
            yield writer

    def choose(self) -> None:
        self.network = load_classifier(self.folder / BEST_MODEL, self.run.device).network

    def export(self) -> Measured | None:
        """Evaluate on the test images and write the network."""
        run, stage, network, history = self.run, self.stage, self.network, self.history
        spiking = network if isinstance(network, SpikingNetwork) else None
        if spiking is None:
            accuracy, activity = evaluate(run, network, run.data.test), None
        else:
            accuracy, activity = on_test_images(run, stage, spiking)
        if not run.writes:
            return None
        save_classifier(run.classifier(network, stage), self.folder / MODEL)
        counts = {"env_steps": None, "epochs": history.epochs, "updates": history.updates}
        return Measured(counts, {"accuracy": vars(accuracy)}, activity, spiking)


class GivenClassifier(ClassifierTraining):
    """Trained by another run: it takes the ANN stage's place."""

    is_trained = False

    def __init__(self, run: Run, stage: Stage, path: Path) -> None:
        super().__init__(run, stage)
        self.path = path

    def begin(self) -> None:
        self.network = load_ann(self.run, self.path)


def load_ann(run: Run, path: Path) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"no file at {path}; --ann takes the {MODEL} of another run's ANN")
    ann = load_classifier(path, run.device)
    if ann.timesteps is not None:
        raise ValueError(f"{path} holds a spiking network of T = {ann.timesteps}; --ann takes an ANN")
    ours = run.classifier(ann.network, Stage(None, None))
    pairs = {name: (ann.provenance.get(name), value) for name, value in run.split.items()}
    pairs |= {name: (getattr(ann, name), getattr(ours, name)) for name in ("architecture", "classes")}
    for name, (theirs, wanted) in pairs.items():
        if theirs != wanted:
            raise ValueError(
                f"{path} was trained with {name} {theirs}, but {run.recipe.name} has {wanted}: it takes an ANN "
                "of the same network that has not seen the images held out here"
            )
    return ann.network


def _write_log(writer: SummaryWriter, network: nn.Module, history: History, learning_rate: float) -> None:
    epoch = history.epochs
    writer.add_scalar("train/loss", history.curve["loss"][-1], epoch)
    writer.add_scalar("train/accuracy", history.curve["accuracy"][-1], epoch)
    writer.add_scalar("train/learning_rate", learning_rate, epoch)
    writer.add_scalar("validation/accuracy", history.validation[-1][1], epoch)
    if isinstance(network, SpikingNetwork):
        for name, lif in network.lif_layers.items():
            writer.add_scalar(f"threshold/{name}", lif.threshold.item(), epoch)
            writer.add_scalar(f"leak/{name}", lif.leak.item(), epoch)
