"""What a run needs of what it trains: a `Task` of stages, a `Training` for each; their history and checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, process_time
from typing import Any

from snn_rl.core.activity import Activity
from snn_rl.core.network import SpikingNetwork
from snn_rl.runs.claim import AnyRecipe
from snn_rl.runs.stages import Stage, hardware

CHECKPOINT_SECONDS = 60.0  # of training that a kill costs at most
WRITING_SHARE = 0.05  # of the time, at most: where writing takes long, checkpoints are further apart


class OutOfTimeError(RuntimeError):
    """A run has used the time it was given; the same call goes on."""


@dataclass(frozen=True)
class Run:
    """One training of a recipe: where, with which seed, on which device."""

    recipe: AnyRecipe
    directory: Path
    seed: int
    device: str
    progress_bar: bool = False

    memory_fields = "batch_size"  # the fields of the recipe to lower where memory does not suffice

    def folder(self, stage: Stage) -> Path:
        return self.directory / stage.name

    # Of several processes that train together. One process alone writes, waits for nobody and is never late.

    @property
    def writes(self) -> bool:
        return True

    @property
    def hardware(self) -> str:
        return hardware(self.device)

    def wait(self) -> None:
        """Until every process is here: what one wrote, the others now see."""

    def together(self, check: Callable[[], None]) -> None:
        """Run ``check``; where it fails in one process, it does in all."""
        check()

    def is_late(self) -> bool:
        """Whether the run has used the time it was given."""
        return False


@dataclass
class History:
    """What a stage has seen, kept with its checkpoint."""

    curve: dict[str, list[float]] = field(default_factory=dict)
    validation: list[list[float]] = field(default_factory=list)  # [steps or epochs, score]
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process, on all cores: what a busy machine does not change

    @property
    def best(self) -> float:
        """The best validation so far."""
        return max((score for _, score in self.validation), default=-float("inf"))

    def note(self, at: float, score: float) -> None:
        """A validation; of two at one step, before and after a kill, the better one, which is the one that is kept."""
        noted: dict[float, float] = {at: kept for at, kept in self.validation}  # noqa: C416  mypy knows no pairs in lists
        noted[at] = max(score, noted.get(at, score))
        self.validation = [[at, noted[at]] for at in sorted(noted)]


class Checkpoints:
    """A stage's checkpoints: when one is due, and how long the stage has taken.

    ``save`` writes one; its arguments are those of `write`. ``since`` is when the stage was begun or resumed.
    """

    def __init__(self, history: History, save: Callable[..., None], since: float | None = None) -> None:
        self._history, self._save = history, save
        self._written = monotonic()
        self._started = (self._written if since is None else since) - history.wall_seconds
        self._cpu = process_time() - history.cpu_seconds
        self._cost = 0.0  # seconds that writing the last one took

    def are_due(self) -> bool:
        """Whether a minute has passed since the last one, or longer, so that writing takes a twentieth at most."""
        return monotonic() - self._written >= max(CHECKPOINT_SECONDS, self._cost / WRITING_SHARE)

    def tell_time(self) -> None:
        """Note in the history how long the stage has taken."""
        self._history.wall_seconds = monotonic() - self._started
        self._history.cpu_seconds = process_time() - self._cpu

    def write(self, **kwargs: Any) -> None:
        began = monotonic()
        self.tell_time()
        self._save(**kwargs)
        self._written = monotonic()
        self._cost = self._written - began


@dataclass(frozen=True)
class Measured:
    """What a finished stage is measured by, as ``metrics.json`` holds it."""

    counts: Mapping[str, Any]  # of steps, epochs and updates
    score: Mapping[str, Any]  # on the episodes or images that are for reporting alone
    activity: Activity | None  # of a spiking stage
    network: SpikingNetwork | None


class Training(ABC):
    """One stage, of a kind: begun or resumed, trained, chosen, exported, in this order."""

    is_trained = True  # otherwise something given stands in for the stage: begun and exported, not trained

    def __init__(self, stage: Stage, folder: Path, history: History) -> None:
        self.stage, self.folder, self.history = stage, folder, history

    @abstractmethod
    def resume(self) -> str | None:
        """Go on from the last checkpoint; returns how far it had come, or None where there is none."""

    @abstractmethod
    def begin(self) -> None:
        """Before the first update."""

    @abstractmethod
    def train(self, checkpoints: Checkpoints) -> None:
        """From wherever it stands to its end."""

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint, from which `resume` goes on; more arguments are those of `Checkpoints.write`."""

    @abstractmethod
    def choose(self) -> None:
        """Take the best checkpoint on validation."""

    @abstractmethod
    def export(self) -> Measured | None:
        """Write what is shared, and measure what was written; None in a process that measures nothing."""


class Task(ABC):
    """What is to be trained: a chain of stages, and a `Training` for each."""

    run: Run
    stages: Sequence[Stage]
    ann: Path | None  # takes the ANN stage's place
    subject: str  # what it learns: an environment's id, or a data set's name

    @abstractmethod
    def check(self) -> Mapping[str, str]:
        """What a stage would find out after the one before it has been trained.

        Returns what ``run.json`` holds beside the recipe: the spaces of the environment.

        Raises:
            ValueError: what could not be trained.
        """

    @abstractmethod
    def training(self, stage: Stage) -> Training: ...
