"""`python -m fastseq.benchmarks.suites.restart REQUEST ANSWER`: a fresh process for headlines, see measure/restarts.py."""

from __future__ import annotations

import sys
from contextlib import suppress

from ..measure import restarts
from . import plan

if __name__ == "__main__":
    with suppress(BrokenPipeError):
        raise SystemExit(restarts.main(sys.argv[1:], plan))
