"""A run owns its folder: ``run.json`` holds its recipe, its seed and its files, and no other run goes on there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from snn_rl.base.files import read_json, write_json

# What a training has worked for: files of its stages that the next training in the folder would replace.
WORK = ("checkpoint.*", "model.*", "policy.*", "metrics.json")
# Fields of a recipe on which nothing depends that a run learns or reports: they may change from call to call.
FREE = {"cpu_threads", "checkpoint_every", "max_episode_steps"}
UNSET = object()


class AnyRecipe(Protocol):
    """What a run needs of a recipe: the frozen dataclass of an agent or of a classifier."""

    @property
    def name(self) -> str: ...
    @property
    def schedule(self) -> Sequence[int]: ...
    @property
    def cpu_threads(self) -> int | None: ...
    def as_dict(self) -> dict[str, Any]: ...
    @staticmethod
    def is_smoke(config: Mapping[str, Any], /) -> bool: ...


def claim(
    directory: Path,
    recipe: AnyRecipe,
    seed: int,
    ann: Path | None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Bind the directory to this run, or find that it is.

    ``more`` tells runs apart where the recipe's fields do not, such as by the spaces of the environment. A field that
    ``run.json`` lacks counts as its default: the recipe has gained it since.

    Raises:
        ValueError: a directory that holds the work of another run.
    """
    config = {"recipe": recipe.as_dict(), "seed": seed, "ann": None if ann is None else str(ann.resolve()), **more}
    path, results = directory / "run.json", directory / "results.json"
    stages = (
        found
        for pattern in WORK
        for name in ("teacher", "ann", "T[0-9]*")
        for found in directory.glob(f"{name}/{pattern}")
    )
    work = results if results.is_file() else next(stages, None)
    if work is None:  # where nothing has been trained yet, nothing is lost
        write_json(path, config)
        return
    another = "give the options that began it, or use another --run-dir"
    if not path.is_file():
        raise ValueError(
            f"{directory} holds {work.relative_to(directory)} but no run.json, so that this run cannot tell whose it "
            "is; use another --run-dir"
        )
    for difference in _differences(read_json(path), config, recipe):
        raise ValueError(f"{directory} belongs to another run: {difference}; {another}")
    if results.is_file():
        head = read_json(results)
        theirs = (head.get("recipe"), head.get("seed")) if isinstance(head, dict) else None
        if theirs != (recipe.name, seed):
            raise ValueError(f"{results} is not of this run, which would replace it; move it, or use another --run-dir")


def _differences(before: Any, now: Mapping[str, Any], recipe: AnyRecipe) -> Iterator[str]:
    """What sets two runs apart, first what a person would name first."""
    before = before if isinstance(before, dict) else {}
    theirs, ours = before.get("recipe"), now["recipe"]
    theirs = theirs if isinstance(theirs, dict) else {}
    if theirs.get("name") != recipe.name:
        yield f"its recipe is {theirs.get('name')!r}, not {recipe.name!r}"
    if recipe.is_smoke(theirs) != recipe.is_smoke(ours):
        yield "it is a smoke run, and this is none" if recipe.is_smoke(theirs) else "it is no smoke run, as this is"
    for key in ("seed", "ann"):
        if before.get(key) != now[key]:
            yield f"its {key} is {before.get(key)!r}, not {now[key]!r}"
    yield from _other_fields(theirs, recipe)
    for key in now.keys() - {"recipe", "seed", "ann"}:
        if before.get(key, now[key]) != now[key]:  # older runs do not tell
            words = key.replace("_", " ")
            whose = "its environment has the" if key.endswith("_space") else "it has the"
            yield f"{whose} {words} {before[key]}, not {now[key]}"


def _other_fields(before: Any, now: Any, prefix: str = "") -> Iterator[str]:
    """Fields of the dataclass ``now``, and of those in it, that ``before`` holds otherwise."""
    before = before if isinstance(before, dict) else {}
    names = set()
    for field in dataclasses.fields(now):
        names.add(field.name)
        if not prefix and field.name in FREE | {"make_env"}:
            continue
        name, ours = prefix + field.name, _jsonable(getattr(now, field.name))
        if dataclasses.is_dataclass(ours):
            yield from _other_fields(before.get(field.name), ours, f"{name}.")
            continue
        theirs = before.get(field.name, _default(field))
        if isinstance(ours, dict) and isinstance(theirs, dict):  # arguments of the environment
            pairs = [(f"{name}.{key}", theirs.get(key, UNSET), ours.get(key, UNSET)) for key in {**ours, **theirs}]
        else:
            pairs = [(name, theirs, ours)]
        for which, a, b in pairs:
            if a != b:
                yield f"its {which} is {_said(a)}, not {_said(b)}"
    for name in before.keys() - names:
        yield f"its {prefix}{name} is {before[name]!r}, and recipes no longer have this field"


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default as JSON holds it."""
    if field.default_factory is not dataclasses.MISSING:
        return _jsonable(field.default_factory())
    return UNSET if field.default is dataclasses.MISSING else _jsonable(field.default)


def _said(value: Any) -> str:
    return "unset" if value is UNSET else repr(value)


def _jsonable(value: Any) -> Any:
    """``value`` as it comes back from JSON, in which tuples are lists."""
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value
