"""The documentation site. `make docs` builds it into build/docs; every warning is an error."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])  # of the notebook's kernel

import fastseq  # noqa: E402
from tools.public import INTERNAL, OWN_PAGES  # noqa: E402

project = "fastseq"
copyright = "the fastseq authors"
version = release = fastseq.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]
suppress_warnings = ["toc.not_included"]  # a page may be reached by links alone
html_theme = "furo"
html_title = f"fastseq {release}"
html_show_sphinx = False
pygments_style, pygments_dark_style = "friendly", "native"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # of the notebook alone: other pages have no cells
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

default_role = "py:obj"  # what stands in single backquotes in a docstring: a link where it names something public
autodoc_typehints = "none"  # docstrings say more than the types do, and overloads hide the defaults
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": False}
python_maximum_signature_line_length = 100
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
add_module_names = False


def public_modules(package: str) -> list[str]:
    """Modules directly below a package that users import, in alphabetical order; of fastseq itself those without a page."""
    folder = Path(fastseq.__file__).parent.joinpath(*package.split(".")[1:])
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if not module.name.startswith("_"))
    hidden = INTERNAL | OWN_PAGES if package == "fastseq" else INTERNAL
    return [f"{package}.{name}" for name in names if name not in hidden]


class PublicModules(SphinxDirective):
    """``.. public-modules:: PACKAGE``: a section for each of its modules, with all of its public names."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        sections = []
        for name in public_modules(self.arguments[0]):
            try:
                importlib.import_module(name)
                said = f".. automodule:: {name}\n   :members:\n"
            except ImportError as missing:  # of the package that it is for
                said = f"Not documented here, where it cannot be imported: {missing}\n"
            sections.append(f"{name}\n{'-' * len(name)}\n\n{said}")
        return self.parse_text_to_nodes("\n\n".join(sections), allow_section_headings=True)


LITERAL = re.compile(r"(``.+?``|(?::[\w:]+:)?`[^`]+`)", re.DOTALL)


def as_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with literals in backquotes: outside of those, ``*``, ``|`` and a final ``_`` mean themselves."""
    parts = LITERAL.split("\n".join(lines))
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?m)^(\s*)\\\*(?= )", r"\1*", re.sub(r"([*|])", r"\\\1", parts[i]))  # but for bullets
        parts[i] = re.sub(r"(?<=\w)_(?!\w)", r"\\_", parts[i])
    lines[:] = "".join(parts).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("public-modules", PublicModules)
    app.connect("autodoc-process-docstring", as_text, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
