"""Show which pins of constraints.txt are behind what the package index has: ``make outdated``.

pip is asked, so that the index is the one that pip is configured for. Nothing is changed, and being behind is no error.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
HELD = {
    "torch": "held: of a newer one the index may have no small CPU build",
    "typer": "held: newer ones need pydantic, see docs/decisions/0009-typer-before-pydantic.md",
}
"""Pins that stay behind on purpose, and why."""

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;#]+)")


def read_pins(text: str) -> dict[str, str]:
    """Package to version, in the order of the file; comments and empty lines are passed over.

    Raises:
        ValueError: a line is no ``name==version``, or pins a package again.
    """
    pins: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not (line := line.partition("#")[0].strip()):
            continue
        match = _PIN.fullmatch(line)
        if not match or normal(match["name"]) in map(normal, pins):
            raise ValueError(f"line {number}: {line!r} is no pin, or the second of its package")
        pins[match["name"]] = match["version"]
    return pins


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


Limits = dict[str, list[tuple[str, SpecifierSet]]]
"""Package to what other packages ask of its version, and who asks."""


def installed_limits() -> Limits:
    """What the packages that are installed ask of one another."""
    limits: Limits = {}
    for distribution in importlib.metadata.distributions():
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                by = distribution.metadata["Name"]
                limits.setdefault(normal(requirement.name), []).append((by, requirement.specifier))
    return limits


def behind(pins: dict[str, str], outdated: list[dict[str, Any]], limits: Limits) -> list[tuple[str, str, str, str]]:
    """The pins that are behind: name, pin, newest version, and what there is to say.

    Args:
        outdated: what ``pip list --outdated --format json`` says.
    """
    newest = {normal(row["name"]): row for row in outdated}
    found = []
    for name, pin in pins.items():
        row = newest.get(normal(name))
        if row and row["latest_version"] != pin:
            installed = row["version"].partition("+")[0]
            asked = [
                f"{by} wants {what}" for by, what in limits.get(normal(name), []) if row["latest_version"] not in what
            ]
            notes = [HELD[name]] if name in HELD else asked
            note = "; ".join(notes if installed == pin else [*notes, f"{installed} is installed"])
            found.append((name, pin, row["latest_version"], note))
    return found


def render(rows: list[tuple[str, str, str, str]], total: int) -> str:
    """The table, and a line that counts."""
    head = [("package", "pinned", "newest", "")]
    widths = [max(len(row[column]) for row in head + rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head + rows if rows else [])
    ]
    return "\n".join([*lines, f"{len(rows)} of {total} pins are behind"])


def main() -> int:
    pins = read_pins(CONSTRAINTS.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pip", "list", "--outdated", "--format", "json", "--disable-pip-version-check"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        print(f"pip could not ask its index:\n{asked.stderr.strip()}", file=sys.stderr)
        return 1
    print(render(behind(pins, json.loads(asked.stdout), installed_limits()), len(pins)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
