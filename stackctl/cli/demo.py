"""stackctl demo"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from stackctl.cli.command import TRAIN, Context, command
from stackctl.core.errors import NotFound, Usage
from stackctl.core.schema import Base
from stackctl.jobs.recipe import RECIPE_FILE, RecipeFile, read_recipe
from stackctl.registry.base_entries import save_base
from stackctl.registry.base_models import EMBEDDED_NAME
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.store import Registry, find_registry, init_registry
from stackctl.render.output import Result
from stackctl.storage.hashes import sha256_file

PROMPTS = ("Tell me about the sea.", "How do I keep bread fresh?", "Describe a morning in a town by the water.")
STACKS = ("base", "style", "style+instruct")
MEASURED = 8
"""Held-out records of each kind that the losses are of: the stacks differ by far more than a mean of these does."""


def examples_folder() -> Path:
    """The data that the demo trains on: inside an installed package, or beside it in a checkout."""
    package = Path(str(package_files("stackctl")))
    for folder in (package / "examples", package.parent / "examples"):
        if (folder / RECIPE_FILE).is_file():
            return folder
    raise NotFound("the examples are not installed", hint="install stackctl again, or run the demo in a checkout")


@command("demo", example="stackctl demo", panel=TRAIN)
def demo(context: Context) -> Result:
    """The whole path on a real 135M model: train two adapters, stack, compare, evaluate, prepare a push."""
    folder = examples_folder()
    recipe = read_recipe(folder / RECIPE_FILE)
    context = _context(context)
    registry, say = context.registry, context.output.status
    _check_free(registry, recipe)
    if not registry.find_base(EMBEDDED_NAME):
        _add_base(registry, say)
    from stackctl.cli.compare import compare_stacks
    from stackctl.cli.load_stacks import MeasuredData, read_data
    from stackctl.cli.push import prepare_push
    from stackctl.cli.train import Switches, build_recipe
    from stackctl.engine.generation import Sampling
    from stackctl.engine.records.prompt_files import Prompt
    from stackctl.registry.planning import plan_expressions

    built = build_recipe(context, recipe, Switches(resume=True))
    say(built.screen if isinstance(built.screen, str) else "")
    stacks = plan_expressions(registry, STACKS)
    say("the same prompts with the base, the style and the stack, and their loss on held-out records")
    held_out = [str(folder / f"{name}-heldout.jsonl") for name in ("style", "instruct")]
    records = [replace(found, kept=[*found.records][:MEASURED], count=MEASURED) for found in read_data(held_out)]
    prompts, measured = [Prompt(text) for text in PROMPTS], MeasuredData(held_out, records)
    compared = compare_stacks(context, stacks, prompts, Sampling(max_new_tokens=64), measured)
    results = _table_rows(compared.scores)
    push = prepare_push(registry, "storyteller", "me/storyteller")
    adapters = [str(resolve_expression(registry, name).members[0].label) for name in recipe.recipe.train]
    data = {
        "adapters": adapters,
        "stack": "storyteller",
        "results": results,
        "texts": compared.answers,
        "push": push,
        "registry": str(registry.root),
    }

    def screen() -> Any:
        from stackctl.cli.comparison import render_comparison
        from stackctl.cli.inspect_facts import stack_tree
        from stackctl.core.expressions import format_sum
        from stackctl.render.tables import spaced

        stack, plan = plan_expressions(registry, ["storyteller"])[0]
        sizes = ", ".join(f["path"] for f in push["files"])
        return spaced(
            [
                render_comparison(STACKS, compared.answers),
                stack_tree(stack, plan),
                format_sum((m.adapter.name, m.weight) for m in stack.members),
                _loss_table(results),
                f"ready to push: {sizes}",
                'next: stackctl generate -p "Tell me about the sea."',
            ]
        )

    return Result(data, "storyteller", screen)


def _context(context: Context) -> Context:
    """The surroundings with a registry: the one in use, or a new one in ./registry."""
    try:
        find_registry(context.registry_option)
    except NotFound:
        folder = (context.registry_option or Path("registry")).absolute()
        init_registry(folder)
        context.output.status(f"made a registry in {folder}")
        return Context(context.output, folder)
    return context


def _check_free(registry: Registry, recipe: RecipeFile) -> None:
    """The demo's names are free, or are the demo's own from an earlier run: nobody's work gets a stray version.

    Raises:
        Usage: a name is somebody's.
    """
    for name, job in recipe.recipe.train.items():
        adapter = registry.find_adapter(name)
        digest = sha256_file(recipe.folder / str(job.data))
        if adapter and (not adapter.newest().data or adapter.newest().data.sha256 != digest):  # type: ignore[union-attr]
            raise Usage(
                f"there is an adapter '{name}' here that is not the demo's",
                hint="stackctl demo --registry demo-registry",
            )


def _add_base(registry: Registry, say: Any) -> Base:
    from stackctl.engine.base.entry import make_base
    from stackctl.engine.libraries import quiet_libraries

    quiet_libraries()
    base = make_base(EMBEDDED_NAME, None, None, registry, say)
    save_base(registry, base)
    say(f"registered the base {base.name}: {base.architecture}, {base.parameters / 1e6:.0f} M parameters")
    return base


def _table_rows(losses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each stack with a loss for each data set."""
    rows: dict[str, dict[str, Any]] = {}
    for result in losses:
        column = Path(result["data"]).name.removesuffix("-heldout.jsonl")
        rows.setdefault(result["stack"], {"stack": result["stack"]})[column] = result["loss"]
    return list(rows.values())


def _loss_table(rows: list[dict[str, Any]]) -> Any:
    from rich.text import Text

    from stackctl.render.tables import table

    columns = [key for key in rows[0] if key != "stack"]
    best = {column: min(row[column] for row in rows) for column in columns}
    cells = [
        [row["stack"], *(Text(f"{row[c]:.3f}", style="bold green" if row[c] == best[c] else "") for c in columns)]
        for row in rows
    ]
    return table(["stack", *columns], cells, title="loss on held-out records (lower is better)")
