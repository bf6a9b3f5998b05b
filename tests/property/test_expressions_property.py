"""Whatever is formatted is parsed back; whatever is parsed is an expression or a Usage error."""

import math

from hypothesis import given
from hypothesis import strategies as st

from stackctl.core.errors import Usage
from stackctl.core.expressions import (
    Reference,
    Term,
    format_expression,
    format_weight,
    parse_expression,
    parse_name,
    parse_reference,
    parse_stack_name,
)
from stackctl.core.fields import HUGE

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True).filter(lambda name: name != "base")
weights = st.floats(-HUGE, HUGE)
references = st.builds(Reference, names, st.none() | st.integers(1, 999_999_999))
terms = st.builds(Term, references, weights)


@given(st.lists(terms, max_size=6))
def test_expressions_round_trip(members):
    assert parse_expression(format_expression(members)) == tuple(members)


@given(weights)
def test_weights_round_trip(weight):
    assert float(format_weight(weight)) == weight


@given(references)
def test_references_round_trip(reference):
    assert parse_reference(str(reference)) == reference


@given(st.lists(names, min_size=1, max_size=3))
def test_joined_names_are_a_stack_name(members):
    assert parse_stack_name("+".join(members)) == "+".join(members)


@given(st.text() | st.text(alphabet="ab0@:+-.eE19٣ \n\0/", max_size=20))
def test_nothing_but_usage_is_raised(text):
    for parse in (parse_name, parse_reference, parse_expression, parse_stack_name):
        try:
            parse(text)
        except Usage as error:
            assert error.message


@given(st.text(alphabet="ab0@:+-.eE19", max_size=16))
def test_what_is_accepted_says_what_it_means(text):
    try:
        members = parse_expression(text)
    except Usage:
        return
    assert all(math.isfinite(term.weight) for term in members)
    assert parse_expression(format_expression(members)) == members
