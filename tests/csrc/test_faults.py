"""Faults planted in copies of the sources are seen: the host execution finds what it is there to find."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import build, host_program

SEEDS = 24
WRONG = "wrong result"
RACE = "ThreadSanitizer: data race"


@dataclass(frozen=True)
class Fault:
    """Some words of a file, found there once, are replaced by others; a pattern is then in a line of the output of some seed."""

    name: str
    old: str
    new: str
    seen: str
    sanitizer: str = "plain"
    file: str = "tests/csrc/exchange.cu"
    program: str = "exchange"
    tests: tuple[str, ...] = ()  # of the program; none: all
    kernels: int = 0  # of recurrent.cu, that are compiled; 0: all


FORWARD, BACKWARD, SUMS = 1, 2, 4  # the kernels of recurrent.cu: a fault of what they share is shown by one of them


def engine(
    name: str,
    old: str,
    new: str,
    seen: str,
    sanitizer: str = "plain",
    file: str = "all_gather.cuh",
    kernels: int = FORWARD,
    tests: tuple[str, ...] = (),
) -> Fault:
    return Fault(f"recurrent: {name}", old, new, seen, sanitizer, f"csrc/recurrent/{file}", "recurrent", tests, kernels)


FORWARD_FILE, BACKWARD_FILE, REDUCE_SCATTER = "forward_kernel.cuh", "backward_kernel.cuh", "reduce_scatter.cuh"
EXCHANGE, LAYOUT, WEIGHTS = "exchange.cuh", "layout.h", "weights.cuh"
RESETS = ("forward_resets", "backward_cluster_resets")  # of a lane backwards


def of_both(name: str, old: str, new: str, seen: str, kernels: int = FORWARD) -> tuple[Fault, Fault]:
    """What both exchanges share is wrong for either of them."""
    return (
        engine(name, old, new, seen, file=EXCHANGE, kernels=kernels),
        engine(f"sums: {name}", old, new, seen, file=EXCHANGE, kernels=SUMS),
    )


FAULTS = [
    # states and flags in global memory
    Fault("no wait for flags", "if (warp() == 0) flags_wait(p.flags, kCtas, step - 1);", "", WRONG),
    Fault("flags seen by one warp", "cta_sync();  // the flags hold for all warps", "", WRONG),
    Fault("no wait for copies", "cp_wait<0>();", "cp_wait<1>();", f"{WRONG}|without having waited for this cp_async16"),
    Fault("copies of one warp", "cta_sync();  // the state is there", "", WRONG),
    Fault("sums of one warp", "cta_sync();  // the partial sums are there", "", WRONG),
    Fault("published too early", "cta_sync();  // the new state is written", "", WRONG),
    Fault("one buffer", "p.states + step % 2 * kBatch", "p.states + (step - 1) % 2 * kBatch", WRONG),
    Fault(
        "a CTA skips its flag",
        "if (warp() == 0) flag_publish",
        "if (warp() == 0 && bid() != 2) flag_publish",
        "deadlock: .* in flags_wait",
    ),
    Fault("not cooperative", "kPartialBytes, true", "kPartialBytes, false", "deadlock: .*the launch is not cooperative"),
    Fault("little shared memory", "kPartialBytes, true", "kPartialBytes - 32, true", "bytes of shared memory, launched with"),
    Fault("a warp leaves", "uint32_t a[4], b[2];", "uint32_t a[4], b[2];\n    if (warp() && k > 32) return;", WRONG),
    Fault(
        "a lane stays behind",
        "ldmatrix_x2(b,",
        "if (lane() != 5) ldmatrix_x2(b,",
        "while other lanes of the warp are in ldmatrix",
    ),
    Fault("half of the rows", "multiply(weights, state, partial);", "if (warp() == 0) multiply(weights, state, partial);", WRONG),
    # states in the shared memory of a cluster
    Fault(
        "no first cluster_sync",
        "cluster_sync();  // the barriers and",
        "// the barriers and",
        "never initialized, or overwritten",
    ),
    Fault("no wait for a phase", "mbarrier_wait(arrived + from, (step - 2) / 2 % 2);", "", f"{WRONG}|second arrival"),
    Fault("wrong parity", "(step - 2) / 2 % 2", "(step - 1) / 2 % 2", f"{WRONG}|deadlock|second arrival"),
    Fault("one buffer of two", "to = step % 2;", "to = from;", f"{WRONG}|deadlock"),
    Fault(
        "expects too much",
        "sizeof(Bfloat16);\n  Smem",
        "sizeof(Bfloat16) + 16;\n  Smem",
        "deadlock: .*misses 0 arrivals and 16 bytes",
    ),
    Fault("does not expect", "mbarrier_expect(arrived + from, kBytes);", "{}", "deadlock: .*misses 1 arrivals"),
    Fault("sums of a faster warp", "cta_sync();  // the partial sums are ready", "//", WRONG),
    Fault("sent too early", "cta_sync();  // the new state is staged", "", WRONG),
    Fault("counts elsewhere", "peer(arrived + to, rank)", "peer(arrived + from, rank)", f"{WRONG}|deadlock"),
    Fault(
        "ends too early", "mbarrier_wait(arrived + p.steps % 2, (p.steps - 1) / 2 % 2);", "", "which has ended|on its way to it"
    ),
    # outside of arrays
    Fault(
        "copies past a piece", "tid() % 8 * 8, before", "tid() % 8 * 8 + 72, before", "writes outside of every piece", "address"
    ),
    Fault(
        "copies from past a tensor",
        "before + tid() / 8",
        "before + kBatch * kDepth + tid() / 8",
        "reads outside of an array",
        "address",
    ),
    Fault(
        "stores past a piece",
        "partial[(warp() * kRows",
        "partial[(8 + warp() * kRows",
        "AddressSanitizer: use-after-poison",
        "address",
    ),
    Fault(
        "stores past a tensor", "after[n * kDepth", "after[(n + 8) * kDepth", "AddressSanitizer: heap-buffer-overflow", "address"
    ),
    Fault("misaligned vector", "stage + n * kRows + 8 * half", "stage + n * kRows + half", "misaligned address", "address"),
    # what no order of threads shows
    Fault("relaxed flag", "kRelease = 3;", "kRelease = 0;", RACE, "thread", "tests/csrc/emulator/primitives.cpp"),
    Fault(
        "two write the same",
        "p.out[n * kDepth + m] = last[n * kStride + m];",
        "for (int w = m; w < m + 2 * kRows; w += kRows) p.out[n * kDepth + w % kDepth] = last[n * kStride + w % kDepth];",
        RACE,
        "thread",
    ),
    # the recurrent kernels
    *of_both("no wait for flags", "if (gpu::warp() == 0) gpu::flags_wait(", "if (false) gpu::flags_wait(", WRONG),
    *of_both("flags seen by one warp", "split_.ctas, epoch);\n    gpu::cta_sync();", "split_.ctas, epoch);", WRONG, BACKWARD),
    engine(
        "no wait for copies", "gpu::cp_wait<0>();", "gpu::cp_wait<1>();", f"{WRONG}|without having waited for this cp_async16"
    ),
    engine("copies of one warp", "gpu::cta_sync();  // it is here, and the other buffer is free", "", WRONG),
    engine("one operand", "operands_ + (epoch & 1) * operand_vectors()", "operands_ + (epoch & 0) * operand_vectors()", WRONG),
    *of_both(
        "a CTA skips its flag",
        "gpu::flag_publish(flags_ + rank_",
        "if (rank_ == 0) gpu::flag_publish(flags_ + rank_",
        "deadlock: ",
    ),
    *of_both("no first cluster_sync", "gpu::cluster_sync();", "", "never initialized, or overwritten"),
    *of_both("no wait for a phase", "gpu::mbarrier_wait(arrived, (epoch - 1) / 2 & 1);", "", f"{WRONG}|second arrival"),
    *of_both("wrong parity", "(epoch - 1) / 2 & 1", "epoch / 2 & 1", f"{WRONG}|deadlock|second arrival"),
    *of_both(
        "does not expect",
        "if (gpu::tid() == 0) gpu::mbarrier_expect",
        "if (gpu::tid() < 0) gpu::mbarrier_expect",
        "misses 1 arrivals",
    ),
    *of_both("expects too much", "2, bytes);", "2, 2 * bytes);", "deadlock: .*misses 0 arrivals"),
    engine("one slot", "(epoch & 1) * buffer_vectors() + rank_ * layout_", "rank_ * layout_", WRONG),
    engine("sums of one warp", "gpu::cta_sync();  // the sums are there", "", WRONG),
    engine("sent too early", "      gpu::cta_sync();\n    }\n    if (steps", "    }\n    if (steps", WRONG, file=FORWARD_FILE),
    engine(
        "initial states too early", "    gpu::cta_sync();\n    const int steps", "    const int steps", WRONG, file=FORWARD_FILE
    ),
    engine(
        "sent too early, backward",
        "if (s == steps) break;\n      gpu::cta_sync();",
        "if (s == steps) break;",
        WRONG,
        file=BACKWARD_FILE,
        kernels=BACKWARD,
    ),
    engine("units beyond H", "items_.column(j), t) && items_.has_unit(j)", "items_.column(j), t)", WRONG, file="step.cuh"),
    engine("no room for barriers", "piece_bytes<gpu::Mbarrier>(2)", "0", "bytes of shared memory, launched with", file=LAYOUT),
    engine(
        "one buffer for copies",
        "split_.batch_tiles) bring(piece + 1,",
        "split_.batch_tiles) bring(piece,",
        WRONG,
    ),
    engine(
        "weights beyond H",
        "inside && from < hidden && to",
        "inside && to",
        "heap-buffer-overflow",
        "address",
        BACKWARD_FILE,
        BACKWARD,
    ),
    engine("a row's sums go on in the next", "sums_[chain][tile][i] = 0;", "{}", WRONG, file=WEIGHTS),
    engine("a row's depth goes on in the next", "operand -= k_tiles * kStride;", "", WRONG, file=WEIGHTS),
    engine("rows by turns", "row += split_.m_warps(), end", "row += 1, end", WRONG, file=WEIGHTS),
    # resets
    engine(
        "a lane backwards is cut as one forward",
        "at = backwards_ ? t + 1 : t;",
        "at = t;",
        WRONG,
        file="batch_rows.cuh",
        tests=RESETS,
    ),
    engine(
        "a cut one step late",
        "items_.column(j), rows_.after(t));\n    }\n  }",
        "items_.column(j), t);\n    }\n  }",
        WRONG,
        file=FORWARD_FILE,
        tests=RESETS,
    ),
    engine(
        "gradients of c are not cut",
        "if (cut_[j]) cut_off(gradient(batch_tile, 1 + k",
        "if (false) cut_off(gradient(batch_tile, 1 + k",
        WRONG,
        file=BACKWARD_FILE,
        kernels=BACKWARD,
        tests=RESETS,
    ),
    engine("a gradient times zero", "    grad = 0;", "    grad *= 0;", WRONG, file=BACKWARD_FILE, kernels=BACKWARD, tests=RESETS),
    # partial sums
    engine(
        "sums: one slot",
        "received_ + (epoch & 1) * inbox() + which",
        "received_ + which",
        WRONG,
        file=REDUCE_SCATTER,
        kernels=SUMS,
    ),
    engine("sums: one place for all", "rank_ * layout_.sent + (unit <<", "(unit <<", WRONG, file=REDUCE_SCATTER, kernels=SUMS),
    engine("sums: of one warp", "gpu::cta_sync();  // the sums are there", "", WRONG, file=REDUCE_SCATTER, kernels=SUMS),
    engine(
        "sums: slots are too small",
        "smem.take<gpu::Vec16>(clusters() ? 2 *",
        "smem.take<gpu::Vec16>(clusters() ? 1 *",
        "writes outside of every piece|into a piece|outside",
        "address",
        REDUCE_SCATTER,
        SUMS,
    ),
    engine("sums: sent by one warp", "gpu::cta_sync();  // all warps have sent", "", WRONG, file=REDUCE_SCATTER, kernels=SUMS),
    engine(
        "sums: one inbox",
        "((epoch & 1) * split_.batch_tiles",
        "((epoch & 0) * split_.batch_tiles",
        WRONG,
        file=REDUCE_SCATTER,
        kernels=SUMS,
    ),
    engine("sums: of the next batch tile", "if (batch_tile > 0) gpu::cta_sync();", "", WRONG, file=REDUCE_SCATTER, kernels=SUMS),
]


def planted(fault: Fault) -> Path:
    """A copy of the sources with the fault in it."""
    tree = build.BUILD / "planted" / re.sub(r"\W+", "_", fault.name)
    shutil.rmtree(tree, ignore_errors=True)
    for part in ("csrc", "tests/csrc"):
        shutil.copytree(build.ROOT / part, tree / part, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (tree / fault.file).read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has {text.count(fault.old)} times: {fault.old}"
    (tree / fault.file).write_text(text.replace(fault.old, fault.new))
    return tree


def see(fault: Fault, sanitizer: str, pattern: str) -> None:
    """Runs the program until a line of what it says has the pattern."""
    tree = planted(fault)
    runtime = tree if fault.file.startswith("tests/csrc/emulator/") else build.ROOT
    defines = ("-g0", f"-DFASTSEQ_TEST_KERNELS={fault.kernels}") if fault.kernels else ("-g0",)
    path = host_program(fault.program, sanitizer, tree=tree, runtime=runtime, defines=defines)
    said: list[str] = []
    with subprocess.Popen(
        [path, "0", str(SEEDS), *fault.tests], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if re.search(pattern, line):
                process.kill()
                return
    raise AssertionError("".join(said)[-4000:])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_is_seen(fault):
    see(fault, fault.sanitizer, fault.seen)


# Of these ThreadSanitizer knows without seeing harm done.
RACES = (
    "no wait for flags",
    "flags seen by one warp",
    "copies of one warp",
    "sums of one warp",
    "published too early",
    "one buffer",
    "no wait for a phase",
    "sums of a faster warp",
    "sent too early",
    "recurrent: no wait for flags",
    "recurrent: one operand",
    "recurrent: copies of one warp",
    "recurrent: sums of one warp",
)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.name in RACES], ids=lambda fault: fault.name)
def test_is_a_race(fault):
    see(fault, "thread", RACE)
