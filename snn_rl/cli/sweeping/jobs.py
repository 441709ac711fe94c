"""What a sweep runs: every recipe with every override and every seed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from snn_rl.cli.overrides import OptionError, overridden
from snn_rl.runs.recipe import Recipe


@dataclass(frozen=True, eq=False)  # a recipe holds dictionaries: a job is known by itself
class Job:
    """One run of a sweep: a recipe, changed by the ``override``, with a seed, in its folder."""

    recipe: Recipe
    override: str
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.directory.parent.name}/{self.directory.name}"


def jobs(
    recipes: Sequence[Recipe], overrides: Sequence[Sequence[str]], seeds: Sequence[int], root: Path, suffix: str = ""
) -> list[Job]:
    """Every recipe with every override and every seed, in ``root/RECIPE[suffix][-override]/seed-N``.

    An override is a sequence of ``FIELD=VALUE``, the flags ``--FIELD VALUE`` of the training scripts; an empty one
    leaves the recipe as it is.

    Raises:
        ValueError: a field, value or seed that cannot be, or two runs in one folder.
    """
    for seed in seeds:
        if not 0 <= seed < 100_000:
            raise ValueError(f"seed must lie in [0, 100000), got {seed}")
    out = []
    for recipe, words in itertools.product(recipes, overrides):
        changed = _changed(recipe, words)
        override = " ".join(f"{field.replace('-', '_')}{rest}" for field, rest in map(_split, words))
        folder = recipe.name + suffix + (f"-{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', override)}" if override else "")
        out += [Job(changed, override, seed, root / folder / f"seed-{seed}") for seed in seeds]
    for job in out:
        if sum(job.directory == other.directory for other in out) > 1:
            raise ValueError(f"two runs in {job.directory}: name each recipe, seed and --set once")
    return out


def _split(word: str) -> tuple[str, str]:
    """The field, and the rest from its ``=`` on."""
    field, equals, value = word.partition("=")
    return field, equals + value


def _changed(recipe: Recipe, words: Sequence[str]) -> Recipe:
    flags: list[str] = []
    for word in words:
        field, rest = _split(word)
        flags += [f"--{field}", *rest[1:].split()]
    said = f"--set {' '.join(words)}"
    try:
        with redirect_stdout(StringIO()):  # of --set help, a page of help
            changed = overridden(recipe, flags, "sweep", fixed=())
        if words:  # whether an environment takes its arguments, only it can tell
            for kwargs in ({}, changed.ann_env_kwargs):
                changed.build_env(1, 0, **kwargs).close()
    except (OptionError, SystemExit):
        raise ValueError(
            f"{said}: {recipe.name} has no such field, or it does not take this value; the training script's --help "
            "lists them"
        ) from None
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from error
    if (changed.name, changed.env_id) != (recipe.name, recipe.env_id):
        raise ValueError(f"{said}: name and env_id say which recipe this is; name another recipe instead")
    return changed
