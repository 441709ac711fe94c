"""``snn-rl spike``: a trained agent of any algorithm becomes a spiking one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from snn_rl.cli.environments import add_env_kwargs, parsed_kwargs
from snn_rl.cli.memory import keep_freed_memory
from snn_rl.cli.parser import Parser
from snn_rl.cli.status import RESUMES, exit_status
from snn_rl.cli.training import print_results
from snn_rl.runs.given import Given
from snn_rl.runs.recipe import SpikeRecipe
from snn_rl.runs.registered import registered
from snn_rl.runs.spike import spike

DESCRIPTION = """Make an agent of stable-baselines3 or sb3-contrib spike, in fewer and fewer timesteps per frame.

Run the same command again to resume a run that was stopped.
"""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    parser = Parser(DESCRIPTION, prog=prog)
    parser.add_argument("file", metavar="FILE", type=Path, help="the agent's zip; nothing in it is run")
    parser.add_argument("--env-id", metavar="ID", required=True, help="its environment, an id of gymnasium")
    add_env_kwargs(parser, "its arguments, such as continuous=True (default: none)")
    parser.add_argument("--algo", help="its algorithm, such as ppo (default: as the file says)")
    parser.add_argument(
        "--vecnormalize", type=Path, metavar="FILE", help="the file of VecNormalize.save (default: none)"
    )
    parser.add_argument(
        "--schedule", type=int, nargs="+", default=[5, 3, 1], metavar="T", help="timesteps of each stage"
    )
    parser.add_argument("--episodes", type=int, default=100, help="episodes to evaluate a stage")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of the run (default: in runs)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--smoke", action="store_true", help="every stage in seconds; nothing is learnt")
    options = parser.parse_args(argv)

    def command() -> None:
        keep_freed_memory()
        recipe = SpikeRecipe(
            name=f"spike-{options.env_id.replace('/', '-').replace(':', '-')}",
            env_id=options.env_id,
            make_env=registered(options.env_id),
            env_kwargs=parsed_kwargs(options.env_kwargs),
            schedule=tuple(options.schedule),
            eval_episodes=options.episodes,
        )
        folder = recipe.name
        if options.smoke:
            recipe, folder = recipe.smoke(), f"{folder}-smoke"
        given = Given(options.file, options.algo, options.vecnormalize)
        directory = options.run_dir or Path("runs", folder, f"seed-{options.seed}")
        bars = sys.stderr.isatty()
        results = spike(recipe, given, directory, options.seed, device=options.device, progress_bar=bars)
        print_results(results)

    return exit_status(command, RESUMES)
