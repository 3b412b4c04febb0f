"""Options: one converter for whatever a user writes, and bounds that hold however a value comes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from sparsedeploy.conversion import build_options, convert, parse_pairs, plain_options, typed_words
from sparsedeploy.errors import UserError
from sparsedeploy.options import Options, described, option, seed_option
from sparsedeploy.registry import REGISTRIES
from sparsedeploy.speed.options import BenchmarkOptions
from sparsedeploy.workflows.options import DemoOptions


@dataclass(frozen=True)
class Example(Options):
    """One option of every type."""

    flag: bool = option(False, "A switch.")
    count: int = option(3, "A number.", at_least=1, at_most=10)
    share: float = option(0.5, "A share.", above=0, below=1)
    maybe: float | None = option(None, "Perhaps.")
    kind: Literal["a", "b"] = option("a", "One of two.")
    name: str = option("x", "A text.")
    place: Path = option(Path(), "A path.")
    more: Mapping[str, Any] | None = option(None, "Others.")
    rates: tuple[float, ...] = option((0.5,), "Several.")
    seed: int = seed_option("Of chance.")
    times: int = option(1, "Of the flag.", only_with="flag")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("flag", "false", False),
        ("flag", "Yes", True),
        ("flag", True, True),
        ("count", "4", 4),
        ("count", 4.0, 4),
        ("share", "1e-3", 1e-3),
        ("maybe", None, None),
        ("maybe", "none", None),
        ("maybe", 2, 2.0),
        ("kind", "b", "b"),
        ("place", "a/b", Path("a/b")),
        ("more", {"a": 1}, {"a": 1}),
        ("rates", "0.5, 0.7", (0.5, 0.7)),
        ("rates", [0.5, "0.7"], (0.5, 0.7)),
    ],
)
def test_what_fits_is_converted(name: str, value: Any, expected: Any) -> None:
    built = getattr(build_options("example", Example, {name: value}), name)
    assert built == expected
    assert type(built) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("flag", "maybe", "true or false"),
        ("flag", 1, "true or false"),
        ("count", True, "a whole number"),
        ("count", 2.5, "a whole number"),
        ("count", 0, "a whole number of at least 1 and at most 10"),
        ("count", 10**30, "a whole number"),
        pytest.param("count", 10**5000, "a whole number", id="5000 digits"),
        pytest.param("count", "9" * 5000, "a whole number", id="5000 nines"),
        ("count", math.inf, "a whole number"),
        ("share", "nan", "a finite number"),
        ("share", math.inf, "a finite number"),
        ("share", 1, "a finite number above 0 and below 1"),
        ("share", 10**400, "a finite number"),
        ("maybe", "inf", "a finite number"),
        ("maybe", [1], "a finite number"),
        ("kind", "c", "a or b"),
        ("name", 5, "text"),
        ("name", {"a": "b" * 1000}, "text"),
        ("more", [1], "a mapping"),
        ("rates", 0.5, "a finite number, or several with commas between them"),
        ("rates", [0.5, "much"], "a finite number"),
        ("seed", -1, "a whole number of at least 0"),
        ("seed", 2**32, "a whole number of at least 0 and at most 4294967295"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_short_line(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(UserError) as error:
        build_options("example", Example, {name: value})
    assert str(error.value).startswith(f"example: option {name} is ")
    assert f"It takes {wanted}" in str(error.value)
    assert len(str(error.value)) < 250


def test_an_unknown_option_is_named_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"example has no option 'cuont'\. Did you mean count\? Its options: count, flag"
    ):
        build_options("example", Example, {"cuont": 3})


@pytest.mark.parametrize("values", [{"count": 0}, {"share": math.nan}, {"maybe": math.inf}])
def test_bounds_hold_in_python_too(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="It takes"):
        Example(**values)


def test_an_option_without_effect_is_refused() -> None:
    assert build_options("example", Example, {"flag": True, "times": 2}).times == 2
    assert build_options("example", Example, {"times": 1}) == Example()
    with pytest.raises(UserError, match="example: option times has no effect without flag"):
        build_options("example", Example, {"times": 2})


def test_a_label_stands_for_the_name() -> None:
    item = next(item for item in described(Example) if item.name == "count")
    with pytest.raises(UserError, match=r"--count is 0\. It takes a whole number of at least 1"):
        convert("--count", 0, item.hint, item.facts)


def test_pairs() -> None:
    assert parse_pairs(["a-b=1", "c = x=y"]) == {"a_b": "1", "c": "x=y"}
    for pairs, message in ((["a"], "is not NAME=VALUE"), (["a=1", "a=2"], "option a is given twice")):
        with pytest.raises(UserError, match=message):
            parse_pairs(pairs)


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=lambda registry: registry.variable)
def test_the_options_of_every_method_have_help_and_survive_json(registry: Any) -> None:
    for method in registry:
        assert issubclass(method.options, Options), method.name
        assert all(item.facts.help for item in described(method.options)), method.name
        options = method.make_options()
        assert build_options(method.name, method.options, json.loads(json.dumps(plain_options(options)))) == options


def test_an_option_like_another_has_its_definition() -> None:
    shared = {item.name: item for item in described(DemoOptions)}
    origin = {item.name: item for item in described(BenchmarkOptions)}
    rounds, length = shared["rounds"], shared["prompt_length"]
    assert rounds.facts.text == origin["rounds"].facts.text
    assert (rounds.flag, rounds.facts.short, rounds.default) == ("--rounds", "-r", origin["rounds"].default)
    assert length.flag == origin["prompt_lengths"].flag
    with pytest.raises(UserError, match="rounds is 0"):
        DemoOptions(rounds=0)
    # What None stands for belongs to None alone.
    assert "[default: uniform" not in shared["allocation"].facts.text
    assert shared["samples"].facts.text == "Calibration sequences [default: 64; above 50 M weights 16]."
    assert typed_words(DemoOptions, {"probe": False, "rounds": 3}) == ["--rounds", "3", "--no-probe"]
