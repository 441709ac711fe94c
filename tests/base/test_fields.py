"""Fields of recipes say which values they take: each of them, and in one line where they do not take one."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from snn_rl.base.fields import CHECK, amount, check_fields, choice, count, fraction, percent, positive, real, switch
from snn_rl.runs.recipe import AnnConfig, NetworkConfig, Recipe, SnnConfig, SpikeRecipe
from snn_rl.vision.recipe import AnnTraining, SnnTraining, VisionRecipe


@dataclasses.dataclass(frozen=True)
class Inner:
    weight: float = amount(1.0)


@dataclasses.dataclass(frozen=True)
class Config:
    free: str = "anything"
    steps: int = count(8)
    start: int = count(0, at_least=0)
    budget: int | None = count(None)
    threads: int | None = count(1, optional=True)
    norm: float = positive(1.0)
    target: float | None = real(None)
    share: float = fraction(0.5)
    part: float = percent(99.0)
    on: bool = switch(False)
    kind: str = choice("a", "a", "b")
    inner: Inner = dataclasses.field(default_factory=Inner)

    def __post_init__(self) -> None:
        check_fields(self)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"steps": 2.0}, r"steps must be >= 1, got 2\.0"),
        ({"steps": True}, "steps must be >= 1, got True"),
        ({"steps": None}, "steps must be >= 1, got None"),
        ({"steps": "8"}, "steps must be >= 1, got '8'"),
        ({"start": -1}, "start must be >= 0, got -1"),
        ({"budget": 0}, "budget must be >= 1, got 0"),
        ({"norm": 0}, "norm must be > 0, got 0"),
        ({"norm": INF}, "norm must be finite, got inf"),
        ({"norm": "1"}, "norm must be > 0, got '1'"),
        ({"target": NAN}, "target must be finite, got nan"),
        ({"target": "20"}, "target must be a number, got '20'"),
        ({"share": -0.1}, r"share must be >= 0, got -0\.1"),
        ({"share": NAN}, "share must be >= 0, got nan"),
        ({"share": 1.1}, r"share must lie in \[0, 1\], got 1\.1"),
        ({"part": 0.0}, r"part must lie in \(0, 100\], got 0\.0"),
        ({"part": 101}, r"part must lie in \(0, 100\], got 101"),
        ({"part": NAN}, r"part must lie in \(0, 100\], got nan"),
        ({"on": "False"}, "on must be True or False, got 'False'"),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'"),
        ({"inner": Inner(-1.0)}, r"inner\.weight must be >= 0, got -1\.0"),
        ({"inner": Inner(INF)}, r"inner\.weight must be finite, got inf"),
    ],
)
def test_a_value_that_a_field_does_not_take_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"budget": 1, "target": -21.0, "start": 5},
        {"threads": None, "budget": None, "target": None},
        {"share": 0, "part": 100, "norm": 1e-9},
        {"share": 1.0, "on": True, "kind": "b", "inner": Inner(0.0)},
    ],
)
def test_values_at_the_ends_of_their_ranges_are_taken(changes: dict[str, Any]) -> None:
    made = Config(**changes)
    assert {name: getattr(made, name) for name in changes} == changes


@pytest.mark.parametrize(
    "kind", [NetworkConfig, AnnConfig, SnnConfig, Recipe, SpikeRecipe, AnnTraining, SnnTraining, VisionRecipe]
)
def test_every_number_and_switch_of_a_recipe_is_checked(kind: type) -> None:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        of = set(get_args(hint)) - {type(None)} if get_origin(hint) in (Union, types.UnionType) else {hint}
        if of & {int, float, bool}:
            check = field.metadata[CHECK]
            assert check("1") is not None, field.name
            assert check(NAN) is not None, field.name
            assert check(field.default) is None, field.name
            assert (check(None) is None) == (type(None) in get_args(hint)), field.name
