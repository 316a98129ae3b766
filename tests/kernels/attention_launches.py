"""Every launch of the attention kernels that the compiler's gate looks at, and the figures of each.

`python tests/kernels/attention_launches.py --write` compiles them all and writes attention_resources.json beside this file;
`--json` prints the figures of those that match the options, a line each. No GPU is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it finds the checkout
from tools.triton_gate import Gate, Row, architecture_of, kernel_of, point_of  # noqa: E402

B, H, G, T = 2, 8, 4, 4096
# Head dims by dtype: every tile, and those that pad it. tf32 takes fp32's tiles, once each.
HEAD_DIMS = (64, 128, 256, 96, 16, 32, 192)
FEATURES = {"bfloat16": HEAD_DIMS, "float16": HEAD_DIMS, "float32": HEAD_DIMS, "tf32": (64, 128, 256)}
CAPABILITIES = (80, 90, 100, 120)
CALLS = ("forward", "backward", "weights", "weights_backward", "decode")
EVERYTHING = "everything"
REASONS = {  # variants and kernels that may spill, and why
    EVERYTHING: "no model uses every feature at once; it is compiled to see that the parts fit together",
    "bwd_dkdv": "dk and dv fill the registers; but for dropout, loops over tiles use little of what gives way",
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
    "dropout-of-a-part",
    "lengths",
    "packed",
    "blocks",
)
WITHOUT_PRODUCTS = ("delta_of_out", "combine")
BEST = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}  # for 16-bit operands
SMALL_TILES = ("decode",)  # 16 rows, where the instructions of sm_90 and sm_100 take 64 and more


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
        return ("relative", "dropout", "dropout-of-a-part")
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
    if on("dropout", "dropout-of-a-part"):
        numbers = 5 if point.variant == "dropout-of-a-part" else 1
        fields |= {"dropout": 0.1, "seed": torch.empty(numbers, device="meta", dtype=torch.int64)}
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
    from fastseq.benchmarks.gpu.triton_compile import attention_configs, recorded
    from fastseq.ops.types import DecodeSpec

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
            call = DecodeSpec(lengths, table, slopes, sinks, point.features**-0.5, *more, splits)
            attention_decode.attention_decode_forward(q[:, :, :1], cache, cache, call)
    return found


def wanted(spec: Any, v: bool) -> list[bool]:
    return [True, True, v, *(t is not None for t in (spec.bias, spec.relative_bias, spec.relative_q, spec.relative_k))]


def reason_of(key: str, spilled: int) -> str | None:
    """Why the kernel may spill so many bytes of each thread, if it may."""
    variant = point_of(key).split()[1]
    return REASONS.get(variant) or (FEW_REASON if spilled <= FEW else REASONS.get(kernel_of(key)))


def faults_of(row: Row) -> list[str]:
    """Of matrix products: where they are, and by which instruction."""
    _, variant, dtype, _, architecture = point_of(row["key"]).split()
    kernel, best = kernel_of(row["key"]), BEST[architecture_of(row["key"])]
    if not row["products"]:
        return [] if dtype == "float32" or kernel in WITHOUT_PRODUCTS else ["has no matrix instruction"]
    if row["products"] == best or dtype not in ("float16", "bfloat16") or kernel in SMALL_TILES or variant in NARROW:
        return []
    return [f"multiplies by {row['products']}, {architecture} has {best}"]


GATE = Gate(
    script=Path(__file__),
    table=Path(__file__).with_name("attention_resources.json"),
    points=points,
    launches=launches,
    tiles=("BM", "BN"),
    reason_of=reason_of,
    faults_of=faults_of,
)

if __name__ == "__main__":
    sys.exit(GATE.main(__doc__))
