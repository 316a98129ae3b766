"""The CPU kernels without torch (tests/csrc/cpu_recurrent.cpp): a short form of `make sanitize`, aarch64, and planted faults."""

from __future__ import annotations

import shutil

import pytest

from . import planted
from .planted import LEFT, WRONG, Fault, cpu, program

# few enough to compile in some seconds
SHORT = ("X(float, LayerNormLstm)", "X(float16, Gru)")
AARCH64 = "aarch64-linux-gnu-g++"
EMULATOR = next((name for name in ("qemu-aarch64-static", "qemu-aarch64") if shutil.which(name)), None)


def test_odd_sizes():
    level = "avx2" if "avx2" in cpu.levels() else "default"
    assert not cpu.failure(program(level, SHORT, *cpu.SANITIZERS["plain"]), "33")


def test_single_steps():
    level = "avx2" if "avx2" in cpu.levels() else "default"
    assert not cpu.failure(program(level, cpu.STEP, *cpu.SANITIZERS["plain"]), "64")


@pytest.mark.slow
def test_aarch64():
    """The baseline's vectors on another architecture, emulated; without an emulator they are only compiled."""
    if not shutil.which(AARCH64):
        pytest.skip(f"needs {AARCH64} (Debian: g++-aarch64-linux-gnu)")
    path = program("default", SHORT, "-static", compiler=AARCH64)
    if EMULATOR is None:
        pytest.skip("compiled; needs qemu-aarch64 to run (Debian: qemu-user-static)")
    assert not cpu.failure(path, "33", under=(EMULATOR,))


RACE = "ThreadSanitizer: data race"
ENGINE, NORMS, VECTORS = "recurrent_kernel.inl", "recurrent_normalized.inl", "vector.inl"
STEP = "recurrent_step.inl"
MEET = "if (w.barrier) w.barrier->wait(w.weight);\n"
EACH = "for (int64_t slot = 0; slot < active; ++slot)"
SUMS = (
    "kTileVectors * W];\n};\n\ntemplate <class Product, class S, template <class> class Cell, bool kZoned>\nclass BackwardKernel"
)


def unmet(name: str, before: str, after: str) -> Fault:
    """A meeting of the team is left out, between two lines."""
    return Fault(f"no meeting {name}", NORMS, before + MEET + after, before + after, RACE, "thread")


def uncut(name: str, old: str, new: str, cell: str = "float, Lstm") -> Fault:
    """A reset that is missed, or found elsewhere."""
    return Fault(name, ENGINE, old, new, WRONG, cases=(f"X({cell})",))


def untaken(name: str, old: str, new: str, seen: str = WRONG, file: str = ENGINE) -> Fault:
    """Tiles are made of other rows of a tensor than they are to be made of."""
    return Fault(name, file, old, new, seen, level="amx", cases=("X(bfloat16, Lstm)",))


def unpaired(name: str, old: str, new: str, seen: str = WRONG, file: str = "product_pairs.inl") -> Fault:
    """Pairs are made of other values than of two neighbors within a row or a column."""
    return Fault(name, file, old, new, seen, level="avx512_bf16", cases=("X(bfloat16, Gru)",))


def unfinished(name: str, old: str, new: str, file: str = "recurrent_few.inl", cell: str = "Lstm") -> Fault:
    """Of few sequences, something is left out, or taken from elsewhere."""
    return Fault(name, file, old, new, f"{WRONG}|{LEFT}", level="avx512", cases=(f"X(float, {cell})",))


FAULTS = [
    Fault(
        "a gate's R h among its x",
        STEP,
        "w_hh + u0 * H, n, kOwn, w_ih",
        "w_hh + u0 * H, n, 0, w_ih",
        WRONG,
        cases=cpu.STEP,
    ),
    Fault("sequences beyond the batch", STEP, "square[b] = b < there", "square[b] = b <= there", LEFT, cases=cpu.STEP),
    Fault(
        "few sequences: h by the weights of x",
        STEP,
        "static_cast<const A*>(s.w_hh) + first * H, H}",
        "static_cast<const A*>(s.w_ih) + first * H, H}",
        f"{WRONG}|{LEFT}",
        cases=cpu.STEP,
    ),
    Fault(
        "few sequences: the last gate's R h among its x", STEP, "g < G - kOwn || g >= G ? h0", "g < G ? h0", WRONG, cases=cpu.STEP
    ),
    Fault(
        "few sequences: columns beyond the units",
        STEP,
        "min(first + j + c, last) * depth",
        "(first + j + c) * depth",
        LEFT,
        cases=cpu.STEP,
    ),
    Fault(
        "few sequences: a row's values beyond its end",
        STEP,
        "if (k < depth) add(k, depth - k)",
        "if (k < depth) add(k, W)",
        f"{WRONG}|{LEFT}",
        cases=cpu.STEP,
    ),
    Fault(
        "few sequences: tiles that did not fit",
        STEP,
        "if (rows + B > kRows) finish();",
        "if (rows + B > kRows) rows = count = 0;",
        WRONG,
        cases=cpu.STEP,
    ),
    Fault(
        "packed: the bias of another unit",
        STEP,
        "const int64_t u = u0 + v % blocks * W;",
        "const int64_t u = u0;",
        WRONG,
        cases=cpu.STEP,
    ),
    Fault(
        "packed: sums of x start those of every gate of h", STEP, "n / G * (G - kOwn)}, of_h", "n}, of_h", WRONG, cases=cpu.STEP
    ),
    Fault(
        "packed: one tile for all",
        STEP,
        "at(s.packed_hh, tile, H), *after",
        "at(s.packed_hh, 0, H), *after",
        WRONG,
        cases=cpu.STEP,
    ),
    Fault("variance of what is beyond the units", NORMS, "(units - u) * sizeof(A)", "sizeof(V)", WRONG),
    Fault("mean over whole vectors", NORMS, "kParts * units, first", "kParts * blocks_of(units, W) * W, first", WRONG),
    unmet("before R h is normalized", "  ", f"  {EACH} finish_gates"),
    unmet("before c is normalized", "    ", f"    {EACH} finish_cell"),
    unmet("with the gradient of N(c)", "through_output(slot);\n    ", ""),
    unmet("with the gradient of N(R h)", "through_gates(slot);\n  ", ""),
    Fault("subnormal numbers flushed", VECTORS, "kNormal ? (U)subnormal", "kNormal ? (U)(0 * subnormal)", WRONG, level="default"),
    Fault("ties away from zero", VECTORS, "0xfff + ((magnitude >> 13) & 1)", "0x1000", WRONG, level="default"),
    Fault(
        "read beyond the end",
        VECTORS,
        "if (n < kWidth) return widened",
        "if (!n) return widened",
        LEFT,
        cases=("X(float16, Gru)",),
    ),
    Fault("read before the beginning", ENGINE, "bias + g * H + u0 + b * W,", "bias + g * H + u0 + b * W - 1,", LEFT),
    Fault(
        "sums beyond their array",
        ENGINE,
        f"Product::kMostRows * {SUMS}",
        SUMS,
        "AddressSanitizer: stack-buffer-overflow",
        "address",
    ),
    Fault(
        "rows of states misaligned",
        ENGINE,
        "ldc(padded<A>(shape.hidden))",
        "ldc(padded<A>(shape.hidden) + 1)",
        "misaligned address",
    ),
    uncut("a cut one step late", "cut(steps.time(step + 1), *new_h)", "cut(steps.time(step), *new_h)"),
    uncut("a lane backwards cut at a segment's first step", "return reverse ? t + 1 : t;", "return t;"),
    uncut("the gradient of c passes", "if (anew && K)", "if (!K)"),
    uncut("the gradient of h passes", "if (!came_anew || ", "if (true || "),
    uncut("the state that was replaced, backwards", "anew(of.anew && ", "anew(false && ", cell="float16, Gru"),
    untaken("y of two steps before", "steps.time(step - 1), 0) * D * P", "steps.time(max(step - 2, 0)), 0) * D * P"),
    untaken("x of another step", "takes_x ? steps.row(t, 0)", "takes_x ? steps.row(0, 0)"),
    untaken("y where a reset replaced it", "!w.rows.resets && takes(y", "takes(y"),
    untaken("rows beyond the last", " &&\n           count % blocks_of(count, 16) == 0", "", LEFT, "product_amx.inl"),
    unpaired("the rows of a pair exchanged", "(2 * k + i) * stride", "(2 * k + 1 - i) * stride", f"{WRONG}|{LEFT}"),
    unpaired("an odd depth's last pair reads a row beyond", "i < min(2, depth - 2 * k)", "i < 2", f"{WRONG}|{LEFT}"),
    unpaired("an odd depth's last pair is not zero", "(stride_ - columns) * sizeof(bfloat16)", "0"),
    unpaired("a row's values beyond its end", "if (n < 2 * W) return", "if (n < W) return", f"{WRONG}|{LEFT}"),
    unpaired("half of a depth", "blocks_of(depth, 2)", "depth / 2", f"{WRONG}|{LEFT}"),
    unpaired(
        "in place, a whole vector at the end",
        "if (k < depth) add(depth - k)",
        "if (k < depth) add(T::kDepth)",
        LEFT,
        "product_in_place.inl",
    ),
    unfinished("an odd vector of units", "if (waiting) finish.template", "if (waiting > 1) finish.template"),
    unfinished("units after the last whole vector", "if (whole < H)", "if (whole + W < H)"),
    unfinished("a single tile", "if (count) finish(items, count)", "if (count > 1) finish(items, count)", ENGINE),
    unfinished("what was projected for the other chunk", "if constexpr (kFew) return few.half;", "", ENGINE),
    unfinished(
        "the last rows of a chunk", "kPieceRows) < few.rows) return", "kPieceRows) + Product::kPieceRows <= few.rows) return"
    ),
    unfinished("pieces of a tile that is not whole", "(UB == 1 || a.shape.hidden % (UB * W) == 0)", "true", cell="RnnTanh"),
    Fault(
        "the mean of R h with the rounding of its sum",
        NORMS,
        "return {first + left,",
        "return {first,",
        WRONG,
        cases=("X(float, LayerNormGru)",),
    ),
    unfinished("sums of a piece", "k ? Start<A>{to, stride, width} : Start<A>{bias", "Start<A>{bias", "product_blocks.inl"),
    unfinished("the input of the first sequence", "x ? projected_input(*item, r)", "x ? projected_input(*item, 0)", cell="Gru"),
    Fault("backwards one tile too far", ENGINE, "tiles[1] - 1 - i", "tiles[1] - i", f"{WRONG}|{LEFT}"),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_seen(fault, tmp_path):
    planted.expect(fault, tmp_path)
