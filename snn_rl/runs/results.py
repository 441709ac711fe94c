"""``results.json`` of a run, read and checked: it may have been edited, cut or merged since the run wrote it."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snn_rl.base.files import read_json

# Specifications of JSON values. An object names its keys, of which one that ends in "?" may be missing; others may
# stand beside them. A list names the kind of all its items.
Spec = Any  # _Kind | _Map | _Maybe | dict[str, Spec] | list[Spec]


@dataclass(frozen=True)
class _Kind:
    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class _Map:
    """An object with whatever keys."""

    of: Spec


@dataclass(frozen=True)
class _Maybe:
    """Or null."""

    of: Spec


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


NUMBER = _Kind("a finite number", _is_number)
POSITIVE = _Kind("a finite number >= 0", lambda value: _is_number(value) and value >= 0)
INTEGER = _Kind("an integer", _is_integer)
COUNT = _Kind("an integer >= 0", lambda value: _is_integer(value) and value >= 0)
TIMESTEPS = _Kind("an integer >= 1", lambda value: _is_integer(value) and value >= 1)
NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # controls, line breaks, halves of a character
TEXT = _Kind("text of one line", lambda value: isinstance(value, str) and not NO_TEXT.search(value))
NAME = _Kind(  # of a stage and its folder: never a path
    "a name of letters, digits, '.', '-', '_' and '+'",
    lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", value) is not None,
)
POINT = _Kind("a pair of numbers", lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_number, v)))

HEAD = {"recipe": TEXT, "env_id": TEXT, "seed": INTEGER, "versions": _Map(TEXT), "hardware": TEXT}
MEASURED = {
    "spike_rate": _Maybe({"mean": NUMBER, "layers": _Map(NUMBER)}),
    "energy": _Maybe(
        {
            "ann_over_snn": NUMBER,
            "ann_ops": NUMBER,
            "snn_ops": NUMBER,
            "memory_accesses?": {"weights": NUMBER, "membranes": NUMBER, "total": NUMBER, "ann": NUMBER},
        }
    ),
}
EVAL = {"returns": [NUMBER], "mean": NUMBER, "std": POSITIVE, "episodes": COUNT, "protocol?": TEXT}
STAGE = {
    "stage": NAME,
    "timesteps": _Maybe(TIMESTEPS),
    **MEASURED,
    "threshold": _Map(NUMBER),
    "leak": _Map(NUMBER),
    "validation?": [POINT],
    "updates?": _Maybe(COUNT),
    "wall_seconds?": _Maybe(NUMBER),
    "cpu_seconds?": _Maybe(NUMBER),
}
AGENT = {**STAGE, "eval": EVAL, "env_steps": COUNT, "curve": {"env_steps": [NUMBER], "returns": [NUMBER]}}
CLASSIFIER = {
    **STAGE,
    "accuracy": {"top1": NUMBER, "top5": NUMBER, "images": COUNT},
    "epochs": NUMBER,
    "curve": {"epochs": [NUMBER], "accuracy": [NUMBER]},
}


def load_results(run_dir: str | Path) -> dict[str, Any]:
    """Read and check ``run_dir/results.json``.

    Raises:
        ValueError: no such file, not JSON, no stage in it, a field that is missing or of another kind, by name.
    """
    path = Path(run_dir) / "results.json"
    if not path.is_file():
        raise ValueError(f"no results at {path}; give the folder of a run, such as runs/cartpole/seed-0")
    return check_results(read_json(path), path)


def check_results(results: Any, path: Path) -> dict[str, Any]:
    """``results`` themselves, as a run writes them to ``path``.

    Raises:
        ValueError: no stage in them, a field that is missing or of another kind, by name.
    """
    if not isinstance(results, dict) or not isinstance(results.get("stages"), list):
        raise ValueError(f"{path} is no results file: it has no list of stages")
    checked(results, HEAD, path)
    stages = results["stages"]
    if not stages:
        raise ValueError(f"{path} holds no finished stage yet")
    first = is_classifier(stages[0])
    for index, stage in enumerate(stages):
        at = f"stages[{index}]"
        checked(stage, CLASSIFIER if first else AGENT, path, at)
        if is_classifier(stage) != first:
            raise _damaged(path, f"{at} is of a classifier, and stages[0] of an agent")
        x, y = ("epochs", "accuracy") if first else ("env_steps", "returns")
        if len(stage["curve"][x]) != len(stage["curve"][y]):
            raise _damaged(path, f"{at}.curve must hold as many {x} as {y}")
        if stage["timesteps"] is not None and stage["spike_rate"] is None:
            raise _damaged(path, f"{at}.spike_rate must be an object in a spiking stage, got None")
        if stage["stage"] in (other["stage"] for other in stages[:index]):
            raise _damaged(path, f"{at}.stage must be another name than those before it, got {stage['stage']!r}")
    return results


def is_classifier(stage: Any) -> bool:
    """Whether a stage of ``results.json`` trained a classifier, and no agent."""
    return isinstance(stage, Mapping) and "accuracy" in stage


def checked(value: Any, spec: Spec, path: Path, at: str = "") -> Any:
    """``value`` itself, of which ``at`` says where it stands in the file at ``path``.

    Raises:
        ValueError: what is missing or of another kind than ``spec`` says.
    """
    if (fault := _fault(value, spec, at)) is not None:
        raise _damaged(path, fault)
    return value


def _damaged(path: Path, fault: str) -> ValueError:
    return ValueError(f"{path}: {fault}; restore it or make it anew")


def _fault(value: Any, spec: Spec, at: str) -> str | None:
    """The first thing in ``value`` that is not as ``spec`` says, or None."""
    if isinstance(spec, _Kind):
        return None if spec.holds(value) else f"{at} must be {spec.words}, got {reprlib.repr(value)}"
    if isinstance(spec, _Maybe):
        return None if value is None else _fault(value, spec.of, at)
    if isinstance(spec, list):
        if not isinstance(value, list):
            return f"{at} must be a list, got {reprlib.repr(value)}"
        return _first(_fault(item, spec[0], f"{at}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, Mapping):
        return f"{at or 'it'} must be an object, got {reprlib.repr(value)}"
    if isinstance(spec, _Map):
        names = (_fault(key, TEXT, f"a name in {at}") for key in value)
        return _first(names) or _first(_fault(item, spec.of, f"{at}[{key!r}]") for key, item in value.items())
    for key, inner in spec.items():
        name = key.removesuffix("?")
        where = f"{at}.{name}" if at else name
        if name not in value:
            if name == key:
                return f"{where} is missing"
        elif (fault := _fault(value[name], inner, where)) is not None:
            return fault
    return None


def _first(faults: Any) -> str | None:
    return next((fault for fault in faults if fault is not None), None)
