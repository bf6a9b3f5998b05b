"""Files of data by their bytes: one file, or a folder of texts."""

from __future__ import annotations

from pathlib import Path

from stackctl.storage.hashes import sha256_bytes, sha256_file

TEXTS = (".txt", ".md", ".markdown", ".rst", ".text")
"""How the names of texts end that are read from a folder."""


def texts_in(folder: Path) -> list[Path]:
    """The texts in a folder and below it, by name."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in TEXTS and p.is_file())


def data_digest(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes, or of the names and bytes of a folder's texts."""
    if not path.is_dir():
        return sha256_file(path)
    parts = [f"{text.relative_to(path).as_posix()} {sha256_file(text)}" for text in texts_in(path)]
    return sha256_bytes("\n".join(parts).encode())
