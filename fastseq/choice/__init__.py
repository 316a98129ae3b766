"""Which kernel runs a call, as data: what a decision is about (``decision``), the device that it holds for (``device``), what was
measured there (``store``) or comes with the package (``lengths``, ``shipped``), and which of them is heeded (``sources``).

Nothing is read before the first call that needs it.
"""

from .decision import Call, Candidate, Decision
from .sources import decide, forget, instead

__all__ = ["Call", "Candidate", "Decision", "decide", "forget", "instead"]
