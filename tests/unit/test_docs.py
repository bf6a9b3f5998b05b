"""The documentation holds: links lead somewhere, commands are commands, and no page speaks of one machine."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from stackctl.cli import make_app

ROOT = Path(__file__).parent.parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "cli.md"]
"""All but the generated page, which has a check of its own."""
README_LINES = 150
COLUMNS = 120

_FENCE = re.compile(r"^(?P<fence>```+)[^\n]*\n(?P<body>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_INLINE = re.compile(r"(?<!`)`(?P<command>stackctl [^`]+)`(?!`)")
_TEST = re.compile(r"`(?P<path>tests/[\w/]+\.py)(?:::(?P<name>\w+))?`")
_MACHINE = (
    re.compile(r"(?<![\w.~/-])/(?:home|root|work|tmp|Users|opt|mnt|var|usr|data|srv|etc)/"),
    re.compile(r"\b[A-Z]:\\"),
    re.compile(r"\bpypi\.org|pythonhosted|conda\.anaconda|registry\.npmjs|crates\.io|\blocalhost\b", re.IGNORECASE),
    re.compile(r"\b(?!127\.0\.0\.1\b)\d{1,3}(?:\.\d{1,3}){3}\b"),  # which every machine is to itself
)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return _FENCE.sub("", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", without_code(read(page)), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


def test_there_are_pages() -> None:
    assert ROOT / "README.md" in PAGES
    assert len(PAGES) > 20


@pages
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    dead = []
    for match in _LINK.finditer(without_code(read(page))):
        target, _, anchor = match["target"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        there = (page.parent / target).resolve() if target else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(match["target"])
    assert not dead


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app() -> Any:
    return typer.main.get_command(make_app())


def command_lines(text: str) -> Iterator[str]:
    """Every line of a fenced block that begins with ``stackctl``, continued lines joined."""
    for block in _FENCE.finditer(text):
        for line in re.sub(r"\\\n\s*", " ", block["body"]).splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("stackctl "):
                yield line


def find_command(app: Any, words: list[str]) -> tuple[Any, list[str]]:
    """The command that some words call, and the words that are left."""
    while words and hasattr(app, "commands") and words[0] in app.commands:
        app, words = app.commands[words[0]], words[1:]
    return app, words


def check_line(app: Any, line: str) -> None:
    """Parse a command line as the command itself would; nothing is run."""
    words = shlex.split(line, comments=True)[1:]
    words = list(itertools.takewhile(lambda word: word not in ("|", ">", "&&"), words))
    if words == ["--version"]:
        return
    command, left = find_command(app, words)
    assert not hasattr(command, "commands"), f"no such command: {line}"
    command.make_context(line, left)


def test_commands_in_blocks_are_commands(app: Any) -> None:
    wrong, seen = [], 0
    for page in WRITTEN:
        for line in command_lines(read(page)):
            seen += 1
            try:
                check_line(app, line)
            except Exception as error:
                wrong.append(f"{page.relative_to(ROOT)}: {line}: {error}")
    assert not wrong, "\n".join(wrong)
    assert seen > 50


def test_commands_in_sentences_have_the_options_they_name(app: Any) -> None:
    wrong = []
    for page in PAGES:
        for match in _INLINE.finditer(without_code(read(page))):
            line = " ".join(match["command"].split())
            command, left = find_command(app, line.split()[1:])
            known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
            unknown = [word for word in left if word.startswith("-") and word.partition("=")[0] not in known]
            if unknown or (command is app and not set(left[:1]) & known):
                wrong.append(f"{page.relative_to(ROOT)}: {line}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "stackctl trian style",
        "stackctl train style --epoch 3",
        "stackctl base remove x",
        "stackctl compose",
        "stackctl train style --rank many",
        "stackctl export x --format onnx",
    ],
)
def test_a_wrong_line_would_be_found(app: Any, line: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 (the parser's own, or the assertion)
        check_line(app, line)


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_the_tests_that_the_pages_name_exist() -> None:
    wrong = []
    for page in PAGES:
        for match in _TEST.finditer(read(page)):
            file = ROOT / match["path"]
            if not file.is_file() or (match["name"] and f"def {match['name']}(" not in read(file)):
                wrong.append(f"{page.relative_to(ROOT)}: {match[0]}")
    assert not wrong, "\n".join(wrong)


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\((\d{4}-[\w-]+\.md)\)", read(folder / "README.md")))
    assert listed == {page.name for page in folder.glob("[0-9]*.md")}


def test_the_readme_is_short_and_shows_the_path() -> None:
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= README_LINES
    assert "make demo" in text
    assert "make test" in text


def typed(page: Path) -> list[list[str]]:
    """The words of every command that a page shows, in order, without what is said about it."""
    blocks = re.findall(r"^```(sh|console)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)
    lines = [
        line.removeprefix("$ ")
        for language, body in blocks
        for line in body.replace("\\\n", " ").splitlines()
        if language == "sh" or line.startswith("$ ")
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_chinese_readme_keeps_in_step() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    assert typed(chinese) == typed(english)
    assert len(typed(english)) > 8
    assert len(read(chinese).splitlines()) <= README_LINES
    links = [{m["target"] for m in _LINK.finditer(read(page))} for page in (english, chinese)]
    assert links[0] - {chinese.name} == links[1] - {english.name, f"{english.name}#the-code"}


def test_the_tree_of_the_code_names_what_is_there() -> None:
    tree = re.search(r"^```\n(stackctl/\n.*?)^```$", read(ROOT / "README.md"), re.MULTILINE | re.DOTALL)
    assert tree
    floor, seen = ROOT / "stackctl", 0
    for line in tree[1].splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split()
        place = {0: ROOT, 2: floor, 4: floor / "engine"}[indent]
        for name in names:
            seen += 1
            assert (place / name).is_dir() if name.endswith("/") else (place / f"{name}.py").is_file(), name
    assert seen > 20


def test_the_map_lists_the_rooms_in_the_order_that_import_linter_holds() -> None:
    rooms = re.findall(r"^\| `stackctl/([a-z]+)/`", read(ROOT / "AGENTS.md"), re.MULTILINE)
    assert sorted(rooms) == sorted(file.parent.name for file in ROOT.glob("stackctl/*/__init__.py"))
    contracts = tomllib.loads(read(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layer = {room: i for i, line in enumerate(contracts[0]["layers"]) for room in line.split(" | ")}
    assert [layer[room] for room in rooms] == sorted(layer.values(), reverse=True)


@pytest.mark.parametrize("page", ["AGENTS.md", "docs/contributing.md"])
def test_every_file_that_a_map_names_is_there(page: str) -> None:
    named = set(re.findall(r"`([\w.-]+/[\w./-]*|[\w-]+\.(?:md|toml|py))`", read(ROOT / page)))
    engine = ROOT / "stackctl" / "engine"
    places = [ROOT, ROOT / "stackctl", ROOT / "tests" / "integration", engine, *engine.rglob("*/")]
    lost = {name for name in named if not any((place / name).exists() for place in places)}
    assert {name for name in lost if "NAME" not in name} <= {"utils.py"}, "there is no utils.py, as the page says"
    assert len(named) > 10


@pytest.mark.parametrize("page", ["AGENTS.md", "docs/contributing.md", "docs/explanation/one-run.md"])
def test_every_class_and_constant_that_a_map_names_is_there(page: str) -> None:
    code = "\n".join(read(file) for file in (ROOT / "stackctl").rglob("*.py"))
    named = set(re.findall(r"`(_*[A-Z][A-Z_]{3,}|[A-Z][a-z]+[A-Z]\w+)`", without_code(read(ROOT / page))))
    assert not {name for name in named if not re.search(rf"^ *(class )?{name}\b", code, re.MULTILINE)}


def test_the_page_on_security_names_functions_that_are_there() -> None:
    named = set(re.findall(r"^\| .*? \| (`.*?`) \|", read(ROOT / "docs" / "explanation" / "security.md"), re.MULTILINE))
    names = [name for cell in named for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", cell)]
    for name in names:
        *module, last = name.split(".")
        place = ROOT / "stackctl" / Path(*module)
        if not (place / last).is_dir() and not (place / f"{last}.py").is_file():
            assert re.search(rf"^(def |class |){last}\b", read(place.with_suffix(".py")), re.MULTILINE), name
    assert len(names) > 20


_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


def stale_roles(file: Path, text: str) -> list[str]:
    """What docstrings refer to that is not there: neither by its module, nor by a word of the same file."""
    code, stale = _ROLE.sub("", text), []
    for role in _ROLE.findall(text):
        module, names = ROOT, role.split(".")
        while names and ((module / names[0]).is_dir() or (module / f"{names[0]}.py").is_file()):
            module /= names.pop(0)
        source = code if module == ROOT else "" if module.is_dir() else read(module.with_suffix(".py"))
        if not all(re.search(rf"\b{name}\b", source) for name in names):
            stale.append(f"{file.name}: {role}")
    return stale


def test_docstrings_refer_to_what_is_there() -> None:
    files = sorted((ROOT / "stackctl").rglob("*.py"))
    assert not [stale for file in files for stale in stale_roles(file, read(file))]
    gone = ":func:`gone`", ":class:`stackctl.plan.gone.StackPlan`", ":class:`~stackctl.plan.stack_plan.Gone`"
    assert len(stale_roles(Path("x.py"), " ".join(gone))) == 3


@pages
def test_no_page_speaks_of_one_machine(page: Path) -> None:
    text = read(page)
    assert not [match[0] for pattern in _MACHINE for match in pattern.finditer(text)]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_fit(page: Path) -> None:
    assert not [line for line in read(page).splitlines() if len(line) > COLUMNS]


def test_every_page_is_in_the_site_and_on_its_home_page() -> None:
    docs = ROOT / "docs"
    pages = {str(page.relative_to(docs)) for page in docs.rglob("*.md") if not re.match(r"\d", page.name)}
    listed = set(re.findall(r'= "([\w/-]+\.md)"', read(ROOT / "zensical.toml")))
    assert listed == pages
    assert set(re.findall(r"\(([\w/-]+\.md)\)", read(docs / "index.md"))) == pages - {"index.md"}
