"""Which kernel runs a call, as data: what was measured here (``store``)."""
