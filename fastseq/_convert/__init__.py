"""`convert` makes a model's torch.nn modules fastseq's, in place; `revert` undoes it; `patched` builds them.

A conversion is a swap of `module.__class__`: parameters, buffers, hooks, names and state_dict are the same
objects before and after, so optimizers, tied weights and averaged copies go on working. What cannot be
converted right is left alone and stands in the report with its reason.

``table`` says what becomes what (a new module is a row there), ``found`` which modules of a model are meant and what
speaks against one, ``subclasses`` makes the class of a user's subclass, ``asking`` finds code that asks for torch's class,
``elsewhere`` what a model does without a class to convert.
"""

from .patching import patched
from .report import Report, Row
from .swap import all_ours, convert, revert

__all__ = ["Report", "Row", "all_ours", "convert", "patched", "revert"]
