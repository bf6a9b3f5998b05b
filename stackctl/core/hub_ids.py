"""What the id of a repository on the Hub is: ``owner/name``, of a data set with the name of a split behind a colon.

The rules are huggingface_hub's own (``huggingface_hub.utils.validate_repo_id``), whose import takes longer than
a light command may. A test compares the two.
"""

from __future__ import annotations

import re

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_DATASET = re.compile(r"(?P<id>[^:]+)(?::(?P<split>[\w.\[\]:%+-]+))?", re.ASCII)
_FILE = re.compile(
    r".*\.(jsonl|json|parquet|txt|csv|tsv|jsonlines|ndjson|arrow|gz|zst|bz2|xz|zip|yaml|yml|md|xlsx)", re.IGNORECASE
)
"""``data/chat.jsonl`` could be both; what ends like this means a file."""

_NO_REF = re.compile(r"[\0-\x20\x7f~^:?*\[\\]|\.\.|@\{")


def is_hub_id(text: str) -> bool:
    """Whether a text is ``owner/name`` as the Hub allows it."""
    return bool(_ID.fullmatch(text)) and "--" not in text and ".." not in text and not text.endswith(".git")


def is_ref_name(text: str) -> bool:
    """Whether git, and so the Hub, lets a branch or a tag have a name (``git check-ref-format --branch``)."""
    parts = text.split("/")
    return (
        not _NO_REF.search(text)
        and text != "@"
        and not text.startswith("-")
        and all(part and not part.startswith(".") and not part.endswith((".", ".lock")) for part in parts)
    )


def is_dataset_id(text: str) -> bool:
    """Whether a text is a data set's id on the Hub: ``owner/name``, or ``squad`` as the oldest are called."""
    return is_hub_id(text if "/" in text else f"datasets/{text}")


def parse_dataset_id(text: str) -> tuple[str, str | None] | None:
    """A data set on the Hub and its split (None: not given), of ``owner/name`` or ``owner/name:split``.

    None for all else, among it what ends as a file does.
    """
    found = _DATASET.fullmatch(text)
    if found is None or not is_hub_id(found["id"]) or _FILE.fullmatch(found["id"]):
        return None
    return found["id"], found["split"]
