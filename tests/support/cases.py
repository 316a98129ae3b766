"""The shapes that are tested: tiny, odd, one, empty; all cells, lanes and layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle

from fastseq.cells import CELLS


@dataclass(frozen=True)
class RecurrentCase:
    """A stack of recurrent layers and its input; letters as in ``reference/recurrent.py``."""

    cell: str
    steps: int = 5
    batch: int = 3
    input: int = 4
    hidden: int = 5
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    projection: int = 0
    layout: str = "padded"  # "lengths", "packed"
    state: bool = True
    recompute: bool = False
    heads: int = 1
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h and of c
    training: bool = False  # zoneout is drawn; else states are mixed
    resets: str = ""  # "zeros", "states" (one of each row), "state" (one for all): what rows start anew from in some steps

    def __str__(self) -> str:
        size = f"{self.cell}-T{self.steps}-B{self.batch}-I{self.input}-H{self.hidden}-{self.layout}"
        marks = [
            f"L{self.layers}" if self.layers > 1 else "",
            "both" if self.bidirectional else "",
            "" if self.bias else "nobias",
            f"P{self.projection}" if self.projection else "",
            "" if self.state else "nostate",
            "recompute" if self.recompute else "",
            f"heads{self.heads}" if self.heads > 1 else "",
            f"zoneout{self.zoneout[0]}+{self.zoneout[1]}" if any(self.zoneout) else "",
            "training" if self.training else "",
            f"reset_to_{self.resets}" if self.resets else "",
        ]
        return "-".join([size, *filter(None, marks)])


_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
VARIANTS = tuple(name for name in CELLS if name not in _CELLS)  # which torch.nn does not have
_BASIC = [RecurrentCase(cell) for cell in _CELLS]

SMALL_RECURRENT_CASES = [
    small
    for case in (replace(case, steps=3, batch=7, input=4, hidden=5) for case in _BASIC[:3])
    for small in (
        replace(case, bidirectional=True),
        replace(case, layout="lengths", bidirectional=True, recompute=True),
        replace(case, layout="packed", state=False),
    )
] + [RecurrentCase("lstm", steps=3, batch=7, input=4, hidden=6, projection=5, bidirectional=True, layout="lengths")]

SMALL_VARIANT_CASES = [RecurrentCase(cell, steps=3, batch=7, input=4, hidden=20 if "norm" in cell else 5) for cell in VARIANTS]

SMALL_RESET_CASES = [
    RecurrentCase("lstm", steps=3, batch=7, bidirectional=True, layout="lengths", resets="states"),
    RecurrentCase("gru", steps=3, batch=7, bidirectional=True, layout="packed", resets="state", recompute=True),
    RecurrentCase("rnn_tanh", steps=3, batch=7, bidirectional=True, resets="zeros", state=False),
]

_ZONED = RecurrentCase("lstm", bidirectional=True, zoneout=(0.3, 0.5))

# What torch.nn does not have: other cells, zoneout, blocks of units.
VARIANT_CASES = [
    # a norm over few units magnifies rounding: such cells have more of them
    *(
        RecurrentCase(cell, steps=3, batch=7, input=4, hidden=20 if "norm" in cell else 5, bidirectional=True)
        for cell in VARIANTS
    ),
    *(RecurrentCase(cell, layout="lengths", bidirectional=True, recompute=True, hidden=17, batch=6) for cell in VARIANTS),
    *(RecurrentCase(cell, layout="packed", state=False, bias=False, hidden=33) for cell in VARIANTS),
    RecurrentCase("peephole_lstm", projection=3, layout="lengths"),
    RecurrentCase("coupled_lstm", projection=3, layout="packed"),
    RecurrentCase("layer_norm_lstm", projection=10, hidden=20, layout="packed", bidirectional=True),
    _ZONED,
    replace(_ZONED, training=True, layout="lengths", projection=3),
    replace(_ZONED, training=True, layout="packed", recompute=True),
    replace(_ZONED, training=True, cell="peephole_lstm"),
    replace(_ZONED, training=True, cell="coupled_lstm", layout="lengths"),
    replace(_ZONED, training=True, cell="layer_norm_lstm", hidden=20),
    *(
        replace(_ZONED, cell=cell, hidden=hidden, training=training, zoneout=(0.4, 0.0), recompute=training, layout="lengths")
        for cell, hidden in (("gru", 5), ("rnn_tanh", 5), ("slstm", 5), ("layer_norm_gru", 20))
        for training in (False, True)
    ),
    *(RecurrentCase(cell, hidden=12, heads=3, bidirectional=True, layers=2) for cell in ("lstm", "gru", "rnn_relu")),
    RecurrentCase("slstm", hidden=12, heads=2, layout="packed", bidirectional=True),
    RecurrentCase("gru", hidden=12, heads=3, bidirectional=True, zoneout=(0.4, 0.0), training=True, layout="packed"),
    *SMALL_RESET_CASES,
    *(
        RecurrentCase(cell, steps=7, batch=9, hidden=20 if "norm" in cell else 17, layout=layout, resets=to, bidirectional=True)
        for cell, layout, to in zip(
            CELLS, cycle(("padded", "lengths", "packed")), cycle(("zeros", "states", "states", "state")), strict=False
        )
    ),
    RecurrentCase("slstm", resets="zeros", bidirectional=True),
    RecurrentCase("lstm", resets="states", projection=20, hidden=40, batch=10, layers=2, bidirectional=True),
    RecurrentCase("gru", resets="states", steps=1, batch=6),
    RecurrentCase("lstm", resets="states", hidden=12, heads=3, bidirectional=True, layout="packed"),
    replace(_ZONED, resets="states", layout="lengths", steps=6),
    replace(_ZONED, resets="states", training=True, projection=3, layout="packed", steps=6),
    replace(_ZONED, resets="states", training=True, cell="layer_norm_lstm", hidden=20),
    replace(_ZONED, resets="states", training=True, cell="gru", zoneout=(0.4, 0.0), recompute=True),
    RecurrentCase("lstm", hidden=66, heads=66, batch=2, steps=3),  # more lanes than an op takes
    RecurrentCase("gru", hidden=40, heads=40, bidirectional=True, batch=4, steps=3, layout="lengths"),  # lanes of both directions
]

RECURRENT_CASES = [
    *SMALL_RECURRENT_CASES,
    *SMALL_VARIANT_CASES,
    *(replace(case, bidirectional=True) for case in _BASIC),
    *(replace(case, steps=1) for case in _BASIC),
    *(replace(case, bias=False, state=False) for case in _BASIC),
    # widths around one and several vectors, row blocks that do not divide the batch
    *(replace(case, hidden=hidden, batch=batch, input=7) for case in _BASIC for hidden, batch in ((16, 1), (17, 9), (70, 8))),
    *(
        replace(case, layout=layout, bidirectional=True, batch=11, hidden=33, steps=9)
        for case in _BASIC
        for layout in ("lengths", "packed")
    ),
    *(replace(case, layers=2, bidirectional=True, recompute=True) for case in _BASIC[:3]),
    RecurrentCase("lstm", projection=20, hidden=40, batch=10, layers=2),
    RecurrentCase("lstm", projection=7, hidden=21, layout="packed", bidirectional=True, recompute=True),
    # wide enough for threads to share a step of few rows
    RecurrentCase("lstm", hidden=200, input=40, batch=2, steps=4),
    RecurrentCase("gru", hidden=300, input=40, batch=1, steps=4, bidirectional=True),
    *VARIANT_CASES,
]
