"""The accuracy of a classifier, and what its spiking layers did meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from snn_rl.core.activity import Activity, activity, count_spikes
from snn_rl.core.network import SpikingNetwork
from snn_rl.runs.stages import Stage
from snn_rl.vision._run import Run
from snn_rl.vision.classifier import call
from snn_rl.vision.data import ImageFiles, Images, eval_batches

EVAL_BATCH = 256  # of all processes together


@dataclass(frozen=True)
class Accuracy:
    """Shares of the images whose class is the most likely one, or among the five most likely."""

    top1: float
    top5: float
    images: int


@torch.no_grad()
def evaluate(run: Run, network: nn.Module, images: Images | ImageFiles) -> Accuracy:
    was_training = network.training
    network.eval()
    seen = torch.zeros(3, dtype=torch.float64, device=run.device)  # top 1, top 5, images
    prepare = run.classifier(network, Stage(None, None)).prepare
    batch_size = max(1, EVAL_BATCH // run.world) * run.world
    for batch, labels in eval_batches(images, batch_size, rank=run.rank, world=run.world, device=run.device):
        logits = call(network, prepare(batch))  # in full precision, as the shared file will run
        likely = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        seen += torch.stack([likely[:, 0].sum(), likely.sum(), torch.tensor(len(labels), device=run.device)])
    network.train(was_training)
    top1, top5, count = run.total(seen).tolist()
    return Accuracy(top1 / count, top5 / count, int(count))


def on_test_images(run: Run, stage: Stage, network: SpikingNetwork) -> tuple[Accuracy, Activity | None]:
    """On the test images, of all processes; the activity is the first process's to tell."""
    with count_spikes(network) as counter:
        accuracy = evaluate(run, network, run.data.test)
    names = list(counter.spikes)
    counts = [[counter.spikes[name], float(counter.inferences[name])] for name in names]
    totals = torch.tensor(counts, dtype=torch.float64, device=run.device)
    for name, (spikes, inferences) in zip(names, run.total(totals).tolist(), strict=True):
        counter.spikes[name], counter.inferences[name] = spikes, int(inferences)
    if not run.writes:  # which may have seen no image at all
        return accuracy, None
    size = run.recipe.image_size
    sparse = bool(stage.variant)
    return accuracy, activity(network, counter.rates(), (3, size, size), persistent=False, skip_zero_weights=sparse)
