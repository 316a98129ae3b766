"""The logger ``fastseq``: INFO tells who runs each new kind of call, WARNING what is slow or ignored."""

from __future__ import annotations

import logging
import os

from ._arguments import unknown

LEVELS = ("debug", "info", "warning", "error")


def show() -> None:
    """Print what the level of ``FASTSEQ_LOG`` lets through on the standard error; unset, logging is the application's affair.

    Raises:
        ValueError: if there is no such level.
    """
    level = os.environ.get("FASTSEQ_LOG", "").lower()
    if not level:
        return
    if level not in LEVELS:
        raise ValueError(f"FASTSEQ_LOG: {unknown('level', level, LEVELS)}")
    logger = logging.getLogger("fastseq")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
