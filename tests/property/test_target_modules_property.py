"""Compacting loses nothing, whatever the names."""

from hypothesis import given
from hypothesis import strategies as st

from stackctl.core.schema import ModuleShape
from stackctl.lora.target_modules import compact_modules, expand_modules

parts = st.sampled_from(["a", "layers", "q_proj", "0", "1", "2", "3", "10", "007", "1x", "²", "٣", "-1", "1-2"])
names = st.lists(parts, min_size=1, max_size=5).map(".".join)
shapes = st.builds(
    ModuleShape, type=st.sampled_from(["Linear", "Conv1D"]), shape=st.sampled_from([[1, 2], [2, 1], [1, 2, 3]])
)


@given(st.dictionaries(names, shapes, max_size=30))
def test_compact_and_expand(modules):
    compact = compact_modules(modules)
    assert expand_modules(compact) == modules
    assert len(compact) <= len(modules)
    assert compact_modules(expand_modules(compact)) == compact
