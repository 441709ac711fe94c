"""Training step, inference and peak memory of one network: ours, other frameworks, and what its dense layers cost.

python benchmarks/layers.py nature --batch 32 --timesteps 1 3 5
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine, medians, peak_bytes, table
from torch import nn
from variants import NETWORKS, build

from snn_rl.cli.memory import keep_freed_memory


def training_step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that between two steps no gradient is held

    return step


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def infer() -> None:
        with torch.inference_mode():
            model(x)

    return infer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="add the figures to this file, one JSON object per line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the training scripts do; a gain to all variants
    torch.manual_seed(0)
    x = torch.rand(args.batch, *NETWORKS[args.network][1]).to(args.device, memory_format=torch.channels_last)
    print(f"{args.network}, batch {args.batch}; {machine(args.device)}\n")
    for timesteps in args.timesteps:
        variants = build(args.network, timesteps, x)
        train = medians({n: training_step(m, x) for n, m in variants.items()}, args.rounds, args.device)
        infer = medians({n: inference(m, x) for n, m in variants.items()}, args.rounds, args.device)
        memory = {n: peak_bytes(training_step(m, x), args.device) for n, m in variants.items()}
        rows = []
        for name in variants:
            milliseconds = [f"{1e3 * t[name]:.1f} | {t[name] / t['dense only']:.2f}" for t in (train, infer)]
            rows.append([name, *milliseconds, f"{memory[name] / 2**20:.0f}"])
        head = ["T = " + str(timesteps), "training, ms | over dense", "inference, ms | over dense", "peak, MiB"]
        print(table(" | ".join(head).split(" | "), [" | ".join(row).split(" | ") for row in rows]) + "\n", flush=True)
        if args.json:
            result = {
                "network": args.network, "batch": args.batch, "timesteps": timesteps, "machine": machine(args.device),
                "train_seconds": train, "inference_seconds": infer, "peak_bytes": memory,
            }  # fmt: skip
            with args.json.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
