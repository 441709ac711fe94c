"""Gradient steps of a classifier: its optimizer, its loss, and the weights that stay 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snn_rl.runs.stages import Stage
from snn_rl.vision._run import Run
from snn_rl.vision.classifier import call
from snn_rl.vision.data import train_batches
from snn_rl.vision.recipe import AnnTraining, SnnTraining


class Updates:
    """The updates of a stage's ``network``. A loss that has a ``teacher`` takes in what that predicts."""

    def __init__(self, run: Run, stage: Stage, network: nn.Module) -> None:
        recipe = run.recipe
        ann = stage.timesteps is None
        self.run, self.stage, self.network = run, stage, network
        self.config: AnnTraining | SnnTraining = recipe.ann if ann else recipe.snn
        self.epochs = recipe.ann.epochs if stage.timesteps is None else recipe.snn_epochs(stage.timesteps)
        self.per_epoch = len(run.data.train) // recipe.batch_size
        self.optimizer = _optimizer(network, self.config)
        self.teacher_weight = 0.0 if ann else recipe.snn.distillation_weight
        # of its own in each stage
        self._order = 1_000 * run.seed + (stage.timesteps or 0) + 100 * bool(stage.variant)

    @property
    def learning_rate(self) -> float:
        """That of the last update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def start(self, teacher: nn.Module | None) -> None:
        """From the weights that the network has now; those that are 0 stay 0 where the stage is sparse."""
        self._teacher = teacher
        self._masks = [(w, (w != 0).to(w.dtype)) for w in synapse_weights(self.network)] if self.stage.variant else []
        self._model = DistributedDataParallel(self.network) if self.run.world > 1 else self.network

    def train_epoch(self, epoch: int, tick: Callable[[int], object]) -> tuple[float, float]:
        """The mean loss and accuracy of an epoch's images, of all processes.

        Raises:
            ValueError: a loss that is not finite.
        """
        run, recipe = self.run, self.run.recipe
        torch.manual_seed(1_000_003 * self._order + 1_009 * epoch + run.rank)  # for dropout, the same after a kill
        seen = torch.zeros(2, dtype=torch.float64, device=run.device)  # loss, correct
        self.network.train()
        for i, (images, labels) in enumerate(
            train_batches(
                run.data.train,
                recipe.batch_size,
                augmentation=recipe.augmentation,
                seed=self._order,
                epoch=epoch,
                rank=run.rank,
                world=run.world,
                device=run.device,
            )
        ):
            progress = (epoch * self.per_epoch + i) / (self.epochs * self.per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            loss, correct = self._update(images, labels)
            seen += torch.stack([loss * len(labels), correct])
            tick(1)
        loss_mean, accuracy = (run.total(seen) / (self.per_epoch * recipe.batch_size)).tolist()
        if not math.isfinite(loss_mean):
            raise ValueError(
                f"the loss of {self.stage.name} is {loss_mean} in epoch {epoch}; train with a lower learning rate than "
                f"{self.config.learning_rate} in another --run-dir"
            )
        return loss_mean, accuracy

    def _update(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch before the update, and how many images were classified correctly."""
        x = self.run.classifier(self.network, self.stage).prepare(images)
        with self.run.autocast():
            logits = call(self._model, x)
        smoothing = self.config.label_smoothing
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        if self._teacher is not None:
            with torch.no_grad():
                wanted = call(self._teacher, x)
            weight = self.teacher_weight
            loss = (1 - weight) * loss + weight * softened_divergence(logits.float(), wanted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for synapse, mask in self._masks:
                synapse.mul_(mask)
        return loss.detach(), (logits.argmax(1) == labels).sum()


def softened_divergence(logits: Tensor, wanted: Tensor, temperature: float = 2.0) -> Tensor:
    """Kullback-Leibler divergence of predictions (batch, classes) from wanted ones, both softened by ``temperature``.

    Times the temperature's square, so that its gradient is of the size of the labels' (Hinton et al. 2015).
    """
    ours, theirs = (x.div(temperature).log_softmax(1) for x in (logits, wanted))
    return temperature**2 * nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def synapse_weights(network: nn.Module) -> list[Tensor]:
    return [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@torch.no_grad()
def prune_weights(network: nn.Module, sparsity: float) -> None:
    """Set the smallest ``sparsity`` of each synapse's weights to 0."""
    for weight in synapse_weights(network):
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
