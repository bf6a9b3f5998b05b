"""Which neighbours in a batch attend together, each only as far as the longest of them."""

from __future__ import annotations

from collections.abc import Sequence

_CALL = 1 << 14
"""Numbers of keys that are read in the time of one more call: measured, see decision 46."""


def attention_groups(lengths: Sequence[int], width: int) -> tuple[list[int], int]:
    """How many rows, one after another, attend in each call, and what all calls cost in columns; the cheapest way.

    A column has ``width`` numbers of keys. One more token in every row changes nothing.
    """
    call = -(-_CALL // width)
    costs, begins = [0], [0]  # of the rows up to here
    for end in range(1, len(lengths) + 1):
        longest, least, begin = 0, 0, 0
        for first in reversed(range(end)):
            longest = max(longest, lengths[first])
            cost = costs[first] + call + (end - first) * longest
            if not least or cost < least:
                least, begin = cost, first
        costs.append(least)
        begins.append(begin)
    counts, end = [], len(lengths)
    while end:
        counts.append(end - begins[end])
        end = begins[end]
    return counts[::-1], costs[-1]
