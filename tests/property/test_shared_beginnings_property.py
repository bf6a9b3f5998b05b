"""A row in which beginnings stand once: every record is whole in it, and nothing that two begin with is there twice."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from stackctl.engine.data.shared_beginnings import FEWEST, common_prefix, share_beginnings

RECORDS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=8)


@given(RECORDS)
def test_every_record_is_whole_and_beginnings_stand_once(records: list[list[int]]) -> None:
    row = share_beginnings(records)
    flat = [token for record in records for token in record]
    laid = [flat[place] for place in row.tokens]
    assert [laid[place] for place in row.places] == flat
    assert sum(row.lengths) == len(laid)

    pieces = [laid[start:end] for start, end in itertools.pairwise(itertools.accumulate(row.lengths, initial=0))]
    assert all(pieces)
    whole = [[token for piece in path for token in pieces[piece]] for path in row.paths]
    assert whole == sorted(records)
    seen = 0
    for path in row.paths:
        new = [piece for piece in path if piece >= seen]
        assert path[len(path) - len(new) :] == new == list(range(seen, seen + len(new)))
        seen += len(new)
    assert seen == len(pieces)

    beginnings = {tuple(record[:length]) for record in records for length in range(1, len(record) + 1)}
    assert len(laid) >= len(beginnings)
    again = sum(min(common_prefix(a, b), FEWEST - 1) for a, b in itertools.pairwise(sorted(records)))
    assert len(laid) <= len(beginnings) + again, "only what is too short to share is there twice"
