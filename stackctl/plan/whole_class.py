"""A stack by the names of the class that ``config.json`` names, where the base was loaded as the class of its text."""

from __future__ import annotations

import dataclasses

import msgspec

from stackctl.core.errors import Incompatible
from stackctl.core.schema import WholeClass
from stackctl.plan.stack_plan import StackPlan


def on_whole_class(plan: StackPlan) -> StackPlan:
    """The same deltas by the names of the whole class; a plan on a base without one as it is. For writing names only.

    Raises:
        Incompatible: the method draws at random by the names of modules, so that other names would be other deltas.
    """
    base = plan.base
    if base is None or base.whole is None:
        return plan
    if plan.options.seed is not None:
        raise Incompatible(
            f"{plan.method} draws at random by the names of modules, and the whole class has others",
            hint="export with --format model",
        )
    whole, inside = base.whole, (base.input_embedding or "").rpartition(".")[0]

    def renamed(name: str) -> str:
        if name == base.output_embedding:
            return whole.head or name
        if not inside:
            return f"{whole.decoder}.{name}"
        return f"{whole.decoder}.{name.removeprefix(f'{inside}.')}" if name.startswith(f"{inside}.") else name

    modules = {renamed(name): dataclasses.replace(m, name=renamed(name)) for name, m in plan.modules.items()}
    named = msgspec.structs.replace(
        base,
        modules={renamed(name): shape for name, shape in base.modules.items()},
        input_embedding=renamed(base.input_embedding) if base.input_embedding else None,
        output_embedding=whole.head,
    )
    replacements = tuple(
        dataclasses.replace(r, parameter=f"{renamed(r.parameter.rpartition('.')[0])}.{r.parameter.rpartition('.')[2]}")
        for r in plan.replacements
    )
    rows = tuple(dataclasses.replace(r, module=renamed(r.module)) for r in plan.token_rows)
    return dataclasses.replace(plan, base=named, modules=modules, replacements=replacements, token_rows=rows)


def is_named_for(plan: StackPlan, whole: WholeClass) -> bool:
    """Whether what there is, one checkpoint as it stands, has the names of the whole class already."""
    if len(plan.members) != 1:
        return False
    names = plan.members[0].checkpoint.pairs
    return bool(names) and all(name == whole.head or name.startswith(f"{whole.decoder}.") for name in names)
