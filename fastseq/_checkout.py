"""Folders that lie beside `fastseq/` in a checkout and inside it in a wheel."""

from __future__ import annotations

from pathlib import Path


def extend(search_path: list[str], name: str) -> list[str]:
    """`search_path` (a package's `__path__`), plus the top-level folder `name` when run from a checkout.

    The folder itself has no `__init__.py`: with one, every Python started in the checkout would find `name`
    as a top-level package, in front of an installed package of that name.
    """
    root = Path(__file__).resolve().parent.parent
    folder = root / name
    if (root / "setup.py").is_file() and (root / "csrc").is_dir() and folder.is_dir():
        return [*search_path, str(folder)]
    return search_path
