"""What is written is read back unchanged; what is read is a value or a Usage error."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from stackctl.errors import Usage
from stackctl.registry.layout import on_one_line
from stackctl.yamltext import Flow, format_yaml, parse_yaml

NASTY = [
    "", " ", "  x", "x  ", "on", "no", "yes", "null", "~", "true", "1", "1e-5", "-0", "+.5", ".inf", "-.nan", "0x1",
    "1_0",
    "a: b", "a #b", "#a", "- a", "-", "?", "? a", ":", ": a", "[a", "a]", "{", "}", ",", "a,b", "&a", "*a", "!a",
    "!!str", "|",
    ">", "%a", "@a", "`a", "'", '"', "''", "'a'", '"a"', "\\", "\\n", "\n", "\n\n", " \n", "\n ", "a\n", "a\n\n",
    "a\nb", "\na",
    "a\n b\n", " a\nb", "a \nb", "\ta", "a\t", "a\tb", "\t", "a\n\tb", "\r", "\r\n", "a\r\nb", "\x85", "a\x85b",
    "\u2028",
    "\u2029x", "\ufeff", "\ufeffa", "\0", "\x07", "\x1b[0m", "\x7f", "\xa0", "é", "🙂", "٣", "---", "...", "--- a",
    "a\n---\nb",
    "a\n...\n", "<<", "=", "<<<<<<< HEAD", "a" * 300, "a b " * 4000, "a\n" * 300, "x: y\n  - z\n", "{{ x }}",
    "{% if %}\n{{ a }}\n",
    "2001-01-01", "12:30", "9" * 700, "1e999", "#\n#", "a\n#b", "a:\n", "?\n", "\uffff", "\ue000", "\U0010ffff",
]  # fmt: skip

texts = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.text(
    alphabet=" \n\t\r:#-'\"|>?&*!%@`[]{},a1.~\\\x85\u2028", max_size=12
)  # fmt: skip
scalars = texts | st.none() | st.booleans() | st.integers(-(10**60), 10**60) | st.floats(allow_nan=False)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


def same(a, b):
    """Equal in types too: 1 is not True, 1.0 is not 1, -0.0 is not 0.0."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def check(value):
    text = format_yaml(value)
    found = parse_yaml(text, "f")[0]
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
    assert same(value, parse_yaml(text, "f")[0]), text


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(texts, scalars, max_size=5))
def test_round_tripon_one_line(value):
    check({"a": Flow(value), "b": [Flow(value)]})


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="ab:-#'\"|>?&*!%@`[]{},\n\t 01.~\\<=", max_size=60))
def test_any_text_is_a_value_or_a_usage_error(text):
    try:
        value, marks = parse_yaml(text, "f")
    except Usage as error:
        assert error.message.startswith("f")
        return
    assert value is None or () in marks
    try:
        found = parse_yaml(format_yaml(value), "f")[0]
    except Usage:
        raise AssertionError("what was read cannot be written") from None
    assert repr(found) == repr(value)
