"""Well-known sizes of bases: their parameters are the published ones, and a larger one never needs less."""

import pytest

from stackctl.machine.reference_models import SIZES, needs

PUBLISHED = {
    "135M": 134_515_008, "1B": 1_235_814_400, "3B": 3_212_749_824, "8B": 8_030_261_248, "14B": 14_768_307_200,
    "32B": 32_762_123_264, "70B": 70_553_706_496,
}  # fmt: skip
"""Parameters as the models' own cards and files give them, norms and biases included."""


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_parameters_are_the_published_ones(size):
    assert size.base().parameters == pytest.approx(PUBLISHED[size.name], rel=1e-3)


def test_a_larger_base_needs_more_of_everything():
    for precision in ("float32", "half"):
        found = [needs(size.base(), precision, precision) for size in SIZES]
        for work in ("generate", "train", "export"):
            wanted = [row[work] for row in found]
            assert wanted == sorted(wanted)
            assert all(row["export"] < row["train"] for row in found) or precision == "half"


def test_generating_needs_the_weights_and_a_little_more():
    found = needs(SIZES[0].base(), "float32", "float32")
    assert 4 * PUBLISHED["135M"] < found["generate"] < 1.2 * 4 * PUBLISHED["135M"]
    assert found["train"] > found["generate"]
