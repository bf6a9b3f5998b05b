"""The table of methods: every one has its function, and takes just its options."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import stackctl
from stackctl.core.errors import Usage
from stackctl.core.schema import MethodOptions
from stackctl.plan.methods import METHODS, check_method


def test_every_method_names_a_function_of_the_engine() -> None:
    """Read as text, because the engine needs torch and the table must not."""
    engine = Path(stackctl.__file__).parent / "engine"
    for method in METHODS.values():
        module, name = method.function.split(".")
        parsed = ast.parse((engine / f"{module}.py").read_text())
        assert name in {node.name for node in parsed.body if isinstance(node, ast.FunctionDef)}


def test_options_are_filled_in_with_their_defaults() -> None:
    assert check_method("sum", MethodOptions()) == MethodOptions()
    assert check_method("ties", MethodOptions()) == MethodOptions(density=0.5)
    assert check_method("dare_ties", MethodOptions(density=0.2)) == MethodOptions(density=0.2, seed=0)
    assert check_method("svd", MethodOptions(rank="auto", tolerance=0.01)) == MethodOptions(rank="auto", tolerance=0.01)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tise", MethodOptions()),
        ("sum", MethodOptions(rank=4)),
        ("ties", MethodOptions(seed=1)),
        ("svd", MethodOptions()),
        ("svd", MethodOptions(rank="auto")),
        ("svd", MethodOptions(rank=4, tolerance=0.1)),
        ("svd", MethodOptions(rank=4, density=0.1)),
        ("ties", MethodOptions(rank="auto")),
        ("tsv", MethodOptions(density=0.1)),
        ("iso_c", MethodOptions(seed=1)),
    ],
)
def test_what_a_method_does_not_take_is_refused(method: str, options: MethodOptions) -> None:
    with pytest.raises(Usage):
        check_method(method, options)


def test_a_mistyped_method_names_the_nearest() -> None:
    with pytest.raises(Usage) as raised:
        check_method("tise", MethodOptions())
    assert "ties" in str(raised.value.hint)
