"""stackctl doctor"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackctl import __version__
from stackctl.cli.command import INSPECT, Context, command
from stackctl.core.errors import StackctlError
from stackctl.machine import resources as machine
from stackctl.machine.memory_estimate import Precision
from stackctl.machine.optional_packages import PACKAGES
from stackctl.machine.reference_models import RANK, SIZES, TOKENS, needs
from stackctl.render.output import Result
from stackctl.render.terminal import counted
from stackctl.storage.files import human_bytes
from stackctl.storage.paths import cache_root


@command("doctor", example="stackctl doctor", panel=INSPECT)
def doctor(context: Context) -> Result:
    """Show what this machine has, and what size of base it can train, generate with and export.

    Exit code 1 when something that stackctl needs is missing.
    """
    packages, wrong = machine.packages()
    problems = [{"what": "packages", "message": text, "hint": "pip install stackctl-lora"} for text in wrong]
    devices: list[dict[str, Any]] = []
    if packages.get("torch"):
        from stackctl.engine.devices import describe_devices

        devices = describe_devices()
    disks = _disks(context)
    data: dict[str, Any] = {
        "stackctl": __version__,
        "system": machine.system(),
        "cores": machine.cores(),
        "devices": devices,
        "packages": packages,
        "optional": {name: machine.installed(name) for name in PACKAGES},
        "disk": disks,
        "registry": _registry(context, problems),
        "hub": _hub(),
        "sizes": _sizes(devices[0], min(disk["free"] for disk in disks.values())) if devices else [],
        "problems": problems,
    }
    code = 1 if problems else 0
    return Result(data, "\n".join(p["message"] for p in problems), lambda: _screen(data), code)


def _disks(context: Context) -> dict[str, dict[str, Any]]:
    """Where weights and caches go, and how many bytes are free there."""
    places = {"cache": cache_root()}
    try:
        places = {"registry": context.registry.root, **places}
    except StackctlError:
        places = {"here": Path.cwd(), **places}
    return {name: {"path": str(path), "free": machine.disk_free(path)} for name, path in places.items()}


def _registry(context: Context, problems: list[dict[str, str]]) -> dict[str, Any] | None:
    """The registry in use, if there is one; an entry in it that cannot be read is a problem."""
    from stackctl.core.schema import Adapter, Base, Stack

    try:
        registry = context.registry
    except StackctlError:
        return None
    try:
        registry.settings()
    except StackctlError as error:
        problems.append({"what": "registry", "message": error.message, "hint": error.hint or "stackctl verify"})
    kinds = {"adapters": Adapter, "stacks": Stack, "bases": Base}
    return {"path": str(registry.root), **{name: len(registry.names(kind)) for name, kind in kinds.items()}}


def _sizes(device: dict[str, Any], disk: int) -> list[dict[str, Any]]:
    """For each well-known size of base: the bytes that it needs for each work, and whether they are there."""
    cpu = device["type"] == "cpu"
    running: Precision = "float32" if cpu else "half"
    training: Precision = running if not cpu else "autocast" if device["bfloat16"] else "float32"
    there = {"generate": device["free"], "train": device["free"], "export": disk}
    rows = []
    for base in (size.base() for size in SIZES):
        wanted = needs(base, running, training)
        works = {work: {"bytes": wanted[work], "fits": wanted[work] <= free} for work, free in there.items()}
        rows.append({"base": base.name, "parameters": base.parameters, **works})
    return rows


def _hub() -> dict[str, Any]:
    """The Hub as huggingface_hub is set up here. The token itself is never shown."""
    from huggingface_hub import constants, get_token

    return {"endpoint": constants.ENDPOINT, "token": get_token() is not None, "offline": constants.HF_HUB_OFFLINE}


def _screen(data: dict[str, Any]) -> Any:
    from stackctl.render.tables import spaced, table

    rows = [["stackctl", data["stackctl"]], ["system", data["system"]]]
    rows += [["device", _device(device)] for device in data["devices"]]
    shown = ("torch", "transformers", "peft", "accelerate", "huggingface-hub")
    rows += [[name, data["packages"].get(name) or "missing"] for name in shown]
    wanted = {name: f"{package.use} needs it: {package.install}" for name, package in PACKAGES.items()}
    rows += [[name, version or wanted[name]] for name, version in data["optional"].items()]
    rows += [[f"disk, {name}", f"{human_bytes(d['free'])} free in {d['path']}"] for name, d in data["disk"].items()]
    rows.append(["registry", _what_is_there(data["registry"])])
    hub = data["hub"]
    token = "a token is there" if hub["token"] else "no token: reading what is public works; hf auth login"
    rows.append(["Hub", hub["endpoint"] + ", " + ("offline (HF_HUB_OFFLINE)" if hub["offline"] else token)])
    parts: list[Any] = [table(["what", "found"], rows)]
    if data["sizes"]:
        parts.append(_sizes_table(data["sizes"]))
    parts += [f"{p['what']}: {p['message']}; {p['hint']}" for p in data["problems"]]
    return spaced(parts)


def _device(device: dict[str, Any]) -> str:
    bfloat16 = "multiplies bfloat16 in hardware" if device["bfloat16"] else "float32 is fastest"
    memory = f"{human_bytes(device['memory'])} of memory, {human_bytes(device['free'])} free"
    return f"{device['type']}: {device['name']}, {memory}, {bfloat16}"


def _what_is_there(registry: dict[str, Any] | None) -> str:
    if registry is None:
        return "none here or above: stackctl init"
    counts = ", ".join(counted(registry[f"{kind}s"], kind) for kind in ("adapter", "stack", "base"))
    return f"{registry['path']}: {counts}"


def _sizes_table(rows: list[dict[str, Any]]) -> Any:
    from rich.text import Text

    from stackctl.render.tables import table

    def cell(found: dict[str, Any]) -> Text:
        style, sign = ("green", "yes") if found["fits"] else ("red", "no ")
        return Text(f"{sign}  {human_bytes(found['bytes'])}", style=style)

    works = ("generate", "train", "export")
    cells = [[row["base"], *(cell(row[work]) for work in works)] for row in rows]
    title = (
        f"what fits here, with --dtype auto (train: rank {RANK}, {TOKENS:,} tokens at once, --gradient-checkpointing)"
    )
    return table(["size of base", "generate", "train", "export --format model"], cells, title=title)
