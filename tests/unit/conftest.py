"""A registry without any model, and the stack that most tests of it speak of."""

import pytest
from checkpoints import make_base, make_registry, register

from stackctl.registry.resolve import resolve_expression
from stackctl.registry.stacks import save_stack


@pytest.fixture
def registry(tmp_path):
    return make_registry(tmp_path / "my régistry", make_base())


@pytest.fixture
def storyteller(registry):
    """style@1, instruct@1 on it, and a stack of both."""
    register(registry, "style")
    register(registry, "instruct", ["style@1"], seed=1)
    save_stack(registry, "storyteller", resolve_expression(registry, "style:0.5+instruct"))
    return registry
