"""``stackctl.yaml``: what to train, on what, in which order. What of it is out of date, ``recipe_plan`` finds out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from stackctl.core.errors import StackctlError, Usage, raise_all
from stackctl.core.expressions import BASE, Reference, parse_expression, parse_name, parse_stack_name
from stackctl.core.train_job import Recipe, TrainJob
from stackctl.storage.yaml_files import read_yaml

RECIPE_FILE = "stackctl.yaml"


@dataclass(frozen=True)
class RecipeFile:
    """A recipe and where it stands (its data paths are relative to that folder)."""

    recipe: Recipe
    path: Path

    @property
    def folder(self) -> Path:
        return self.path.parent

    def job(self, name: str) -> TrainJob:
        """A job of the recipe, on the recipe's base when it names none itself."""
        job = self.recipe.train[name]
        on_base = job.on is None or job.on == BASE
        return msgspec.structs.replace(job, base=self.recipe.base) if on_base and not job.base else job


def find_recipe() -> Path | None:
    """The nearest ``stackctl.yaml`` from the working directory upward."""
    here = Path.cwd()
    return next((p / RECIPE_FILE for p in (here, *here.parents) if (p / RECIPE_FILE).is_file()), None)


def read_recipe(path: Path) -> RecipeFile:
    """Read and check a recipe by itself: its names, and that nothing stands on itself.

    Raises:
        NotFound, Usage: it is not there, or anything in it is wrong, all at once.
    """
    recipe = read_yaml(path, Recipe)
    problems: list[StackctlError] = []
    texts = [text for job in recipe.train.values() for text in (job.on, job.from_, job.teacher)]
    texts += [recipe.push.stack] if recipe.push else []
    checks: list[tuple[Callable[[str], Any], str]] = [
        *((parse_name, name) for name in recipe.train),
        *((parse_expression, text) for text in texts if text),
        *((functools.partial(_check_stack_name, name), text) for name, text in recipe.stacks.items()),
    ]
    for check, text in checks:
        try:
            check(text)
        except StackctlError as error:
            problems.append(Usage(f"{path}: {error.message}", hint=error.hint))
    problems += [
        Usage(f"{path}: '{name}' is both an adapter and a stack", hint="give the stack another name")
        for name in set(recipe.train) & set(recipe.stacks)
    ]
    raise_all(problems)
    try:
        build_order(recipe)
    except Usage as error:
        raise Usage(f"{path}: {error.message}", hint=error.hint) from None
    return RecipeFile(recipe, path.absolute())


def _check_stack_name(name: str, expression: str) -> None:
    """A stack's name that holds a '+' is that of its expression."""
    parse_stack_name(name, "+".join(term.reference.name for term in parse_expression(expression)))


def build_order(recipe: Recipe) -> list[str]:
    """The names of adapters and stacks, each after all that it stands on; stacks as late as they can be.

    Raises:
        Usage: some stand on one another in a circle.
    """
    parts = dict.fromkeys((*recipe.train, *recipe.stacks))
    needs = {name: [n.name for n in needs_of(recipe, name) if n.name in parts] for name in parts}
    order: dict[str, None] = {}
    for first in parts:
        visiting = {first: iter(needs[first])} if first not in order else {}
        while visiting:
            name, left = next(reversed(visiting.items()))
            needed = next((n for n in left if n not in order), None)
            if needed is None:
                order[name] = None
                del visiting[name]
            elif needed in visiting:
                names = list(visiting)
                circle = " -> ".join([*names[names.index(needed) :], needed])
                raise Usage(f"parts of the recipe depend on one another in a circle: {circle}", hint="fix an 'on:'")
            else:
                visiting[needed] = iter(needs[needed])
    return list(order)


def needs_of(recipe: Recipe, name: str) -> list[Reference]:
    """What a part of the recipe names: in its expression, as teacher and as ``from``, a version of its own aside."""
    job = recipe.train.get(name)
    named = [*names_in(job.from_), *names_in(job.teacher)] if job else []
    beginning = [found for found in named if found.name != name or found.version is None]
    return [*names_in(expression_of(recipe, name)), *beginning]


def expression_of(recipe: Recipe, name: str) -> str | None:
    return recipe.train[name].on if name in recipe.train else recipe.stacks[name]


def names_in(expression: str | None) -> list[Reference]:
    return [term.reference for term in parse_expression(expression)] if expression else []
