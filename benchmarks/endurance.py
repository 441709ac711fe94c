"""Endurance: training under kills, and the memory of a long one.

python benchmarks/endurance.py kills --minutes 60      CartPole, SIGKILL every minute, as many runs as fit
python benchmarks/endurance.py memory --steps 1000000 memory of a million environment steps of spiking DQN
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # envs are not part of the installed package

from envs.classic import make_cartpole
from snn_rl import SpikingDQN
from snn_rl.cli.memory import keep_freed_memory
from snn_rl.runs.stages import hardware, versions

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 100


def train_under_kills(command: list[str], every: float) -> int:
    """Start ``command`` again and again, each time killed after ``every`` seconds, until it ends well; the kills."""
    kills = 0
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            status = process.wait(timeout=every)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        if status != 0:
            raise SystemExit(f"after {kills} kills the training ended with status {status}: {' '.join(command)}")
        return kills


def kills(minutes: float, every: float) -> None:
    """Whole CartPole trainings, seeds 0, 1, ..., until ``minutes`` have passed; the last one is finished."""
    end = time.monotonic() + 60 * minutes
    print(f"{hardware('cpu')}; {versions()}; SIGKILL every {every:g} s")
    seed = 0
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory() as folder:
            script = str(ROOT / "scripts" / "train_cartpole.py")
            started = time.monotonic()
            count = train_under_kills([sys.executable, script, "--seed", str(seed), "--run-dir", folder], every)
            results = json.loads(Path(folder, "results.json").read_text())
        took = (time.monotonic() - started) / 60
        returns = ", ".join(
            f"{s['stage']} {s['eval']['mean']:.1f} +- {s['eval']['std']:.1f}" for s in results["stages"]
        )
        print(f"seed {seed}: {count} kills in {took:.0f} minutes: {returns}", flush=True)
        seed += 1


class MemoryCallback(BaseCallback):
    """Resident memory of this process, in MiB, at ``SAMPLES`` moments of a training."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.every, self.at, self.mebibytes = steps // SAMPLES, [0], [resident_mebibytes()]

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at[-1] + self.every:
            self.at.append(self.num_timesteps)
            self.mebibytes.append(resident_mebibytes())
        return True


def resident_mebibytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(steps: int, figure: Path) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    model = SpikingDQN(
        "MlpPolicy",
        make_cartpole(8, seed=0),
        buffer_size=50_000,
        train_freq=8,
        target_update_interval=500,
        policy_kwargs={"timesteps": 2, "net_arch": [64, 64]},
        seed=0,
        device="cpu",
    )
    watch = MemoryCallback(steps)
    started = time.monotonic()
    model.learn(steps, callback=watch)
    # The replay is allocated at once, but touched only as it fills: it is full after its first 50,000 steps.
    full = next(i for i, at in enumerate(watch.at) if at >= 100_000)
    first, last = watch.mebibytes[full], watch.mebibytes[-1]
    print(f"{hardware('cpu')}; {versions()}")
    print(f"{steps} environment steps, {model._n_updates} updates, {(time.monotonic() - started) / 60:.0f} minutes")
    print(f"memory after {watch.at[full]} steps {first:.1f} MiB, at the end {last:.1f} MiB")
    drawing = Figure(figsize=(6, 3))
    axes = drawing.subplots()
    axes.plot(watch.at, watch.mebibytes)
    axes.set(xlabel="environment steps", ylabel="resident memory (MiB)", ylim=(0, None))
    drawing.savefig(figure, bbox_inches="tight", dpi=100)
    print(f"wrote {figure}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    killing = parts.add_parser("kills")
    killing.add_argument("--minutes", type=float, default=60)
    killing.add_argument("--every", type=float, default=60, help="seconds between kills")
    remembering = parts.add_parser("memory")
    remembering.add_argument("--steps", type=int, default=1_000_000)
    remembering.add_argument("--figure", type=Path, default=Path("memory.png"))
    options = parser.parse_args()
    if options.part == "kills" and not options.every >= 30:
        parser.error(f"--every must be >= 30 seconds, a few times what a start takes, got {options.every:g}")
    if options.part == "kills":
        kills(options.minutes, options.every)
    else:
        if options.steps < 200_000:
            parser.error(f"--steps must be >= 200000, twice those after which memory is looked at, got {options.steps}")
        memory(options.steps, options.figure)


if __name__ == "__main__":
    main()
