"""Measuring which kernel is the fastest for a call on this device: for a model (``tune``), for standard calls (``python -m
fastseq tune``), at the first meeting of a call (``FASTSEQ_TUNE=1``).

``problems`` makes a call again, ``measure`` checks and times its candidates, ``child`` does that in a process of its own,
``tuner`` stores what follows.
"""

from .report import Row, TuneReport
from .tuner import tune

__all__ = ["Row", "TuneReport", "tune"]
