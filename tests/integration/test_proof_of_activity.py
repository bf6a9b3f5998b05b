"""What is said of a frozen stack that does nothing, or too much."""

import pytest
import torch

from stackctl.core.errors import VerificationFailed
from stackctl.engine.training.proofs import check_active


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_not_called_the_same(odd: float) -> None:
    bare = torch.zeros(2, 3)
    frozen = torch.tensor([[0.0, odd, 1.0], [0.0, 0.0, 0.0]])
    with pytest.raises(VerificationFailed, match=r"huge@1 the logits are not finite numbers"):
        check_active(bare, frozen, "huge@1")
    with pytest.raises(VerificationFailed, match=r"has no effect"):
        check_active(bare, bare, "huge@1")
    assert check_active(bare + 1, bare + 2, "huge@1") > 0
