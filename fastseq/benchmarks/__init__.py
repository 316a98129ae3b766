"""The benchmark, ``python -m fastseq bench``. In a checkout they are in the folder ``benchmarks/``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from fastseq import _checkout

__path__ = _checkout.extend(__path__, "benchmarks")

# Messages name packages that exist; the extras of pyproject.toml are for those who install fastseq.
NEEDS = ("jinja2", "matplotlib", "numpy", "psutil", "rich")  # the extra `bench` of pyproject.toml


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark's command line (``cli.py``), or say which packages it lacks and how to get them."""
    missing = [name for name in NEEDS if not _importable(name)]
    if missing:
        raise SystemExit(f"error: the benchmark needs {', '.join(missing)}; run: pip install {' '.join(missing)}")
    from .cli import main as run

    return run(argv)


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # an entry of sys.modules that is no module
        return False
