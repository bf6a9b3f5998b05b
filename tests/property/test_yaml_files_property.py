"""What is written is read back unchanged; what is read is a value or a Usage error."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
from yaml_values import NASTY, same, scalars, texts, values

from stackctl.core.errors import Usage
from stackctl.storage.yaml_text import Flow, format_yaml, on_one_line, parse_yaml


def check(value):
    text = format_yaml(value)
    found = parse_yaml(text, "f").value
    assert same(value, found), text


def test_every_nasty_string_in_every_place():
    for text in NASTY:
        check({text: text})
        check({"a": [text, {"b": text, text: [text]}]})
        check([[text], text])
        check(on_one_line({"a": {"b": {"c": text, "d" + text: text}}}))


@settings(max_examples=300, deadline=None)
@given(values)
@example({"a": {}})
@example([])
@example({"": [""]})
@example([[[]], {}])
def test_round_trip(value):
    check(value)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(texts, values, max_size=4))
def test_round_trip_in_the_layout_of_the_registry(value):
    text = format_yaml(on_one_line(value))
    assert same(value, parse_yaml(text, "f").value), text


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(texts, scalars, max_size=5))
def test_round_tripon_one_line(value):
    check({"a": Flow(value), "b": [Flow(value)]})


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="ab:-#'\"|>?&*!%@`[]{},\n\t 01.~\\<=", max_size=60))
def test_any_text_is_a_value_or_a_usage_error(text):
    try:
        document = parse_yaml(text, "f")
    except Usage as error:
        assert error.message.startswith("f")
        return
    assert document.value is None or () in document.marks
    try:
        found = parse_yaml(format_yaml(document.value), "f").value
    except Usage:
        raise AssertionError("what was read cannot be written") from None
    assert repr(found) == repr(document.value)
