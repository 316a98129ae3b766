"""The torch of `.venv`, before the other requirements: its CPU build where there is no GPU, which is several GB less.

    install_torch.py REQUIREMENT [--index URL]

REQUIREMENT is torch's line of requirements/bench.txt. With --index it comes from there, and a failure ends this. Without one, and
without a GPU, pip is asked which build it would take; if that brings CUDA, the CPU build is taken from torch's index. If that
index cannot be reached nothing is installed here: the requirements that follow take what pip finds.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
ONCE = ["--retries", "0", "--timeout", "15"]  # an index that is not there must not hold anybody up


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded or its tool sees a device."""
    try:
        open("/proc/driver/nvidia/version").close()
        return True
    except OSError:
        tool = shutil.which("nvidia-smi")
        return bool(tool) and b"GPU" in subprocess.run([tool, "-L"], capture_output=True, check=False).stdout


def is_installed(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    done = subprocess.run([*PIP, "show", name], capture_output=True, text=True, check=False)
    found = next((line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("Version: ")), "")
    return found.partition("+")[0] == version


def brings_cuda(requirement: str) -> bool:
    """Whether the build that pip would take does, as far as pip can tell; nothing is downloaded."""
    done = subprocess.run(
        [*PIP, "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", *ONCE, requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return True
    (chosen,) = json.loads(done.stdout)["install"]
    needs = chosen["metadata"].get("requires_dist", [])
    return any(need.startswith(("nvidia-", "cuda-")) for need in needs) or "+cu" in chosen["metadata"]["version"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirement", metavar="REQUIREMENT")
    parser.add_argument("--index", metavar="URL", default="")
    arguments = parser.parse_args()
    if arguments.index:
        return subprocess.run([*PIP, "install", "--index-url", arguments.index, arguments.requirement], check=False).returncode
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or has_gpu() or is_installed(arguments.requirement):
        return 0  # elsewhere the usual build is the CPU's
    if not brings_cuda(arguments.requirement):
        return 0
    print(f"no GPU here: {arguments.requirement} comes from {CPU_INDEX} (TORCH_INDEX chooses another)", flush=True)
    done = subprocess.run([*PIP, "install", "--no-deps", *ONCE, "--index-url", CPU_INDEX, arguments.requirement], check=False)
    if done.returncode:
        print(f"{CPU_INDEX} gave none: pip's own index follows, whose build may bring CUDA (several GB)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
