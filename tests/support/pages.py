"""What the tests of the documentation share: pages, their blocks of code, the public names."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastseq
from tools.public import INTERNAL

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"<!-- setup\n(.*?)-->|^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    """The Python of a page in its order, comments that begin with ``setup`` included."""
    return [hidden or shown for hidden, shown in BLOCK.findall(page.read_text(encoding="utf-8"))]


def public_modules(package: Any = fastseq) -> Iterator[Any]:
    """fastseq and every module below it that users import; of those that stand on a package that is not installed nothing."""
    yield package
    for found in pkgutil.iter_modules(package.__path__):
        if found.name.startswith("_") or found.name in INTERNAL:
            continue
        try:
            module = importlib.import_module(f"{package.__name__}.{found.name}")
        except ImportError as missing:
            if (missing.name or "").startswith("fastseq"):
                raise
            continue
        # of a package the names that it exports are public, not its modules, but for those that are there to be imported alone
        yield from public_modules(module) if found.name in ("integrations", "models") else (module,)


def public_names(module: Any) -> list[str]:
    """``__all__``, or what a module without one defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def parameters(function: Any) -> list[str]:
    """Names of the parameters, but for ``self`` and ``**options`` without a name of their own."""
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
