"""Strict YAML: what people mean, errors that point at the place, nothing that executes or explodes."""

import math
import subprocess
import sys
from typing import Annotated, Literal

import msgspec
import pytest

from stackctl.core.errors import NotFound, Usage
from stackctl.core.schema import Adapter, Stack
from stackctl.core.train_job import Recipe
from stackctl.storage.yaml_files import convert, read_text, read_yaml
from stackctl.storage.yaml_text import format_yaml, parse_yaml


def parse(text):
    return parse_yaml(text, "f.yaml").value


def refusal(text, type_=None, schema=None):
    with pytest.raises(Usage) as caught:
        document = parse_yaml(text, "f.yaml")
        if type_:
            convert(document, type_, schema=schema)
    assert caught.value.exit_code == 2
    return caught.value


WORDS = ["on", "yes", "no", "off", "y", "n", "On", "YES", "No", "OFF"]


@pytest.mark.parametrize("word", WORDS)
def test_words_are_words(word):
    assert parse(f"{word}: {word}") == {word: word}
    assert parse(f"a: [{word}]") == {"a": [word]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("2e-4", 2e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("+3", 3), ("007", 7),
        ("true", True), ("False", False), ("TRUE", True), ("null", None), ("~", None), ("", None),
        ("1_000", "1_000"), ("0x10", "0x10"), ("0o17", "0o17"), ("12:30:00", "12:30:00"), ("2001-01-01", "2001-01-01"),
        ("1.2.3", "1.2.3"), ("e5", "e5"), (".", "."), ("=", "="), ("<<", "<<"), ("nan", "nan"), ("inf", "inf"),
        (".inf", math.inf), ("-.inf", -math.inf), ("٣", "٣"), ("1²", "1²"), ("tRue", "tRue"),
        ("1e999", "1e999"), ("9" * 400 + ".0", "9" * 400 + ".0"), ("9" * 60, int("9" * 60)), ("9" * 5000, "9" * 5000),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_plain_scalars(text, value):
    found = parse(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


def test_quoted_scalars_are_text():
    assert parse("a: '1'\nb: \"true\"\nc: ''\nd: |\n  null\ne: >\n  1\n") == {
        "a": "1", "b": "true", "c": "", "d": "null\n", "e": "1\n",
    }  # fmt: skip


def test_keys_are_text():
    assert parse("1: a\ntrue: b\nnull: c\n~: d\n1e-5: e\n") == {
        "1": "a",
        "true": "b",
        "null": "c",
        "~": "d",
        "1e-5": "e",
    }


def test_signs_inside_text_are_no_indirection():
    assert parse("a: R&D!\nb: 'x & *y !z'\nc: a*b\n") == {"a": "R&D!", "b": "x & *y !z", "c": "a*b"}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1"),
        ("a: 1\n'a': 2\n", "line 2, column 1"),
        ("a:\n  b: 1\n  c: {d: 1, d: 2}\n", "line 3, column 13"),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", "line 2, column 4"),
        ("a: !!str 1\n", "line 1, column 4"),
        ("a: !x 1\n", "line 1, column 4"),
        ("!x a: 1\n", "line 1, column 1"),
        ("a: ! b\n", "line 1, column 4"),
        ("a: 1\nb: &x [1]\n", "line 2, column 4"),
        ("&x a: 1\n", "line 1, column 1"),
        ("a: *x\n", "line 1, column 4"),
        ("? [a]\n: 1\n", "line 1, column 3"),
        ("{a: 1}: 2\n", "line 1, column 1"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1"),
        ("---\na: 1\n--- \n", "line 3, column 1"),
        ("a: [1, 2\n", "line 2"),
        ("a: 1\n\tb: 2\n", "line 2"),
        ("a: b: c\n", "line 1, column 5"),
        ("a: 1\n b: 2\n", "line 2"),
        ("a: 'x\n", "line 2"),
        ("a: 1\nb: x\0y\n", "line 2"),
        ("a: 1\nb: x\x07y\n", "line 2"),
        ("é: 1\né2: é\nb: \x1b[31m\n", "line 3"),
        ("a: @x\n", "line 1, column 4"),
        ("a: \ud800\n", "line 1"),
        ('a: "\\ud800"\n', "line 1"),
        ('a: "\\q"\n', "line 1"),
    ],
)
def test_what_is_refused_is_refused_at_its_place(text, place):
    assert f"f.yaml, {place}" in refusal(text).message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\n<<<<<<< HEAD\nb: 2\n=======\nb: 3\n>>>>>>> other\n", 2),
        ("<<<<<<< HEAD\nb: 2\n=======\nb: 3\n>>>>>>> other\n", 1),
        ("a:\n  b: 1\n<<<<<<< HEAD\n  c: 2\n=======\n  c: 3\n>>>>>>> other\n", 3),
        ("versions:\n<<<<<<< HEAD\n- a: 2\n=======\n- a: 3\n>>>>>>> other\n", 2),
    ],
)
def test_a_merge_conflict_is_called_by_its_name(text, line):
    error = refusal(text)
    assert "merge conflict" in error.message
    assert f"line {line}" in error.message


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n", "\ufeff", "null\n"])
def test_nothing_is_none(text):
    assert parse(text) is None
    assert "mapping" in refusal(text, Recipe).message


def test_one_document_may_be_marked():
    assert parse("%YAML 1.2\n---\na: 1\n...\n") == {"a": 1}


def test_deep_nesting_neither_crashes_nor_hangs():
    """In a process of its own, since libyaml's composer overflows the C stack: 100,000 brackets are a segfault."""
    program = (
        "from stackctl.storage.yaml_text import parse_yaml; from stackctl.core.errors import Usage\n"
        "for opening in ('[', '{a: ', '- ', '? ', '[{a: ', '{? ', '{'):\n"
        "  for close in ('', ']' * 100_000):\n"
        "    try: parse_yaml(opening * 100_000 + close, 'f')\n"
        "    except Usage: print('refused', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused\n" * 14), done.stderr[-500:]


def test_nesting_that_people_write_is_read():
    assert parse("[" * 40 + "]" * 40)


def test_an_alias_bomb_is_refused_before_it_grows():
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    assert "f.yaml, line 1, column 4" in refusal(bomb).message


def test_marks_point_at_values_and_collections_at_their_keys():
    marks = parse_yaml("a: 1\nb:\n  c: [x, y]\nd:\n- 5\n", "f").marks
    assert marks[("a",)] == (1, 4)
    assert marks[("b",)] == (2, 1)
    assert marks[("b", "c")] == (3, 3)
    assert marks[("b", "c", 1)] == (3, 10)
    assert marks[("d", 0)] == (5, 3)


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    rank: Annotated[int, msgspec.Meta(ge=1)] = 1
    target_modules: list[str] | str = "all-linear"


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    kind: Literal["a", "b"] = "a"
    inner: Inner | None = None
    many: list[Inner] = []
    by_name: dict[str, Inner] = {}
    schema: int = 1


@pytest.mark.parametrize(
    ("text", "place", "near"),
    [
        ("nmae: x\nname: y\n", "line 1, column 7", "name"),
        ("name: x\ninner:\n  rnak: 3\n", "line 3, column 9", "rank"),
        ("name: x\nmany:\n- rank: 1\n- {rank: 1, target_module: q}\n", "line 4, column 28", "target_modules"),
        ("name: x\nby_name:\n  s: {rank: 2}\n  t: {rank: 1, rnak: 3}\n", "line 4, column 22", "rank"),
        ("name: x\nby_name:\n  s:\n    rank: 2\n  t.u:\n    rnk: 3\n", "line 6, column 10", "rank"),
        ("name: x\niner:\n  rank: 3\n", "line 2, column 1", "inner"),
    ],
)
def test_an_unknown_key_names_the_nearest_at_its_place(text, place, near):
    error = refusal(text, Outer)
    assert f"f.yaml, {place}" in error.message
    assert f"did you mean '{near}'?" in error.hint


def test_an_unknown_key_that_resembles_none_lists_what_there_is():
    error = refusal("name: x\nzzz: 1\n", Outer)
    assert "did you mean" not in error.hint
    assert "by_name" in error.hint


@pytest.mark.parametrize(
    ("text", "place", "path"),
    [
        ("name: 5\n", "line 1, column 7", "name"),
        ("name: x\nkind: c\n", "line 2, column 7", "kind"),
        ("name: x\ninner:\n  rank: 0\n", "line 3, column 9", "inner.rank"),
        ("name: x\ninner:\n  rank: '3'\n", "line 3, column 9", "inner.rank"),
        ("name: x\ninner:\n  target_modules: [q, 5]\n", "line 3, column 23", "inner.target_modules.1"),
        ("name: x\nmany: [{rank: 1}, {rank: x}]\n", "line 2, column 26", "many.1.rank"),
        ("name: x\nby_name:\n  s: {rank: 2}\n  t: {rank: 0}\n", "line 4, column 13", "by_name.t.rank"),
        ("name: x\nby_name: {s: 3}\n", "line 2, column 14", "by_name.s"),
        ("name: x\nby_name: {'[...]': {rank: 0}}\n", "line 2, column 27", "by_name.[...].rank"),
        ("name: x\nby_name: [1]\n", "line 2, column 1", "by_name"),
        ("kind: a\n", "line 1, column 1", ""),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_place(text, place, path):
    message = refusal(text, Outer).message
    assert f"f.yaml, {place}: {path}" in message


@pytest.mark.parametrize(
    ("text", "place"), [("schema: 2\nname: x\n", "line 1, column 9"), ("name: x\nschema: 'a'\n", "line 2, column 9")]
)
def test_another_schema_is_refused_at_its_place(text, place):
    assert place in refusal(text, Outer, schema=1).message


@pytest.mark.parametrize(
    "text", ["name: x\n", "name: x\nschema: true\n", "name: x\nschema: '1'\n", "name: x\nschema:\n"]
)
def test_a_schema_must_be_given(text):
    refusal(text, Outer, schema=1)


def test_a_newer_schema_asks_for_a_newer_program():
    assert "upgrade" in refusal("schema: 2\nname: x\n", Outer, schema=1).hint


@pytest.mark.parametrize("weight", [".inf", "-.inf", ".nan", "1e400", "'1'"])
def test_a_stored_weight_is_a_finite_number(weight):
    text = (
        "schema: 1\nname: s\nbase: b\nfingerprint: f\ncreated: c\nmembers:\n"
        f"- {{adapter: a, version: 1, digest: d, weight: {weight}}}\n"
    )
    assert "line 7" in refusal(text, Stack, schema=1).message


@pytest.mark.parametrize("key", ["learning_rate", "epochs", "alpha", "weight_decay", "warmup"])
@pytest.mark.parametrize("value", [".inf", ".nan", "1e999"])
def test_settings_are_finite_numbers(key, value):
    assert "line 3" in refusal(f"train:\n  style:\n    {key}: {value}\n", Recipe).message


def test_a_recipe_as_people_write_it():
    text = (
        "base: smollm2\ntrain:\n  style:    {data: a.jsonl, rank: 16, epochs: 3}\n"
        "  instruct: {on: style, data: b.jsonl, learning_rate: 1e-5}\nstacks:\n  storyteller: style+instruct\n"
    )
    recipe = convert(parse_yaml(text, "f"), Recipe)
    assert recipe.train["instruct"].on == "style"
    assert recipe.train["instruct"].learning_rate == 1e-5


def test_files_with_a_byte_order_mark_and_crlf(tmp_path):
    path = tmp_path / "ü x.yaml"
    path.write_bytes("\ufeffname: x\r\ninner:\r\n  rank: 3\r\n".encode())
    assert read_yaml(path, Outer).inner.rank == 3
    path.write_bytes(b"name: x\r\ninner:\r\n  rnak: 3\r\n")
    with pytest.raises(Usage) as caught:
        read_yaml(path, Outer)
    assert f"{path}, line 3, column 9" in caught.value.message


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(NotFound):
        read_text(tmp_path / "nothing")
    with pytest.raises(Usage):
        read_text(tmp_path)
    for data in (b"\xff\xfe\x00", "a: ä".encode("latin-1"), "a: 1".encode("utf-16")):
        (tmp_path / "f").write_bytes(data)
        with pytest.raises(Usage):
            read_yaml(tmp_path / "f", Outer)
    (tmp_path / "f").write_bytes(b"name: x\nkind: \0\n")
    with pytest.raises(Usage) as caught:
        read_yaml(tmp_path / "f", Outer)
    assert "line 2" in caught.value.message


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    with (tmp_path / "f").open("wb") as stream:
        stream.truncate(65 << 20)
    with pytest.raises(Usage):
        read_text(tmp_path / "f")


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_survives(value):
    assert parse(format_yaml({"a": value})) == {"a": value}


def test_nan_survives():
    assert math.isnan(parse(format_yaml({"a": math.nan}))["a"])


def test_a_file_name_that_is_not_unicode_leaves_the_file_readable():
    text = format_yaml({"path": "caf\udce9.jsonl", "b": 1})
    text.encode()
    assert parse(text) == {"path": "caf\ufffd.jsonl", "b": 1}


def test_order_and_words_are_kept_in_writing():
    text = format_yaml({"z": "on", "a": "1e-5", "m": [1e-5, "yes", True, None, "null"]})
    assert list(parse(text)) == ["z", "a", "m"]
    assert text.splitlines()[0] == "z: on"


def test_a_missing_key_is_named():
    assert "the key 'versions' is missing" in refusal("schema: 1\nname: x\n", Adapter, schema=1).message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("scheduler: slow", "expected 'linear', 'cosine', 'constant' or 'constant_with_warmup', got 'slow'"),
        ("batch_size: many", "expected a whole number or 'auto', got 'many'"),
        ("batch_size: 2.5", "expected a whole number or 'auto', got a number"),
        ("frozen: [fold]", "expected 'auto', 'fold' or 'live', got a list"),
    ],
)
def test_the_words_that_a_key_takes_are_named(line: str, said: str) -> None:
    assert refusal(f"train:\n  style: {{{line}}}\n", Recipe).message.endswith(f"{line.partition(':')[0]}: {said}")


@pytest.mark.parametrize(
    ("line", "place", "what"),
    [
        ("version: one", "line 5, column 12", "versions.0.version: expected a whole number, got text"),
        ("verison: 1", "line 5, column 12", "unknown key 'verison'"),
        ("version: 1\n  version: 1", "line 6, column 3", "the key 'version' stands twice"),
        ("version: -1", "line 5, column 12", "versions.0.version: expected a whole number >= 0"),
    ],
)
def test_what_is_as_stackctl_writes_it_and_wrong_is_named_with_its_place(tmp_path, line, place, what):
    path = tmp_path / "style.yaml"
    path.write_text(f"schema: 1\nname: style\ndescription: ''\nversions:\n- {line}\n  digest: sha256:0\n")
    with pytest.raises(Usage) as caught:
        read_yaml(path, Adapter, schema=1)
    assert caught.value.message == f"{path}, {place}: {what}"


def test_everything_that_does_not_fit_is_named_at_once():
    found = refusal(
        "base: tiny\ntrian: 5\ntrain:\n  a: {data: x, rank: -3, learning_rat: 1, target_modules: [1, 2]}\n"
        "  b: {on: a, epochs: many}\nstacks: {s: 5}\npush: {stack: s}\n",
        Recipe,
    )
    lines = [problem.partition(",")[2].partition(",")[0].strip() for problem in found.message.split("; ")]
    assert lines == ["line 2", "line 4", "line 4", "line 4", "line 5", "line 6", "line 7"]
    for word in ("trian", "a.rank", "learning_rat", "target_modules", "b.epochs", "stacks.s", "repo"):
        assert word in found.message
    assert "'train'" in found.hint
    assert "'learning_rate'" in found.hint


def test_a_field_that_is_wrong_is_not_missing_too():
    found = refusal("schema: 1\nname: 5\nversions: [{version: x}]\n", Adapter, schema=1)
    assert "missing" not in found.message.partition("versions")[0]
    assert found.message.count("f.yaml") == 2


def test_of_many_problems_the_first_are_named():
    text = "train:\n" + "".join(f"  a{n}: {{rank: -1}}\n" for n in range(1000))
    assert refusal(text, Recipe).message.count("rank") == 10
