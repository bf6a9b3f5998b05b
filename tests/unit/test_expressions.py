"""Names, references and expressions: what is one, and what only looks like one."""

import pytest

from stackctl.core.errors import Usage
from stackctl.core.expressions import (
    Reference,
    Term,
    format_expression,
    format_sum,
    format_weight,
    parse_expression,
    parse_name,
    parse_reference,
    parse_stack_name,
)


@pytest.mark.parametrize(
    "name", ["a", "0", "keys", "forward", "lora", "default", "a.b", "a_b-c.d", "a" * 64, "1e5", "x."]
)
def test_names(name):
    assert parse_name(name) == name
    assert parse_expression(name) == (Term(Reference(name)),)


NOT_NAMES = [
    "", "a" * 65, "base", "..", ".", ".a", "-a", "_a", "A", "é", "a/b", "../a", "a\\b", "a\0", "\0", "a\n", "\na", "a ",
    " a", "a:1", "a@1", "a+b", "٣", "²", "a\u200b", "a\u2028", "ａ", "a\r", "C:", "~", "a*", "a$",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_NAMES)
def test_what_is_no_name(text):
    with pytest.raises(Usage) as caught:
        parse_name(text)
    assert caught.value.exit_code == 2


def test_weights_and_versions():
    assert parse_expression("style:0.7+instruct@2") == (
        Term(Reference("style"), 0.7),
        Term(Reference("instruct", 2), 1.0),
    )
    assert parse_expression("base") == ()


@pytest.mark.parametrize(
    ("text", "weight"),
    [("-1", -1.0), ("+2", 2.0), ("0", 0.0), ("-0", 0.0), (".5", 0.5), ("5.", 5.0), ("1e-5", 1e-5), ("1E+5", 1e5),
    ("-2.5e3", -2500.0)],
)  # fmt: skip
def test_a_weight_may_be_any_finite_number(text, weight):
    assert parse_expression(f"style:{text}+b") == (Term(Reference("style"), weight), Term(Reference("b")))


def test_a_plus_inside_a_number_joins_nothing():
    assert parse_expression("style:1e+5+instruct") == (Term(Reference("style"), 1e5), Term(Reference("instruct")))
    assert parse_expression("style:1+5") == (Term(Reference("style"), 1.0), Term(Reference("5")))
    assert parse_expression("1e+5") == (Term(Reference("1e")), Term(Reference("5")))


NOT_EXPRESSIONS = [
    "", "+", "a+", "+a", "a++b", "a+ b", "a +b", " a", "a\n", "a+b\n", "a:1\n", "a@1\n", "a:", "a@", "a@0", "a@-1",
    "a@1.5", "a@" + "9" * 10, "a@" + "9" * 5000, "a:nan", "a:inf", "a:-inf", "a:infinity", "a:1e400", "a:-1e400",
    "a:" + "9" * 400, "a:0x10", "a:1_0", "a:1,5", "a:٣", "a@٣", "a:1²", "a:--1", "a:1e", "a:1e+instruct", "a:1:2",
    "a@1@2", "a:1@2", "base+a", "a+base", "base:2", "base@1", "base+base", "A", "a/b", "..", "a\0", "a" * 65,
    "a+" + "b" * 65, "a:1e301", "(a)", "a-+b:", "style: 1", "a;b",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_EXPRESSIONS, ids=lambda text: repr(text[:20]))
def test_what_is_no_expression(text):
    with pytest.raises(Usage) as caught:
        parse_expression(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_base_among_terms_says_what_to_write_instead():
    with pytest.raises(Usage) as caught:
        parse_expression("base+style:0.5")
    assert "style:0.5" in caught.value.hint


def test_a_reference_is_a_name_with_or_without_a_version():
    assert parse_reference("style") == Reference("style")
    assert parse_reference("style@2") == Reference("style", 2)
    assert str(Reference("style", 2)) == "style@2"


@pytest.mark.parametrize("text", ["", "style:1", "style@2:1", "style@0", "style@", "a+b", "style@2\n", "style\n", "@2"])
def test_what_is_no_reference(text):
    with pytest.raises(Usage):
        parse_reference(text)


def test_a_stack_may_be_called_by_its_members():
    assert parse_stack_name("style+instruct") == "style+instruct"
    assert parse_stack_name("storyteller") == "storyteller"


@pytest.mark.parametrize(
    "text", ["", "+", "a+", "+a", "a++b", "a+b\n", "a:1+b", "a@1+b", "a+B", "a+../b", "base", "base+a", "a+base", "a/b"]
)
def test_what_is_no_stack_name(text):
    with pytest.raises(Usage):
        parse_stack_name(text)


def test_a_stack_name_fits_into_a_file_name():
    with pytest.raises(Usage):
        parse_stack_name("+".join(["a" * 60] * 5))


@pytest.mark.parametrize(
    ("weight", "text"),
    [(1.0, "1"), (0.7, "0.7"), (-2.0, "-2"), (0.0, "0"), (-0.0, "0"), (1e-5, "1e-05"), (1e16, "1e+16"), (1e300,
    "1e+300")],
)  # fmt: skip
def test_weights_are_written_short(weight, text):
    assert format_weight(weight) == text
    assert parse_expression(f"a:{text}+b")[0].weight == weight


def test_an_expression_without_terms_is_the_base():
    assert format_expression([]) == "base"
    assert format_expression([Term(Reference("a")), Term(Reference("b", 2), -0.5)]) == "a+b@2:-0.5"


def test_long_input_takes_no_time():
    with pytest.raises(Usage):
        parse_expression("a:" + "1" * 200_000 + "x")
    assert len(parse_expression("+".join(["a"] * 20_000))) == 20_000


def test_what_a_stack_computes_is_written_as_one_writes_it():
    assert format_sum([]) == "W = W_base"
    assert format_sum([("style", 0.7), ("tone", -1), ("x", -2)]) == "W = W_base + 0.7·ΔW_style - ΔW_tone - 2·ΔW_x"
    assert format_sum([("style", 0.7), ("tone", -1)], "ties") == "W = W_base + ties(0.7·ΔW_style - ΔW_tone)"
    assert format_sum([("style", -1), ("tone", 1)], "ties") == "W = W_base + ties(- ΔW_style + ΔW_tone)"
