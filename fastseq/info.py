"""``python -m fastseq info``: what is installed, what is missing and why, which backend runs what.

``--json`` has one key more: ``matrix``, of every op, device and dtype whether its kernels were measured or tested.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from fastseq import backends, ops, support_matrix
from fastseq._version import __version__
from fastseq.backends import AttentionQuery, Query, RecurrentQuery, ScanQuery, library
from fastseq.cells import CELLS
from fastseq.choice import self_check, sources, store
from fastseq.choice.device import WORDS, cpu_name, driver

_CALLS = 44  # columns of the matrix for the names of calls
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as JSON-able data."""
    return {
        "devices": [_cpu(), *_gpus()],
        "versions": _versions(),
        "library": _library(),
        "backends": [{"name": name, "reason": backends.BACKENDS[name].available()} for name in backends.ORDER],
        "self_check": _self_check(),
        "support": _support(),
        "matrix": {
            "states": support_matrix.STATES,
            "rows": support_matrix.rows(),
            "platforms": support_matrix.PLATFORMS,
        },
        "choice": _stored(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTSEQ_")},
    }


def as_json() -> str:
    return json.dumps(collect(), indent=2)


def as_text() -> str:
    found = collect()
    lines = ["devices"]
    for device in found["devices"]:
        facts = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        lines.append(f"  {device['device']:<14}{device['name']}" + (f" ({facts})" if facts else ""))

    lines += ["", "versions"]
    lines += [f"  {name:<14}{value}" for name, value in found["versions"].items()]

    state = found["library"]
    lines += ["", "library", f"  {'file':<14}{state['path'] or 'none'}"]
    lines.append(f"  {'loaded':<14}{'yes' if state['reason'] is None else 'no: ' + state['reason']}")
    if state["reason"] is None:
        targets = "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in state["targets"].items())
        lines.append(f"  {'compiled for':<14}{targets}")

    lines += ["", "backends, in order of preference"]
    for backend in found["backends"]:
        lines.append(f"  {backend['name']:<14}{'available' if backend['reason'] is None else backend['reason']}")

    if found["self_check"]:
        lines += ["", f"self-check of the GPU's kernels (FASTSEQ_SELF_CHECK={self_check.mode()})"]
        lines += [
            f"  {verdict['family']}: {'right' if verdict['right'] else 'wrong, ' + verdict['words']}"
            for verdict in found["self_check"]
        ]

    for device in dict.fromkeys(choice["device"] for choice in found["support"]):
        lines += ["", f"which backend runs what on {device}"]
        lines += _matrix([choice for choice in found["support"] if choice["device"] == device])
    if any("none" in choice["by_dtype"].values() for choice in found["support"]):
        lines.append("  none: the backend that FASTSEQ_BACKEND forces cannot run it, and raises")
    stored = found["choice"]
    lines += ["", "choice", f"  {'tuned calls':<14}{stored['used']} used here, {stored['others']} of other devices or versions"]
    lines.append(f"  {'store':<14}{stored['path'] or 'none (FASTSEQ_CACHE=off, or no home)'}")
    if found["environment"]:
        lines += ["", "environment", *(f"  {name}={value}" for name, value in found["environment"].items())]
    return "\n".join(lines)


def _matrix(choices: list[dict[str, Any]]) -> list[str]:
    """A row for the calls of an op that go the same way, a column for each dtype."""
    folded: dict[tuple[str, ...], list[str]] = {}
    for choice in choices:
        folded.setdefault((choice["op"], *choice["by_dtype"].values()), []).append(choice["call"])
    rows = []  # cells of each line; calls that do not fit go on in the next
    for (op, *by_dtype), calls in folded.items():
        first, *more = textwrap.wrap(", ".join(calls), _CALLS)
        rows += [[op, first, *by_dtype], *([["", line] for line in more])]
    head = ["", "", *choices[0]["by_dtype"]]
    widths = [max(len(row[column]) for row in [head, *rows] if column < len(row)) for column in range(len(head))]
    return [
        ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))).rstrip() for row in [head, *rows]
    ]


def _versions() -> dict[str, str]:
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    versions = {
        "fastseq": __version__,
        "torch": f"{torch.__version__} ({built_for})",
        "triton": _triton(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    toolkit, driver, _ = _cuda_versions()
    if library.reason() is None:
        versions["CUDA toolkit"] = (
            f"{_cuda_version(toolkit)}, in the library" if toolkit else "none: the library was built without CUDA"
        )
    versions["CUDA driver"] = _driver() + (f", up to CUDA {_cuda_version(driver)}" if driver else "")
    return versions


def _triton() -> str:
    """Triton's version, or why it cannot be imported."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError as error:
        return f"not usable: {error}"
    except Exception as error:  # a broken install raises whatever it likes, and this page is there to show it
        return f"not usable: {type(error).__name__}: {error}"


def _cuda_versions() -> tuple[int, int, int]:
    if library.reason() is not None:
        return 0, 0, 0
    toolkit, driver, devices = torch.ops.fastseq_native.cuda_versions()
    return toolkit, driver, devices


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> str:
    return "none found" if driver() == "none" else driver()


def _library() -> dict[str, Any]:
    file = library.path()
    names = library.architectures()
    return {
        "path": str(file) if file else None,
        "bytes": file.stat().st_size if file else None,
        "reason": library.reason(),
        "targets": {
            "CPU": [WORDS.get(name, name) for name in names if not name.startswith(("sm_", "compute_"))],
            "CUDA": [name for name in names if name.startswith("sm_")],
            "PTX": [name for name in names if name.startswith("compute_")],
        },
    }


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    used = torch.backends.cpu.get_cpu_capability()
    level = "none" if library.reason() else torch.ops.fastseq_native.cpu_level()
    obstacle = level in ("avx512", "avx512_bf16") and torch.ops.fastseq_native.cpu_amx_obstacle()
    return {
        "device": "cpu",
        "name": cpu_name(),
        "processors": usable,
        "threads": torch.get_num_threads(),
        "torch kernels": WORDS.get(used.lower(), used),
        "fastseq kernels": WORDS.get(level, level),
        **({"AMX not used": obstacle} if obstacle else {}),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu: dict[str, Any] = {
            "device": f"cuda:{index}",
            "name": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "multiprocessors": properties.multi_processor_count,
        }
        if library.reason() is None:
            obstacle = torch.ops.fastseq_native.cuda_obstacle(index)
            if obstacle:
                gpu["library"] = f"cannot run on it: {obstacle}"
            else:
                machine, ptx = torch.ops.fastseq_native.cuda_image(index)
                gpu["library"] = f"runs sm_{machine}" + (f", from PTX {ptx}" if machine != ptx else "")
        found.append(gpu)
    return found


def _self_check() -> list[dict[str, Any]]:
    """What this machine has found out about the kernels of its devices."""
    return [
        {"device": str(device), "family": family, **verdict._asdict()}
        for device in _devices()
        for family, verdict in self_check.known(device)
    ]


def _devices() -> list[torch.device]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]


def _support() -> list[dict[str, Any]]:
    """What is chosen for calls that nobody makes: nothing to warn of."""
    logger = logging.getLogger("fastseq")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return _choices()
    finally:
        logger.setLevel(level)


def _choices() -> list[dict[str, Any]]:
    choices = []
    for device in _devices():
        for op in ops.OPS:
            for call, query in _QUERIES[op].items():
                by_dtype = {str(dtype).removeprefix("torch."): _choice(query(device, dtype)) for dtype in DTYPES}
                choices.append({"device": str(device), "op": op, "call": call, "by_dtype": by_dtype})
    return choices


def _recurrent(cell: str) -> Callable[[torch.device, torch.dtype], Query]:
    return lambda device, dtype: RecurrentQuery("recurrent", device, dtype, cell, 128, 1, 256, False, "padded")


def _attention(op: str, call: str, uses: tuple[str, ...] = ()) -> Callable[[torch.device, torch.dtype], Query]:
    backward = call.endswith("backward")
    return lambda device, dtype: AttentionQuery(
        op=op,
        call=call,
        device=device,
        dtype=dtype,
        batch=2,
        heads=(8, 8),
        lengths=(1 if call == "decode" else 1024, 1024),
        features=(64, 64),
        layout="contiguous" if call == "decode" else "padded",
        window=(-1, 0),
        offset=0,
        block_size=0,
        uses=uses,
        gradients=("q", "k", "v", *uses) if backward else (),
    )


def _scan(call: str) -> Callable[[torch.device, torch.dtype], Query]:
    return lambda device, dtype: ScanQuery("scan", call, device, dtype, "real", 1024, 8, 256, "padded", ())


# A middling call of each kind; `fastseq.explain` answers for a given one.
_QUERIES: dict[str, dict[str, Callable[[torch.device, torch.dtype], Query]]] = {
    "recurrent": {cell: _recurrent(cell) for cell in CELLS},
    "attention": {
        "forward": _attention("attention", "forward"),
        "backward": _attention("attention", "backward"),
        "bias backward": _attention("attention", "backward", ("bias",)),
        "weights": _attention("attention", "weights"),
    },
    "attention_decode": {"decode": _attention("attention_decode", "decode")},
    "scan": {"forward": _scan("forward"), "backward": _scan("backward")},
}


def _choice(query: Query) -> str:
    forced = os.environ.get("FASTSEQ_BACKEND")
    if forced in backends.BACKENDS:
        against = backends.obstacles(forced, query)
        return "none" if against else forced
    with self_check.known_alone():
        return backends.chosen(query).backend


def _stored() -> dict[str, Any]:
    """What of the store holds for the devices and versions of now."""
    used = sum(len(points) for kin in sources.tuned().values() for points in kin.values())
    path = store.path("tuned")
    return {"path": str(path) if path else None, "used": used, "others": len(store.read("tuned")) - used}
