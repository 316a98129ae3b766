"""Every launch of the attention kernels that the compiler's gate looks at, and the figures of each.

`python tests/kernels/attention_launches.py --write` compiles them all and writes attention_resources.json beside this file;
`--json` prints the figures of those that match the options, a line each. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("attention_resources.json")
B, H, G, T = 2, 8, 4, 4096
# Head dims by dtype: every tile, and those that pad it. tf32 takes fp32's tiles, once each.
HEAD_DIMS = (64, 128, 256, 96, 16, 32, 192)
FEATURES = {"bfloat16": HEAD_DIMS, "float16": HEAD_DIMS, "float32": HEAD_DIMS, "tf32": (64, 128, 256)}
CAPABILITIES = (80, 90, 100, 120)
CALLS = ("forward", "backward", "weights", "weights_backward", "decode")
EVERYTHING = "everything"
REASONS = {  # variants and kernels that may spill, and why
    EVERYTHING: "no model uses every feature at once; it is compiled to see that the parts fit together",
    "keys_backward": "dk and dv fill the registers; but for dropout, loops over tiles use little of what gives way",
}
FEW = 8  # bytes of a thread
FEW_REASON = "two words at most, which the compiler gives up to stay within a step of registers"
# Transformer-XL's band of distances is a second, wider score tile: what is left may have fewer rows than wgmma and tcgen05 take.
NARROW = (EVERYTHING, "relative")
SINGLE = (
    "window",
    "mask",
    "bias",
    "relative_bias",
    "relative",
    "slopes",
    "softcap",
    "sinks",
    "dropout",
    "lengths",
    "packed",
    "blocks",
)
SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes for a block
WITHOUT_PRODUCTS = ("delta_of_out", "combine")
BEST = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}  # for 16-bit operands
SMALL_TILES = ("decode",)  # 16 rows, where the instructions of sm_90 and sm_100 take 64 and more
# Registers and shared memory may grow as long as a multiprocessor holds as many blocks as before: less than that costs nothing.
# What spills already, with its reason, may spill a quarter more before somebody has to look at it.
MARGIN = 1.25


class Point(NamedTuple):
    call: str
    variant: str
    dtype: str
    features: int
    capability: int

    @property
    def key(self) -> str:
        return f"{self.call} {self.variant} {self.dtype} E={self.features} sm_{self.capability}"


def points() -> list[Point]:
    """Plain calls; all features at once, and on one architecture each alone, in bf16 at 128; Transformer-XL's backward at
    64, whose tiles differ; decoding in many parts."""
    found = []
    for capability in CAPABILITIES:
        for call in CALLS:
            plain = "causal" if call in ("forward", "backward") else "full"
            found += [Point(call, plain, d, e, capability) for d, features in FEATURES.items() for e in features]
            found.append(Point(call, EVERYTHING, "bfloat16", 128, capability))
            if call == "backward":
                found.append(Point(call, "relative", "bfloat16", 64, capability))
            if call == "decode":
                found.append(Point(call, "split", "bfloat16", 128, capability))
            if capability == 90:
                found += [Point(call, v, "bfloat16", 128, capability) for v in _single(call)]
    return found


def _single(call: str) -> tuple[str, ...]:
    if call == "decode":
        return ("paged",)
    if call.startswith("weights"):
        return ("relative", "dropout")
    return ("full", *SINGLE)


def spec_of(point: Point, torch: Any) -> Any:
    from fastseq.ops.attention import Spec

    on = (
        (lambda *names: point.variant in (*names, EVERYTHING))
        if point.variant != "packed"
        else (lambda *names: "packed" in names)
    )
    q = {"device": "meta", "dtype": torch.float32 if point.dtype == "tf32" else getattr(torch, point.dtype)}
    fp32, ints = {"device": "meta", "dtype": torch.float32}, {"device": "meta", "dtype": torch.int32}
    bools = {"device": "meta", "dtype": torch.bool}
    fields: dict[str, Any] = {"scale": point.features**-0.5}
    if on("causal", "window"):
        fields["right"] = 0
    if on("window"):
        fields["left"] = 511
    if on("mask"):
        fields["mask"] = torch.empty(B, 1, T, T, **bools)
    if on("bias"):
        fields["bias"] = torch.empty(1, H, T, T, **q)
    if on("relative_bias"):
        fields |= {"relative_bias": torch.empty(H, 2 * T - 1, **q), "relative_bias_zero": T - 1}
    if on("relative"):
        rows = (B, H, T, point.features)
        fields |= {"relative_q": torch.empty(rows, **q), "relative_k": torch.empty(H, 2 * T, point.features, **q)}
        fields["relative_k_zero"] = T
    if on("slopes"):
        fields["slopes"] = torch.empty(1, H, **fp32)
    if on("softcap"):
        fields["softcap"] = 30.0
    if on("sinks"):
        fields["sinks"] = torch.empty(H, **q)
    if on("dropout"):
        fields |= {"dropout": 0.1, "seed": torch.empty(1, device="meta", dtype=torch.int64)}
    if on("lengths"):
        fields |= {"q_lengths": torch.empty(B, **ints), "k_lengths": torch.empty(B, **ints), "bottom_right": True}
    if on("packed"):
        fields |= {"cu_q": torch.empty(B + 1, **ints), "cu_k": torch.empty(B + 1, **ints), "max_q": T, "max_k": T}
    if on("blocks"):
        fields |= {"blocks": torch.empty(B, H, T // 64, T // 64, **bools), "block_size": 64}
    return Spec(**fields)


def launches(point: Point) -> list[Any]:
    """What the launcher gives the kernels, on tensors without memory; configs are those of the architecture."""
    import torch

    from fastseq.backends.triton import attention, attention_decode
    from fastseq.testing.triton_compile import attention_configs, recorded

    torch.backends.cuda.matmul.allow_tf32 = point.dtype == "tf32"
    dtype = torch.float32 if point.dtype == "tf32" else getattr(torch, point.dtype)
    spec = spec_of(point, torch) if point.call != "decode" else None
    shape = (
        (lambda heads: (heads, B * T, point.features))
        if point.variant == "packed"
        else (lambda heads: (B, heads, T, point.features))
    )
    q, k = (torch.empty(shape(heads), device="meta", dtype=dtype) for heads in (H, G))
    lse = torch.empty(q.shape[:-1], device="meta", dtype=torch.float32)
    with recorded() as found, attention_configs(point.capability):
        if point.call == "forward":
            attention.attention_forward(q, k, k, spec)
        elif point.call == "backward":
            dlse = lse if point.variant == EVERYTHING else None
            attention.attention_backward(q, dlse, q, k, k, q, lse, spec, wanted(spec, True))
        elif point.call == "weights":
            attention.attention_weights(q, k, lse, spec, True)
        elif point.call == "weights_backward":
            dw = torch.empty(B, T, T, device="meta", dtype=dtype)
            attention.attention_weights_backward(dw, q, k, lse, spec, True, wanted(spec, False))
        else:
            everything = point.variant == EVERYTHING
            cache, table, lengths = k, None, torch.empty(B, device="meta", dtype=torch.int32)
            if point.variant in ("paged", EVERYTHING):
                cache = torch.empty(B * T // 64, G, 64, point.features, device="meta", dtype=dtype)
                table = torch.empty(B, T // 64, device="meta", dtype=torch.int32)
            slopes = torch.empty(1, H, device="meta") if everything else None
            sinks = torch.empty(H, device="meta", dtype=dtype) if everything else None
            more = (30.0, 511, 0) if everything else (0.0, -1, 0)
            splits = 20 if point.variant == "split" else 8  # more than the merge holds at once, and fewer
            attention_decode.attention_decode_forward(
                q[:, :, :1], cache, cache, lengths, table, slopes, sinks, point.features**-0.5, *more, splits
            )
    return found


def wanted(spec: Any, v: bool) -> list[bool]:
    return [True, True, v, *(t is not None for t in (spec.bias, spec.relative_bias, spec.relative_q, spec.relative_k))]


def figures(point: Point) -> list[dict[str, Any]]:
    """A row for each kernel that the point launches."""
    from fastseq.testing.triton_compile import resources

    rows = []
    for launch in launches(point):
        name = launch.kernel.__name__
        tile = {key: launch.kwargs[key] for key in ("BM", "BN") if key in launch.kwargs}
        try:
            found = resources(launch, point.capability).as_dict()
        except Exception as error:  # noqa: BLE001  whatever the compiler says is the result
            found = {"failed": f"{type(error).__name__}: {_reason(error)}"}
        rows.append({"key": f"{point.key}: {name}", **tile, **found})
    return rows


def _reason(error: BaseException) -> str:
    """The innermost message: a compilation error quotes the source of every function on the way."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip(" ^"))[-300:]


def each(chosen: list[Point], processes: int) -> Iterator[dict[str, Any]]:
    """Rows in the order of the points."""
    os.environ.pop("TRITON_INTERPRET", None)  # of the processes that compile
    if processes == 1:
        for point in chosen:
            yield from figures(point)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(figures, chosen):
            yield from rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="compile everything and write the table")
    parser.add_argument("--json", action="store_true", help="print rows")
    parser.add_argument("--only", default="", help="points whose key contains every one of these words")
    parser.add_argument("--keys", help="points with exactly these keys, separated by semicolons")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    keep: Callable[[Point], bool] = lambda p: all(word in p.key.split() for word in args.only.split())  # noqa: E731
    if args.keys:
        keys = set(args.keys.split(";"))
        keep = lambda p: p.key in keys  # noqa: E731
    rows = []
    for row in each([p for p in points() if keep(p)], args.processes):
        rows.append(row)
        if args.json:
            print(json.dumps(row), flush=True)
    if args.write:
        write(rows, merge=bool(args.only or args.keys))
    return 0


def write(rows: list[dict[str, Any]], *, merge: bool) -> None:
    """The table, a line for each kernel."""
    import triton

    table = json.loads(TABLE.read_text())["kernels"] if merge and TABLE.exists() else {}
    for row in rows:
        table[row["key"]] = {name: value for name, value in row.items() if name != "key"}
        reason = reason_of(row["key"], row.get("spilled", 0))
        if reason and row.get("spilled"):
            table[row["key"]]["reason"] = reason
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(table[key])}" for key in table)
    TABLE.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{lines}\n }}\n}}\n')


def variant_of(key: str) -> str:
    return key.split()[1]


def reason_of(key: str, spilled: int) -> str | None:
    """Why the kernel may spill so many bytes, if it may."""
    return REASONS.get(variant_of(key)) or (FEW_REASON if spilled <= FEW else REASONS.get(key.rpartition(" ")[2]))


def faults(row: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What is wrong with a kernel's figures, by themselves and against the table's (None: those of another compiler)."""
    if "failed" in row:
        return [f"does not compile: {row['failed']}"]
    _, _, dtype, _, architecture = row["key"].split(":")[0].split()
    kernel = row["key"].rpartition(" ")[2]
    found = []
    limit = SHARED_LIMITS[int(architecture.removeprefix("sm_"))]
    if row["registers"] > 255:
        found.append(f"{row['registers']} registers, 255 are there")
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, a block may have {limit}")
    if row["spilled"] and reason_of(row["key"], row["spilled"]) is None:
        found.append(f"spills {row['spilled']} bytes of each thread into local memory")
    if not row["products"] and dtype != "float32" and kernel not in WITHOUT_PRODUCTS:
        found.append("has no matrix instruction")
    best = BEST[int(architecture.removeprefix("sm_"))]
    small = kernel in SMALL_TILES or variant_of(row["key"]) in NARROW
    if row["products"] not in ("", best) and dtype in ("float16", "bfloat16") and not small:
        found.append(f"multiplies by {row['products']}, {architecture} has {best}")
    if before is None or "failed" in before:
        return found
    if row["products"] != before["products"]:
        found.append(f"matrix instruction {row['products'] or 'none'}, was {before['products'] or 'none'}")
    if row["resident"] < before["resident"]:
        found.append(f"{row['resident']} blocks on a multiprocessor, were {before['resident']}")
    if row["spilled"] > MARGIN * before["spilled"]:
        found.append(f"spills {row['spilled']} bytes of each thread, were {before['spilled']}")
    return found


if __name__ == "__main__":
    sys.exit(main())
