"""The API reference is complete: every public name has a page, every argument a description."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

import fastseq
from support.pages import DOCS, parameters, public_modules, public_names
from tools.public import OWN_PAGES

REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
# A docstring may leave arguments to another one, which it names.
ELSEWHERE = re.compile(r"(?:as|of|takes?|in) (?:those )?(?:of )?(?::\w+:)?``?([\w.]+)``?")
SIGNATURES = list(
    {
        id(thing): (f"{module.__name__}.{name}", thing)
        for module in public_modules()
        for name in public_names(module)
        if callable(thing := getattr(module, name)) and not isinstance(thing, type(Any))
    }.values()
)


def on_a_page(module: str, name: str) -> bool:
    """As an entry of its own, with all of its module, or by the package that exports it."""
    if module == "fastseq":
        return bool(re.search(rf"^\.\. auto(class|function):: {name}$", REFERENCE, re.MULTILINE))
    package = module.rpartition(".")[0]
    entries = [f"automodule:: {module}", f"public-modules:: {module}"]
    entries += [f"public-modules:: {package}"] if module.removeprefix("fastseq.") not in OWN_PAGES else []
    if any(f".. {entry}\n" in REFERENCE for entry in entries):
        return True
    return package != "fastseq" and name in public_names(importlib.import_module(package)) and on_a_page(package, name)


def test_every_public_name_has_a_page():
    values = {"__version__", "functional"}  # a number, and a module with a page of its own
    missing = [
        f"{module.__name__}.{name}"
        for module in public_modules()
        for name in public_names(module)
        if name not in values and not on_a_page(module.__name__, name)
    ]
    assert not missing, f"docs/api has no entry for {', '.join(missing)}"


def described(docstring: str, name: str) -> bool:
    """Whether an Args or Attributes section of a docstring has an entry for an argument, alone or beside others."""
    sections = re.findall(r"^ *(?:Args|Attributes):\n((?:[ \t]+.*\n|\n)+)", docstring + "\n", re.MULTILINE)
    entries = [entry for section in sections for entry in re.findall(r"^ *((?:\*{0,2}\w+, )*\*{0,2}\w+):", section, re.MULTILINE)]
    return any(name in re.split(r"[ ,*]+", entry) for entry in entries)


def named(path: str, near: Any) -> Any:
    """What a docstring names: by its full name, or as it is called in the module of the one that names it."""
    for start in ("", f"{near.__module__}.", f"{near.__module__.rpartition('.')[0]}.", "fastseq.", "fastseq.functional."):
        module, _, rest = (start + path).partition(".")
        try:
            found: Any = importlib.import_module(module)
            for part in rest.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError):
            continue
        if callable(found):
            return found
    return None


def undescribed(thing: Any, names: list[str], seen: tuple[Any, ...] = ()) -> list[str]:
    text = inspect.getdoc(thing) or ""
    left = [name for name in names if not described(text, name)]
    for path in ELSEWHERE.findall(text) if left else ():
        other = named(path, thing)
        if other is not None and other is not thing and other not in seen:
            left = undescribed(other, left, (*seen, thing))
    return left


@pytest.mark.parametrize("name, thing", SIGNATURES, ids=[name for name, _ in SIGNATURES])
def test_every_argument_is_described(name, thing):
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if isinstance(thing, type):
        maker = next(base for base in thing.__mro__ if "__init__" in vars(base) or "__new__" in vars(base))
        if not maker.__module__.startswith("fastseq") or issubclass(thing, tuple):
            return  # its arguments are those of another package; or it is a state, which calls make
    assert not (missing := undescribed(thing, parameters(thing))), f"the docstring of {name} says nothing of {', '.join(missing)}"
    if isinstance(thing, type) and "forward" in vars(thing):
        text = inspect.getdoc(thing.forward) or ""
        left = undescribed(thing.forward, [given for given in parameters(thing.forward) if not re.search(rf"\b{given}\b", text)])
        assert not left, f"the docstring of {name}.forward says nothing of {', '.join(left)}"


def test_a_lack_is_seen():
    def one(given: int, other: int) -> None:
        """Does.

        Args:
            given: a number.
        """

    def two(given: int) -> None:
        """Does the same. Arguments are those of `fastseq.functional.scan`."""

    assert undescribed(one, parameters(one)) == ["other"]
    assert undescribed(two, ["b", "given"]) == ["given"]
    assert not on_a_page("fastseq", "LSTMs") and on_a_page("fastseq", "LSTM")
    assert sorted(fastseq.__all__) == public_names(fastseq)
