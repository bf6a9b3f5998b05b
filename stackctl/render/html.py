"""Self-contained HTML pages: one file, no network, no script, light and dark. jinja2 is imported when one is made.

A page is a template of ``templates/`` that extends ``shell.html``. Everything that is put into it is escaped; nothing
in it can load, send or run anything (the content security policy of the shell forbids it).
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackctl import __version__
from stackctl.core.errors import StackctlError, Usage, attempt, raise_all
from stackctl.storage import atomic
from stackctl.storage.paths import check_output

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).with_name("templates")


def check_page_place(path: Path) -> None:
    """Where a page is to go is known to be possible before anything is computed.

    Raises:
        StackctlError: everything that is wrong with it, at once.
    """
    problems: list[StackctlError] = []
    if path.suffix.lower() not in (".html", ".htm"):
        problems.append(Usage(f"--output {path} is not the name of a page", hint="name a file that ends with .html"))
    attempt(problems, check_output, path)
    raise_all(problems)


def render_page(template: str, *, title: str, **values: Any) -> str:
    """A whole page of ``templates/<template>``, with the values that it names.

    Raises:
        jinja2.UndefinedError: the template names a value that was not given.
    """
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    page = templates(_TEMPLATES, escapes=True).get_template(template)
    return page.render(title=title, version=__version__, made=made, **values)


def write_page(path: Path, html: str) -> None:
    """Write a page, whole or not at all. What no text can hold (NUL, half a pair of surrogates) is a question mark.

    Raises:
        OSError: as for any file.
    """
    atomic.write_output(path, html.replace("\0", "?").encode("utf-8", "replace"))


@functools.cache
def templates(folder: Path, *, escapes: bool) -> Environment:
    """The templates of a folder. ``escapes``: what is put into them is escaped for HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, autoescape=escapes, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=not escapes,
    )  # fmt: skip
