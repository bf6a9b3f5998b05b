"""What ``stackctl inspect`` shows a person: facts, trees, tables, curves and maps, from what it found."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackctl.cli.inspect_facts import facts_tree, stack_tree
from stackctl.cli.inspect_maps import interference_screen, weights_screen
from stackctl.lora.target_modules import compact_names
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.resolve import ResolvedStack
from stackctl.render.loss_curve import Curve, read_curve, render_curve
from stackctl.serving.commands import TITLES
from stackctl.storage.files import human_bytes

if TYPE_CHECKING:
    from stackctl.engine.overlaps import Interference

_CURVE_WIDTH = 80
"""Columns of a loss curve: what every terminal has."""


@dataclass(frozen=True)
class Extras:
    """What was found beside the facts: problems of the target program, and what ``--interference`` measured."""

    target_problems: tuple[dict[str, Any], ...] = ()
    interference: Interference | None = None


def facts_screen(info: dict[str, Any], title: str) -> Any:
    """A base, or a checkpoint by itself."""
    hidden = {"kind", "problems", "token_rows", "modules", "info", "lora", "name", "module_table", "weights", "for",
              "curves", "page"}  # fmt: skip
    facts = {key.replace("_", " "): value for key, value in info.items() if key not in hidden}
    if "bytes" in facts:
        facts["bytes"] = human_bytes(facts["bytes"])
    facts.update(info.get("lora", {}))
    if isinstance(info.get("modules"), dict):
        facts["modules"] = "\n".join(f"{name}  {m['type']} {m['shape']}" for name, m in info["modules"].items())
    return facts_tree(f"{info['kind']} {title}", facts, info.get("problems", []))


def checkpoint_screen(info: dict[str, Any], extras: Extras) -> Any:
    """A checkpoint by itself, with what was asked for besides."""
    from rich.console import Group

    return Group(facts_screen(info, info["path"]), *_asked_parts(info, extras))


def stack_screen(info: dict[str, Any], stack: ResolvedStack, plan: StackPlan, extras: Extras) -> Any:
    """An adapter, a stack or an expression."""
    from rich.console import Group

    parts: list[Any] = []
    if info["kind"] == "adapter":
        parts.append(facts_tree(f"adapter {info['adapter']}@{info['version']}", adapter_facts(info), info["problems"]))
        if "curves" not in info:
            parts += _curve_screen(read_curve(Path(info["path"])), height=6)
    else:
        parts.append(stack_tree(stack, plan))
        parts.append(
            f"{info['kind']} {info['stack']}: {info['method']}, rank {plan.rank} at most, {len(plan.modules)} modules"
        )
    parts += _asked_parts(info, extras)
    if "serve" in info:
        own = shlex.join(["stackctl", "serve", stack.name or stack.expression])
        parts.append(_recipe_screen("stackctl", {"lines": [own], "notes": [], "problems": []}))
    for name, recipe in info.get("serve", {}).items():
        parts.append(_recipe_screen(TITLES[name], recipe))
    if info.get("verified"):
        parts.append("the files are the ones that were registered")
    return Group(*parts)


def adapter_facts(info: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's facts by name, those that a person asks for."""
    shown = ("description", "digest", "base", "created", "dtype", "parameters", "rank", "path")
    facts = {key: info[key] for key in shown}
    facts["needs"] = "+".join(info["needs"])
    targets = info["lora"].get("target_modules")
    facts["targets"] = ", ".join(compact_names(targets)) if isinstance(targets, list) else targets
    if rows := info["token_rows"]:
        named = info.get("trained_tokens") or sorted({token for own in rows for token in own["tokens"]})
        where = " and ".join(dict.fromkeys(own["module"] for own in rows))
        facts["tokens"] = f"rows of {', '.join(map(str, named))} in {where}"
    facts |= _origin(info)
    if run := info.get("run"):
        facts["trained"] = (
            f"{run['steps']} steps, {run['supervised_tokens']:,} supervised tokens, loss {run['loss']:.3f}"
        )
        if run.get("kept_step") is not None:
            change = f"{run['eval_loss_before']:.3f} -> {run['eval_loss']:.3f}"
            what = "divergence" if info.get("distilled") else "loss"
            facts["held out"] = f"{what} {change}, the weights of step {run['kept_step']}"
        if taught := info.get("distilled"):
            facts["taught by"] = taught["teacher"] + (" behind a system prompt" if taught.get("system") else "")
        if run.get("margin") is not None:
            facts["preferences"] = _preferences(run, info)
    if data := info.get("data"):
        facts["data"] = f"{data['path']}, {data['records']} {data['format']} records"
    return facts


def _origin(info: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter was made of, where it did not begin at nothing."""
    origin: dict[str, Any] = {"from": info.get("from")}
    if moved := info.get("moved"):
        before, copy = f"{moved['loss_before']:.3f}", f"{moved['loss_copy']:.3f}"
        origin["moved"] = f"loss {before} before, {copy} of the plain copy" + (
            f", {moved['loss_corrected']:.3f} corrected" if moved["corrected"] else ""
        )
    if made := info.get("extracted"):
        errors = made.get("errors", {})
        worst = max(errors, key=errors.__getitem__, default=None)
        origin["extracted"] = f"from {made['source']}, {made['relative_error']:.2%} of the change is lost" + (
            f", at most {errors[worst]:.2%} of a module's ({worst})" if worst else ""
        )
        origin["kept whole"] = ", ".join(compact_names(made.get("saved", [])))
        origin["not kept"] = ", ".join(compact_names(made.get("left_out", [])))
    if made := info.get("converted"):
        origin["converted"] = f"from {made['from']}, {made['relative_error']:.2%} of the change is lost"
    return origin


def _preferences(run: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    told = f"{run['accuracy']:.1%} ranked rightly while learning, mean margin {run['margin']:.3f}"
    if run.get("eval_margin") is not None:
        told += f"; of held-out ones {run['eval_accuracy']:.1%}, mean margin {run['eval_margin']:.3f}"
    return f"{(info.get('settings') or {}).get('objective', '?')}: {told}"


def _asked_parts(info: dict[str, Any], extras: Extras) -> list[Any]:
    """The parts of a screen that were asked for by option."""
    parts: list[Any] = []
    if "module_table" in info:
        parts.append(_module_screen(info["module_table"]))
    if "weights" in info:
        parts += weights_screen(info["weights"])
    if extras.interference:
        parts += interference_screen(extras.interference)
    for label, points in info.get("curves", {}).items():
        lines = _curve_screen(Curve(tuple(points["loss"]), tuple(points["eval_loss"])), height=12)
        parts += [f"\n{label}" if lines else f"\n{label}: no losses were recorded", *lines]
    if "for" in info:
        found = list(extras.target_problems)
        parts.append(facts_tree(f"for {info['for']}: " + ("" if found else "no problems"), {}, found))
    if "page" in info:
        parts.append(f"wrote {info['page']}")
    return parts


def _recipe_screen(title: str, recipe: dict[str, Any]) -> Any:
    """The lines as they are to be typed, each on one of its own however long; then what there is to say."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(line, no_wrap=True, overflow="ignore") for line in recipe["lines"]]
    notes = [Text(f"# {note}", style="dim") for note in recipe["notes"]]
    problems = [facts_tree("", {}, recipe["problems"])] if recipe["problems"] else []
    return Group(Text(f"\nserve with {title}", style="bold"), *lines, *notes, *problems)


def _curve_screen(curve: Curve, height: int) -> list[Any]:
    from rich.text import Text

    return [Text(line, no_wrap=True) for line in render_curve(curve, _CURVE_WIDTH, height)]


def _module_screen(rows: list[dict[str, Any]]) -> Any:
    from stackctl.render.tables import table

    cells = [
        [
            row["module"],
            row["type"],
            "×".join(str(n) for n in row["shape"]),
            row["rank"],
            ", ".join(f"{f['member']} r={f['rank']} s={f['scaling']:g}" for f in row["members"]),
        ]
        for row in rows
    ]
    return table(["module", "type", "shape", "rank", "members"], cells)
