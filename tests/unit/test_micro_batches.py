"""How a step may be cut into micro-batches."""

from __future__ import annotations

from stackctl.jobs.micro_batches import StepCut, first_that_fits, possible_cuts, read_cut


def test_a_step_keeps_its_records_however_it_is_cut() -> None:
    cuts = possible_cuts(StepCut(8, 3), smaller=True)
    assert {cut.records * cut.count for cut in cuts} == {24}
    assert [cut.records for cut in cuts if not cut.checkpointing] == [24, 12, 8, 6, 4, 3, 2, 1]
    assert [cut.checkpointing for cut in cuts] == [False] * 8 + [True] * 8, "computing again is slower than cutting"


def test_a_number_is_what_it_says() -> None:
    assert possible_cuts(StepCut(8, 2)) == [StepCut(8, 2), StepCut(8, 2, checkpointing=True)]
    assert possible_cuts(StepCut(8, 2), checkpointing=False) == [StepCut(8, 2)]
    assert possible_cuts(StepCut(8, 2), checkpointing=True) == [StepCut(8, 2, checkpointing=True)]


def test_micro_batches_that_go_in_parts_are_one() -> None:
    cuts = possible_cuts(StepCut(2, 4, tokens=64, at_once=2, as_one=True))
    assert {(cut.records, cut.count) for cut in cuts} == {(2, 4)}, "it is said as it was asked for"
    assert [(cut.at_once, cut.checkpointing, cut.rows, cut.accumulated) for cut in cuts] == [
        (at_once, checkpointing, *rows)
        for at_once, checkpointing in ((2, False), (1, False), (1, True))
        for rows in ((8, 1), (2, 4))
    ]
    assert first_that_fits(cuts, lambda cut: False) == cuts[1], "as it was asked for, which needs less"
    assert not any(cut.as_one for cut in possible_cuts(StepCut(8, tokens=64, as_one=True)))


def test_the_fastest_that_fits_is_taken() -> None:
    cuts = possible_cuts(StepCut(8), smaller=True)
    assert first_that_fits(cuts, lambda cut: cut.records <= 5, smaller=True) == StepCut(4, 2)
    assert first_that_fits(cuts, lambda cut: cut.checkpointing, smaller=True) == StepCut(8, 1, checkpointing=True)
    assert first_that_fits(cuts, lambda cut: False, smaller=True) == StepCut(1, 8, checkpointing=True)
    assert first_that_fits(possible_cuts(StepCut(8)), lambda cut: False) == StepCut(8)


def test_what_a_run_wrote_down_is_read_again() -> None:
    assert read_cut({"records": 2, "count": 4, "checkpointing": True}) == StepCut(2, 4, checkpointing=True)
    assert read_cut(None) is None
    assert read_cut({"records": "many"}) is None
