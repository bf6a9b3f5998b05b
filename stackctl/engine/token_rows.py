"""Rows of single tokens that members trained, as values to write into an embedding or a head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackctl.core.errors import Incompatible
from stackctl.engine.folding import Rounding
from stackctl.engine.tensors import TORCH_DTYPES, MemberTensors, TensorFiles, tensor_bytes
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.plan.model import StackPlan, TokenRows
from stackctl.plan.token_rows import all_tokens, peft_rows

if TYPE_CHECKING:
    from stackctl.engine.base_layout import BaseLayout  # transformers takes seconds to import

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


def written_rows(plan: StackPlan, dtype: str, own: Callable[[], OwnRows]) -> Iterator[tuple[str, memoryview, float]]:
    """The rows of a whole stack by :func:`stackctl.plan.token_rows.peft_rows`, for a checkpoint of PEFT's.

    Yields each module, its rows (tokens, width) as bytes of a safetensors dtype, and ‖written - exact‖ / ‖change‖.
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
            yield module, tensor_bytes(module, made), error


def refuse_biased(plan: StackPlan, model: nn.Module) -> None:
    """A head whose bias PEFT leaves out as soon as it has trained rows (TrainableTokensLayer.forward_adapters).

    Raises:
        Incompatible: there is one, so that what was trained and what would be computed here are two things.
    """
    for rows in plan.token_rows:
        if getattr(model.get_submodule(rows.module), "bias", None) is not None:
            raise Incompatible(
                f"{plan.members[rows.member].label} trained rows of single tokens in {rows.module}, which has a bias: "
                "PEFT leaves that out then",
                hint="train it again without single tokens",
            )


def stored_rows(layout: BaseLayout, parameter: str, twin: str | None = None) -> Callable[[Sequence[int]], Tensor]:
    """A function that reads some rows of a parameter out of a base's files, without reading the others.

    ``twin`` is the parameter whose values it has where the files have none of its own.
    """

    def read(tokens: Sequence[int]) -> Tensor:
        group = layout.group(parameter) or (layout.group(twin) if twin else None)
        if group is None:
            raise Incompatible(f"the base's files have no {parameter}", hint="export with --format model")
        if not group.is_plain:
            ((_, whole),) = [(n, v) for n, v in layout.read({group.first}) if n == group.first]
            return whole[list(tokens)]
        return rows_of_file(layout, next(iter(group.sources)), tokens)

    return read


def rows_of_file(layout: BaseLayout, name: str, rows: Collection[int]) -> Tensor:
    """Some rows of a stored matrix."""
    path, info = layout.tensors[name]
    assert all(0 <= row < info.shape[0] for row in rows), "what lies behind a matrix is another tensor's"
    size = (info.end - info.start) // info.shape[0]
    with TensorFiles() as files:
        parts = [
            TensorInfo(name, info.dtype, (1, *info.shape[1:]), info.start + row * size, info.start + (row + 1) * size)
            for row in rows
        ]
        return torch.cat([files.read(path, part) for part in parts])


def base_rows(plan: StackPlan, folder: Path) -> OwnRows:
    """The base's own rows, out of the files in ``folder``."""
    from stackctl.engine.base_class import quantised_skeleton
    from stackctl.engine.base_layout import BaseLayout

    base = plan.base
    assert base is not None, "rows are told from a base's own"
    layout = BaseLayout(folder, *quantised_skeleton(folder, torch.float32))
    twin = f"{base.input_embedding}.weight" if base.tied_embeddings else None
    return lambda module, tokens: stored_rows(layout, f"{module}.weight", twin)(tokens)
