"""Where a result comes from: device, versions, flags that change the arithmetic, how busy the machine was.

`python -m fastseq.benchmarks.measure.environment FILE` writes it as JSON, for a GPU if there is one.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

VARIABLES = ("FASTSEQ_", "OMP_", "MKL_", "KMP_", "GOMP_")
CUDA_QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,ecc.mode.current,clocks_throttle_reasons.active"

# Flags under which the same program computes something else.
FLAGS = ("float32_matmul_precision", "cuda.matmul.allow_tf32", "cudnn.allow_tf32", "deterministic")


def collect(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat the figures; values that cannot be read are left out."""
    env: dict[str, Any] = {
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "device name": device_name(device),
        "cpu": cpu(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
        "flags": flags(),
        "git": git_sha(),
    }
    if device.startswith("cuda"):
        env["gpu"] = gpu(device)
    return {k: v for k, v in env.items() if v is not None}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu()["name"]


def where(env: dict[str, Any]) -> str:
    """The device with its processors, the commit and the date, for titles: "AMD EPYC, 2 vCPU, commit 58a2d6e, 2026-11-20"."""
    cpus = env.get("cpu", {}).get("cpus")
    parts = [str(env.get("device name", "this device")), f"{cpus} vCPU" if env.get("device") == "cpu" and cpus else ""]
    parts += [f"commit {env['git']}" if env.get("git") else "", dates(env.get("time", ""))]
    return ", ".join(part for part in parts if part)


def dates(times: str) -> str:
    """The first and the last day of "2026-11-20 13:36 UTC, ..."."""
    days = sorted(re.findall(r"\d{4}-\d\d-\d\d", times))
    return " to ".join(dict.fromkeys(days[:1] + days[-1:]))


def cpu() -> dict[str, Any]:
    """`cpus` are those this process may run on, which in a container can be fewer than the machine has."""
    name = platform.processor() or platform.machine()
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    caches = {}
    for index in sorted(glob.glob("/sys/devices/system/cpu/cpu0/cache/index*")):
        kind, level = _read(f"{index}/type"), _read(f"{index}/level")
        if kind in ("Data", "Unified"):
            caches[f"L{level}"] = _read(f"{index}/size")
    found: dict[str, Any] = {
        "name": name,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "caches": caches,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
    }
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    found["MHz"] = round(frequency.current) if frequency and frequency.current else None
    return {k: v for k, v in found.items() if v}


def gpu(device: str) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory": f"{p.total_memory / 2**30:.0f} GiB",
        "L2": f"{p.L2_cache_size / 2**20:.0f} MiB",
        "cuDNN": torch.backends.cudnn.version(),
    }
    index = torch.device(device).index or 0
    out = _run("nvidia-smi", f"--id={index}", f"--query-gpu={CUDA_QUERY}", "--format=csv,noheader")
    if out:
        found |= dict(zip(CUDA_QUERY.split(","), (v.strip() for v in out.split(",")), strict=False))
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in ("fastseq", "triton", "numpy"):
        try:
            found[package] = __import__(package).__version__
        except (ImportError, AttributeError):
            continue
    return found


def flags() -> dict[str, Any]:
    """Global settings under which the same program computes something else, or faster."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
    } | variables()


def variables() -> dict[str, str]:
    """Variables of the environment that choose programs or threads; where the user's tuning lies is the machine's own affair."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return {name: value for name, value in found.items() if name != "FASTSEQ_CACHE" or value == "off"}


class Others:
    """How much of the machine other processes use from now on."""

    def __init__(self) -> None:
        self.start = self._times()

    def share(self) -> float:
        """Fraction of all CPU time since the start, 0 to 1."""
        total, idle, own = (now - then for now, then in zip(self._times(), self.start, strict=True))
        return min(1.0, max(0.0, (total - idle - own) / total)) if total > 0 else 0.0

    @staticmethod
    def _times() -> tuple[float, float, float]:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        counted = [v for name, v in every._asdict().items() if name not in ("guest", "guest_nice")]
        ours = own.user + own.system + own.children_user + own.children_system  # children that have ended
        return sum(counted), every.idle + getattr(every, "iowait", 0.0), ours


def busy(env: dict[str, Any]) -> str | None:
    """What other programs did, if it makes the figures of the run doubtful."""
    share = env.get("cpu used by others", 0.0)
    if share > 0.05:
        return f"other programs used {share:.0%} of the CPU"
    load, cpus = env.get("load average", 0.0), env["cpu"].get("cpus", 1)
    if load > 0.5 * cpus and "cpu used by others" not in env:
        return f"the machine was busy when this began (load {load} on {cpus} CPUs)"
    return None


def conflicts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why the times of two runs cannot be compared at all."""
    devices = [(key, old.get(key), new.get(key)) for key in ("device", "device name")]
    flags = [(key, old.get("flags", {}).get(key), new.get("flags", {}).get(key)) for key in FLAGS]
    if old.get("device") == "cpu":
        flags = [flag for flag in flags if not flag[0].startswith(("cuda", "cudnn"))]
    return [f"{key} was {a}, is {b}" for key, a, b in devices + flags if a != b]


def otherwise(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why figures of two runs cannot stand side by side as those of one."""
    return [*conflicts(old, new), *differences(old, new, ("versions", "flags"))]


def differences(old: dict[str, Any], new: dict[str, Any], parts: Sequence[str]) -> list[str]:
    """What of these parts of the environment is not the same."""
    found = []
    for part in parts:
        before, after = (_flat(part, env.get(part, "not told")) for env in (old, new))
        keys = [key for key in {**before, **after} if not key.endswith("MHz") and ": clocks." not in key]
        differing = [key for key in keys if before.get(key) != after.get(key)]
        found += [f"{key} was {before.get(key, 'not told')}, is {after.get(key, 'not told')}" for key in differing]
    return found


def _flat(what: str, told: Any) -> dict[str, Any]:
    return {f"{what}: {key}": value for key, value in told.items()} if isinstance(told, dict) else {what: told}


def git_sha() -> str | None:
    here = str(Path(__file__).resolve().parent)
    sha = _run("git", "-C", here, "rev-parse", "--short", "HEAD")
    if not sha:
        return None
    return sha + ("+changes" if _run("git", "-C", here, "status", "--porcelain", "--untracked-files=no") else "")


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def write(file: Path) -> None:
    """What `collect` finds, and the state of the compiled library, as JSON."""
    from fastseq.backends import library

    found = collect("cuda" if torch.cuda.is_available() else "cpu")
    found["library"] = library.reason() or " ".join(library.architectures())
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
