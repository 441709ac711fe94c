"""The stages of a classifier: ANN, conversion, temporal pruning. How stages make a run: `snn_rl.runs.stages`.

A stage is resumed to the epoch. Under ``torchrun`` every process takes its part of each batch, gradients are averaged,
and the first process alone writes; the run's folder must be one that all of them see.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from snn_rl.base.files import alone_in, atomic, write_json
from snn_rl.base.progress import bar, show_log
from snn_rl.core.activity import activity, count_spikes
from snn_rl.core.convert import to_spiking
from snn_rl.core.network import SpikingNetwork
from snn_rl.core.prune import prune_timesteps
from snn_rl.runs.stages import (
    Stage,
    chain,
    check_device,
    claim,
    hardware,
    measurements,
    remove_leftovers,
    run_stages,
    versions,
)
from snn_rl.vision._run import Run, processes
from snn_rl.vision.classifier import call, load_classifier, save_classifier
from snn_rl.vision.data import (
    ImageFiles,
    Images,
    eval_batches,
    train_batches,
)
from snn_rl.vision.models import build
from snn_rl.vision.recipe import AnnTraining, SnnTraining, VisionRecipe

LOG = logging.getLogger(__name__)
MODEL = "model.safetensors"
BEST_MODEL = "best.safetensors"
CHECKPOINT = "checkpoint.pt"
EVAL_BATCH = 256  # of all processes together


class OutOfTimeError(RuntimeError):
    """A run has used the time it was given; the same call goes on."""


def run(
    recipe: VisionRecipe,
    directory: Path,
    seed: int = 0,
    *,
    device: str = "auto",
    ann: Path | None = None,
    progress_bar: bool = False,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Train every stage of ``recipe`` that is not finished yet; returns what ``results.json`` holds.

    ``ann`` is the ``model.safetensors`` of another run's ANN that takes the ANN stage's place: it is evaluated, not
    trained. After ``minutes`` the run stops at the end of an epoch.

    What the run does is logged to ``logging``'s "snn_rl" and shown on stderr, unless the program has set up logging.
    ``logging.getLogger("snn_rl").setLevel(logging.WARNING)`` turns it off. ``progress_bar`` adds bars with the time
    left, where tqdm is installed.

    Raises:
        ValueError: a directory of another run, a device that is not there, data that cannot be used, an ``ann`` that
            does not fit, a loss that is not finite.
        OutOfTimeError: ``minutes`` have passed; the same call goes on.
    """
    if not 0 <= seed < 100_000:
        raise ValueError(f"seed must lie in [0, 100000), got {seed}")
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes must be >= 0, got {minutes}")
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    if recipe.cpu_threads is not None:
        torch.set_num_threads(recipe.cpu_threads)
    with processes(check_device(device)) as (device, rank, world), ExitStack() as held:
        if recipe.batch_size % world:
            raise ValueError(f"batch_size must be a multiple of the {world} processes, got {recipe.batch_size}")
        this = Run(recipe, directory, seed, device, rank, world, progress_bar and rank == 0, deadline)
        if rank == 0:
            held.enter_context(show_log())
        this.together(lambda: _check(this, ann, held))
        stages = chain(recipe.schedule, ann)
        if recipe.sparsity:
            stages.append(Stage(recipe.schedule[-1], stages[-1].name, f"-sparse{100 * recipe.sparsity:g}"))
        head = {"recipe": recipe.name, "env_id": recipe.dataset, "seed": seed}
        trained: list[str] = []

        def train(stage: Stage) -> None:
            if trained and _is_late(this):
                raise OutOfTimeError(f"out of time before {stage.name}; the same call goes on")
            _train_stage(this, stage)
            trained.append(stage.name)

        return run_stages(directory, stages, train, head, writes=rank == 0)


def _check(this: Run, ann: Path | None, held: ExitStack) -> None:
    """Bind the folder to this run, once it is known that the run can begin; its first process holds it."""
    if not (this.directory / "run.json").is_file():
        if this.rank:
            raise ValueError(f"{this.directory} must be a folder that all processes share: the first one's is not seen")
        classes = len(this.data.train.classes)
        with torch.device("meta"):  # takes no memory
            build(classes=classes, **this.architecture)
        if ann is not None:
            _load_ann(this, ann)
    if this.rank == 0:
        held.enter_context(alone_in(this.directory))
    claim(this.directory, this.recipe, this.seed, ann)


# --- one stage ----------------------------------------------------------------------------------------------------


@dataclass
class History:
    """What a stage has seen, kept in its checkpoint."""

    curve: dict[str, list[float]] = field(default_factory=lambda: {"epochs": [], "loss": [], "accuracy": []})
    validation: list[list[float]] = field(default_factory=list)  # [epoch, accuracy]
    wall_seconds: float = 0.0
    updates: int = 0

    @property
    def epochs(self) -> int:
        return len(self.validation)

    @property
    def best(self) -> float:
        return max((accuracy for _, accuracy in self.validation), default=-1.0)

    def without_progress(self) -> int:
        """Epochs since the best validation accuracy."""
        accuracies = [accuracy for _, accuracy in self.validation]
        return 0 if not accuracies else len(accuracies) - 1 - accuracies.index(max(accuracies))


def _train_stage(this: Run, stage: Stage) -> None:
    """Train or resume a stage, choose its checkpoint on validation images, evaluate it, write its files."""
    folder = this.directory / stage.name
    history = History()
    if stage.timesteps is None and stage.parent is not None:
        network = _load_ann(this, Path(stage.parent))
    else:
        network = _begin(this, stage)
        _fit(this, stage, network, history)
        network = load_classifier(folder / BEST_MODEL, this.device).network
    _export(this, stage, network, history)
    this.wait()


def _begin(this: Run, stage: Stage) -> nn.Module:
    """A stage's network before its first update: drawn, converted, or its parent's at fewer timesteps."""
    recipe, data = this.recipe, this.data
    torch.manual_seed(this.seed)
    if stage.timesteps is None:
        network: nn.Module = build(classes=len(data.train.classes), **this.architecture)
        if this.world > 1 and this.device.startswith("cuda"):
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network.to(this.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert stage.parent is not None
    parent = load_classifier(this.directory / stage.parent / MODEL, this.device)
    network = parent.network

    def calibration(images: int) -> Iterator[Tensor]:
        # evenly spread: the images of a folder lie class by class
        spread = torch.arange(images) * len(data.validation) // images
        batches = (data.validation.read(index, None)[0].to(this.device) for index in spread.split(EVAL_BATCH))
        return map(parent.prepare, batches)

    if isinstance(network, SpikingNetwork):
        if stage.variant:
            _prune_weights(network, recipe.sparsity)
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


def _load_ann(this: Run, path: Path) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"no file at {path}; --ann takes the {MODEL} of another run's ANN")
    ann = load_classifier(path, this.device)
    if ann.timesteps is not None:
        raise ValueError(f"{path} holds a spiking network of T = {ann.timesteps}; --ann takes an ANN")
    ours = this.classifier(ann.network, Stage(None, None))
    pairs = {name: (ann.provenance.get(name), value) for name, value in this.split.items()}
    pairs |= {name: (getattr(ann, name), getattr(ours, name)) for name in ("architecture", "classes")}
    for name, (theirs, wanted) in pairs.items():
        if theirs != wanted:
            raise ValueError(
                f"{path} was trained with {name} {theirs}, but {this.recipe.name} has {wanted}: it takes an ANN "
                "of the same network that has not seen the images held out here"
            )
    return ann.network


def _synapse_weights(network: nn.Module) -> list[Tensor]:
    return [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@torch.no_grad()
def _prune_weights(network: nn.Module, sparsity: float) -> None:
    """Set the smallest ``sparsity`` of each synapse's weights to 0."""
    for weight in _synapse_weights(network):
        pruned = int(sparsity * weight.numel())
        if pruned:
            weight.mul_(weight.abs() > weight.abs().flatten().kthvalue(pruned).values)


def _optimizer(network: nn.Module, config: AnnTraining | SnnTraining) -> torch.optim.Optimizer:
    """Weight decay is for weights: biases, batch-norm, thresholds and leaks have none."""
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.Adam(groups, config.learning_rate, fused=True)


def _fit(this: Run, stage: Stage, network: nn.Module, history: History) -> None:
    """Train ``network`` from its last checkpoint, or from its start, to the end of its epochs."""
    recipe, folder = this.recipe, this.directory / stage.name
    config = recipe.ann if stage.timesteps is None else recipe.snn
    epochs = recipe.ann.epochs if stage.timesteps is None else recipe.snn_epochs(stage.timesteps)
    optimizer = _optimizer(network, config)
    _resume(this, folder / CHECKPOINT, network, optimizer, history)
    if (
        len(this.of_all(history.epochs)) > 1
    ):  # which also waits: the first process is going to write the next checkpoint
        raise ValueError(f"the processes found different checkpoints: {this.directory} must be a folder they all share")
    if this.rank == 0 and not history.epochs:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    masks = [(w, (w != 0).to(w.dtype)) for w in _synapse_weights(network)] if stage.variant else []
    model = DistributedDataParallel(network) if this.world > 1 else network
    weight = 0.0 if stage.timesteps is None else recipe.snn.distillation_weight
    teacher = load_classifier(this.directory / "ann" / MODEL, this.device).network if weight else None
    order = 1_000 * this.seed + (stage.timesteps or 0) + 100 * bool(stage.variant)  # of its own in each stage
    batches = len(this.data.train) // recipe.batch_size
    with (
        _log(this, folder, history) as writer,
        bar(this.progress_bar, stage.name, epochs * batches, "update", history.updates) as tick,
    ):
        while history.epochs < epochs and not _is_stuck(config, history):
            started = time.monotonic()
            epoch = history.epochs
            torch.manual_seed(1_000_003 * order + 1_009 * epoch + this.rank)  # for dropout, the same after a kill
            seen = torch.zeros(2, dtype=torch.float64, device=this.device)  # loss, correct
            network.train()
            for i, (images, labels) in enumerate(
                train_batches(
                    this.data.train,
                    recipe.batch_size,
                    augmentation=recipe.augmentation,
                    seed=order,
                    epoch=epoch,
                    rank=this.rank,
                    world=this.world,
                    device=this.device,
                )
            ):
                progress = (epoch * batches + i) / (epochs * batches)
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
                x = this.classifier(network, stage).prepare(images)
                with this.autocast():
                    logits = call(model, x)
                loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                if teacher is not None:
                    with torch.no_grad():
                        wanted = call(teacher, x)
                    loss = (1 - weight) * loss + weight * softened_divergence(logits.float(), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for synapse, mask in masks:
                        synapse.mul_(mask)
                    seen += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
                tick(1)
            loss_mean, accuracy = (this.total(seen) / (batches * recipe.batch_size)).tolist()
            if not math.isfinite(loss_mean):
                raise ValueError(
                    f"the loss of {stage.name} is {loss_mean} in epoch {epoch}; train with a lower learning rate than "
                    f"{config.learning_rate} in another --run-dir"
                )
            validation = _evaluate(this, network, this.data.validation).top1
            history.updates += batches
            for key, value in (("epochs", epoch + 1), ("loss", loss_mean), ("accuracy", accuracy)):
                history.curve[key].append(value)
            is_best = validation >= history.best  # of equals the one trained longer
            history.validation.append([epoch + 1, validation])
            history.wall_seconds += time.monotonic() - started
            if this.rank == 0:
                LOG.info(
                    "%s after %d of %d epochs: %.2f %% on validation", stage.name, epoch + 1, epochs, 100 * validation
                )
                _write_log(writer, network, history, optimizer.param_groups[0]["lr"])
                if is_best:
                    save_classifier(this.classifier(network, stage), folder / BEST_MODEL)
                with atomic(folder / CHECKPOINT) as temporary:
                    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save({**state, "history": vars(history)}, temporary)
            if history.epochs < epochs and not _is_stuck(config, history) and _is_late(this):
                done = f"{history.epochs} of {epochs} epochs"
                raise OutOfTimeError(f"out of time in {stage.name} after {done}; the same call goes on")
    this.wait()


def softened_divergence(logits: Tensor, wanted: Tensor, temperature: float = 2.0) -> Tensor:
    """Kullback-Leibler divergence of predictions (batch, classes) from wanted ones, both softened by ``temperature``.

    Times the temperature's square, so that its gradient is of the size of the labels' (Hinton et al. 2015).
    """
    ours, theirs = (x.div(temperature).log_softmax(1) for x in (logits, wanted))
    return temperature**2 * nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _is_stuck(config: AnnTraining | SnnTraining, history: History) -> bool:
    patience = getattr(config, "patience", None)
    return patience is not None and history.without_progress() >= patience


def _is_late(this: Run) -> bool:
    """Whether any process has passed the deadline: all have to agree to stop."""
    late = torch.tensor(float(time.monotonic() > this.deadline), device=this.device)
    return bool(this.total(late) > 0)


def _resume(this: Run, path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, history: History) -> None:
    if not path.is_file():
        return
    try:
        state = torch.load(path, map_location=this.device, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        restored = History(**state["history"])
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: {reason}); remove it"
        ) from error
    for f in fields(History):
        setattr(history, f.name, getattr(restored, f.name))


@contextmanager
def _log(this: Run, folder: Path, history: History) -> Iterator[SummaryWriter | None]:
    if this.rank != 0:
        yield None
        return
    with SummaryWriter(str(folder), purge_step=history.epochs + 1) as writer:
        yield writer


def _write_log(writer: SummaryWriter | None, network: nn.Module, history: History, learning_rate: float) -> None:
    assert writer is not None
    epoch = history.epochs
    writer.add_scalar("train/loss", history.curve["loss"][-1], epoch)
    writer.add_scalar("train/accuracy", history.curve["accuracy"][-1], epoch)
    writer.add_scalar("train/learning_rate", learning_rate, epoch)
    writer.add_scalar("validation/accuracy", history.validation[-1][1], epoch)
    if isinstance(network, SpikingNetwork):
        for name, lif in network.lif_layers.items():
            writer.add_scalar(f"threshold/{name}", lif.threshold.item(), epoch)
            writer.add_scalar(f"leak/{name}", lif.leak.item(), epoch)


# --- after a stage ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Shares of the images whose class is the most likely one, or among the five most likely."""

    top1: float
    top5: float
    images: int


@torch.no_grad()
def _evaluate(this: Run, network: nn.Module, images: Images | ImageFiles) -> Accuracy:
    was_training = network.training
    network.eval()
    seen = torch.zeros(3, dtype=torch.float64, device=this.device)  # top 1, top 5, images
    prepare = this.classifier(network, Stage(None, None)).prepare
    batch_size = max(1, EVAL_BATCH // this.world) * this.world
    for batch, labels in eval_batches(images, batch_size, rank=this.rank, world=this.world, device=this.device):
        logits = call(network, prepare(batch))  # in full precision, as the shared file will run
        likely = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        seen += torch.stack([likely[:, 0].sum(), likely.sum(), torch.tensor(len(labels), device=this.device)])
    network.train(was_training)
    top1, top5, count = this.total(seen).tolist()
    return Accuracy(top1 / count, top5 / count, int(count))


def _export(this: Run, stage: Stage, network: nn.Module, history: History) -> None:
    """Evaluate on the test images and write the stage's files, ``metrics.json`` last."""
    folder = this.directory / stage.name
    measured = None
    if isinstance(network, SpikingNetwork):
        with count_spikes(network) as counter:
            accuracy = _evaluate(this, network, this.data.test)
        names = list(counter.spikes)
        counts = [[counter.spikes[name], float(counter.inferences[name])] for name in names]
        totals = torch.tensor(counts, dtype=torch.float64, device=this.device)
        for name, (spikes, inferences) in zip(names, this.total(totals).tolist(), strict=True):
            counter.spikes[name], counter.inferences[name] = spikes, int(inferences)
    else:
        accuracy = _evaluate(this, network, this.data.test)
    if this.rank != 0:  # which may have seen no image at all
        return
    if isinstance(network, SpikingNetwork):
        size = this.recipe.image_size
        measured = activity(
            network, counter.rates(), (3, size, size), persistent=False, skip_zero_weights=bool(stage.variant)
        )
    save_classifier(this.classifier(network, stage), folder / MODEL)
    lifs = network.lif_layers if isinstance(network, SpikingNetwork) else {}
    write_json(
        folder / "metrics.json",
        {
            "stage": stage.name,
            "timesteps": stage.timesteps,
            "parent": stage.parent,
            "env_steps": None,
            "epochs": history.epochs,
            "updates": history.updates,
            "wall_seconds": round(history.wall_seconds, 1),
            "accuracy": vars(accuracy),
            "validation": history.validation,
            "curve": history.curve,
            **measurements(measured),
            "threshold": {name: lif.threshold.item() for name, lif in lifs.items()},
            "leak": {name: lif.leak.item() for name, lif in lifs.items()},
            "versions": versions(),
            "hardware": hardware(this.device) + (f", {this.world} processes" if this.world > 1 else ""),
        },
    )
