"""``python -m fastseq info``: what is installed, what is missing and why, which backend runs what."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastseq import backends, ops
from fastseq._version import __version__
from fastseq.backends import AttentionQuery, Query, RecurrentQuery, library
from fastseq.cells import CELLS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as JSON-able data."""
    return {
        "versions": _versions(),
        "library": _library(),
        "devices": [_cpu(), *_gpus()],
        "backends": _backends(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTSEQ_")},
    }


def as_json() -> str:
    return json.dumps(collect(), indent=2)


def as_text() -> str:
    found = collect()
    lines = ["versions"]
    lines += [f"  {name:<14}{value}" for name, value in found["versions"].items()]

    state = found["library"]
    lines += ["", "library", f"  {'file':<14}{state['path'] or 'none'}"]
    lines.append(f"  {'loaded':<14}{'yes' if state['reason'] is None else 'no: ' + state['reason']}")
    if state["reason"] is None:
        lines.append(f"  {'compiled for':<14}{' '.join(state['architectures'])}")

    lines += ["", "devices"]
    for device in found["devices"]:
        facts = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        lines.append(f"  {device['device']:<14}{device['name']}" + (f" ({facts})" if facts else ""))

    lines += ["", "backends (the first that can)"]
    for backend in found["backends"]["available"]:
        lines.append(f"  {backend['name']:<14}{'available' if backend['reason'] is None else backend['reason']}")

    lines += ["", "which backend runs what"]
    for choice in found["backends"]["choices"]:
        by_backend: dict[str, list[str]] = {}
        for dtype, backend in choice["by_dtype"].items():
            by_backend.setdefault(backend, []).append(dtype)
        runs = "; ".join(f"{backend}: {' '.join(dtypes)}" for backend, dtypes in by_backend.items())
        lines.append(f"  {choice['device']:<10}{choice['op'] + ' ' + choice['call']:<24} {runs}")
    if found["environment"]:
        lines += ["", "environment", *(f"  {name}={value}" for name, value in found["environment"].items())]
    return "\n".join(lines)


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
    text = _read("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module[^\n]*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "none found" if not text else text.splitlines()[0]


def _library() -> dict[str, Any]:
    file = library.path()
    return {
        "path": str(file) if file else None,
        "bytes": file.stat().st_size if file else None,
        "reason": library.reason(),
        "architectures": library.architectures(),
    }


def _cpu() -> dict[str, Any]:
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kernels = {} if library.reason() else {"kernels": torch.ops.fastseq_native.cpu_level()}
    return {
        "device": "cpu",
        "name": model[1].strip() if model else platform.processor() or platform.machine(),
        "processors": usable,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **kernels,
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


def _backends() -> dict[str, Any]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    choices = []
    for device in devices:
        for op in ops.OPS:
            for call, query in _QUERIES[op].items():
                by_dtype = {str(dtype).removeprefix("torch."): _choice(query(device, dtype)) for dtype in DTYPES}
                choices.append({"device": str(device), "op": op, "call": call, "by_dtype": by_dtype})
    return {
        "available": [{"name": name, "reason": backends.BACKENDS[name].available()} for name in backends.ORDER],
        "choices": choices,
    }


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
}


def _choice(query: Query) -> str:
    forced = os.environ.get("FASTSEQ_BACKEND")
    if forced in backends.BACKENDS:
        against = backends.obstacles(forced, query)
        return f"none, {forced} is forced and {'; '.join(against)}" if against else forced
    return backends.select(query).name


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
