"""The shapes that are tested: tiny, odd, one, empty; all cells, lanes and layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace


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

    def __str__(self) -> str:
        size = f"{self.cell}-T{self.steps}-B{self.batch}-I{self.input}-H{self.hidden}-{self.layout}"
        marks = [
            f"L{self.layers}" if self.layers > 1 else "",
            "both" if self.bidirectional else "",
            "" if self.bias else "nobias",
            f"P{self.projection}" if self.projection else "",
            "" if self.state else "nostate",
            "recompute" if self.recompute else "",
        ]
        return "-".join([size, *filter(None, marks)])


_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
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

RECURRENT_CASES = [
    *SMALL_RECURRENT_CASES,
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
]
