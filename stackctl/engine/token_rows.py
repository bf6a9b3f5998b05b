"""Rows of single tokens that members trained, as values to write into an embedding or a head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stackctl.core.errors import Incompatible
from stackctl.engine.base.module_shapes import computes
from stackctl.engine.folding import Rounding
from stackctl.engine.tensors import TORCH_DTYPES, MemberTensors, tensor_bytes
from stackctl.plan.stack_plan import StackPlan, TokenRows
from stackctl.plan.token_rows import all_tokens, peft_rows

OwnRows = Callable[[str, Sequence[int]], Tensor]
"""The base's own rows (tokens, width) of a module, by its name and the tokens' numbers."""


def new_rows(rows: TokenRows, own: Callable[[], Tensor], tensors: MemberTensors) -> Tensor:
    """What the rows are with the member's weight, (tokens, width) in float32: own + weight · (value - own).

    ``own`` is asked for the base's rows only where the weight is not one.
    """
    value = tensors.of(rows.member, rows.tensor).float()
    if rows.weight == 1:
        return value
    base = own().to(value)
    return base + rows.weight * (value - base)


def set_rows(weight: Tensor, rows: TokenRows, tensors: MemberTensors, rounding: Rounding) -> None:
    """Give the tokens' rows of a weight (vocabulary, width) their values: computed in float32 and rounded once."""
    index = torch.tensor(rows.tokens, device=weight.device)
    own = weight[index].float()
    new = new_rows(rows, lambda: own, tensors).to(weight.device)
    weight.index_copy_(0, index, new.to(weight.dtype))
    rounding.lost += float(torch.linalg.vector_norm(weight[index].float() - new)) ** 2
    rounding.total += float(torch.linalg.vector_norm(new - own)) ** 2


def written_rows(plan: StackPlan, dtype: str, own: Callable[[], OwnRows]) -> Iterator[tuple[memoryview, float]]:
    """The rows of a whole stack by :func:`stackctl.plan.token_rows.peft_rows`, for a checkpoint of PEFT's.

    Yields the rows (tokens, width) of each module as bytes of a safetensors dtype, and ‖written - exact‖ / ‖change‖.
    ``own`` is asked for the base's rows only where they are needed.
    """
    base = functools.cache(own)
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for module, found in peft_rows(plan).items():
            exact = torch.cat([new_rows(r, lambda r=r: base()(module, r.tokens), tensors) for r in found])  # type: ignore[misc]  # noqa: B023
            made = exact.to(TORCH_DTYPES[dtype])
            error = 0.0
            if dtype != "F32":
                change = exact - base()(module, all_tokens(found)).float()
                error = float((made.float() - exact).norm() / change.norm().clamp_min(1e-30))
            yield tensor_bytes(module, made), error


def refuse_unlike_peft(plan: StackPlan, model: nn.Module) -> None:
    """Where PEFT computes something else with a member than a changed weight does.

    A head's bias is left out as soon as it has trained rows (TrainableTokensLayer.forward_adapters). In an embedding
    that does more than look a row up, the change is added behind that (Muse Spark norms what it looks up).

    Raises:
        Incompatible: what was trained and what would be computed here are two things.
    """
    for rows in plan.token_rows:
        if getattr(model.get_submodule(rows.module), "bias", None) is not None:
            raise Incompatible(
                f"{plan.members[rows.member].label} trained rows of single tokens in {rows.module}, which has a bias: "
                "PEFT leaves that out then",
                hint="train it again without single tokens",
            )
    changed = {m.name: m.factors[0].member for m in plan.modules.values() if m.type == "Embedding" and m.factors}
    for name, member in {**changed, **{rows.module: rows.member for rows in plan.token_rows}}.items():
        if computes(own := model.get_submodule(name)):
            raise Incompatible(
                f"{plan.members[member].label} changes {name}, a {type(own).__name__}, which does more than look up a "
                "row: PEFT runs it otherwise than a changed weight does",
                hint="train it again without that module",
            )


def base_rows(plan: StackPlan, folder: Path) -> OwnRows:
    """The base's own rows, out of the files in ``folder``: of a plain matrix no others are read.

    A head that the files have no weight of is the embedding.
    """
    from stackctl.engine.base.layout import BaseLayout
    from stackctl.engine.base.model_class import quantised_skeleton

    base = plan.known_base
    layout = BaseLayout(folder, *quantised_skeleton(folder, torch.float32))
    twin = layout.group(f"{base.input_embedding}.weight") if base.tied_embeddings else None

    def read(module: str, tokens: Sequence[int]) -> Tensor:
        group = layout.group(f"{module}.weight") or twin
        if group is None:
            raise Incompatible(f"the base's files have no {module}.weight", hint="export with --format model")
        if group.is_plain:
            return layout.read_rows(next(iter(group.sources)), tokens)
        return dict(layout.read({group.first}))[group.first][list(tokens)]

    return read
