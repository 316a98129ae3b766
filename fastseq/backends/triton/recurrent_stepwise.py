"""The step-by-step form: for each step a matrix product of torch's and one fused kernel; nothing is allocated between steps."""

from __future__ import annotations

from torch import Tensor

from .recurrent_args import BackwardLaunch, ForwardLaunch, product


def forward(launch: ForwardLaunch) -> None:
    from fastseq.kernels.recurrent import stepwise

    call, config, options = launch.call, launch.config, launch.options
    x, lanes, batch, width, wide = call.rows, call.lanes, call.batch, call.width, call.wide
    projection = call.projection
    # the states live where their last values are wanted
    state = launch.h_n.zero_() if launch.h0 is None else launch.h_n.copy_(launch.h0)
    cells = launch.c_n.zero_() if launch.c0 is None else launch.c_n.copy_(launch.c0)
    inner = state if projection is None else x.new_empty(lanes, batch, call.hidden)
    product_of_state = x.new_empty(lanes, batch, call.weight.shape[1], dtype=wide)
    projected = x.new_empty((lanes, batch, width) if projection is not None else (0,), dtype=wide)
    begin(launch, state, launch.resets.h)
    begin(launch, cells, launch.resets.c)
    tiles = {"KEEP_H": options["KEEP_H"], "BB": config.tiles["BB"], "BP": config.tiles["BH"]}
    for n in range(launch.layout.T):
        product(state, launch.weight.mT, product_of_state)
        stepwise.forward[launch.grid(call.hidden)](
            launch.x_gates, product_of_state, launch.vectors, inner, cells, launch.y if projection is None else None, launch.c,
            launch.gates, launch.layout, launch.zoneout, launch.resets, n, call.hidden,
            STEP=launch.math.step, PROJECTED=projection is not None, **options,
        )  # fmt: skip
        if projection is not None:
            product(inner, projection.mT, projected)
            stepwise.emit[launch.grid(width)](
                projected, state, launch.y, launch.layout, launch.zoneout, launch.resets, n, width, **tiles, **config.options
            )


def backward(launch: BackwardLaunch) -> None:
    from fastseq.kernels.recurrent import stepwise

    call, config, options = launch.call, launch.config, launch.options
    y, lanes, batch, width, wide = launch.y, call.lanes, call.batch, call.width, call.wide
    projection = call.projection
    dh = y.new_zeros(lanes, batch, width, dtype=wide) if launch.dh_n is None else launch.dh_n.to(wide, copy=True)
    dcells = launch.dc0.zero_() if launch.dc_n is None else launch.dc0.copy_(launch.dc_n)
    through = y.new_zeros(lanes, batch, width, dtype=wide)
    dr = y.new_empty(lanes, batch, call.weight.shape[1])
    total = y.new_empty((lanes, batch, width) if projection is not None else (0,))
    inner = through if projection is None else y.new_empty(lanes, batch, call.hidden, dtype=wide)
    tiles = {"KEEP_H": options["KEEP_H"], "BB": config.tiles["BB"], "BP": config.tiles["BH"]}
    for n in range(launch.layout.T):
        if projection is not None:
            stepwise.gather[launch.grid(width)](
                launch.dy, through, dh, total, launch.doutput, launch.layout, launch.zoneout, launch.resets, n, width, **tiles,
                **config.options,
            )  # fmt: skip
            product(total, projection, inner)
        plain = projection is None
        stepwise.backward[launch.grid(call.hidden)](
            launch.dy if plain else None, inner, dh if plain else None, dcells, launch.dc, launch.vectors, launch.h0, launch.c0,
            y, launch.c, launch.gates, launch.dgates, launch.drecurrent, launch.doutput if plain else None, dr, launch.layout,
            launch.zoneout, launch.resets, n, call.hidden, **options,
        )  # fmt: skip
        product(dr, launch.weight, through)
    if call.resets is None:
        launch.dh0.copy_(dh + through)
    else:
        stepwise.finish[launch.grid(width)](
            dh, through, launch.dh0, launch.layout, launch.resets, width, BB=tiles["BB"], BP=tiles["BP"], **config.options
        )


def begin(launch: ForwardLaunch, state: Tensor, again: Tensor | None) -> None:
    """Puts the reset state where a lane's first step begins anew."""
    from fastseq.kernels.recurrent import stepwise

    if launch.call.resets is not None and state.numel():
        tiles, width = launch.config.tiles, state.shape[-1]
        stepwise.begin[launch.grid(width)](
            state, again, launch.layout, launch.resets, width, BB=tiles["BB"], BP=tiles["BH"], num_warps=4
        )
