"""One library file under two torches: this environment's, and a CUDA build in an environment under build/.

The file is examined with readelf, then loaded and run by both. In the CUDA build its weak CUDA symbols must
be bound, in a CPU build they must not be; neither needs a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "fastseq/lib/libfastseq.so"

PROBE = """
import torch, fastseq
from fastseq import modules
from fastseq.backends import library

assert library.reason() is None, library.reason()
native = torch.ops.fastseq_native
assert native.version() == fastseq.__version__
lent = native.cuda_stream_lent()
assert lent == bool(torch.version.cuda), "the weak CUDA symbols are bound exactly in a CUDA build of torch"
worst = 0.0
for name in ("LSTM", "GRU", "RNN"):
    torch.manual_seed(0)
    expected_module = getattr(torch.nn, name)(7, 9, num_layers=2, bidirectional=True)
    module = getattr(modules, name)(7, 9, num_layers=2, bidirectional=True)
    module.load_state_dict(expected_module.state_dict())
    x = torch.randn(11, 3, 7)
    with fastseq.use_backend("cpu"):
        output = module(x)[0]
        output.sum().backward()
    expected = expected_module(x)[0]
    expected.sum().backward()
    worst = max(worst, (output - expected).abs().max().item())
    for mine, theirs in zip(module.parameters(), expected_module.parameters(), strict=True):
        worst = max(worst, ((mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max()).item())
assert worst < 1e-4, worst
print(f"torch {torch.__version__}: {' '.join(library.architectures())}; "
      f"cuda_versions {native.cuda_versions()}, stream lent {lent}, against torch.nn: {worst:.1e}")
"""


def check_dynamic_section() -> None:
    dump = subprocess.run(["readelf", "-d", str(LIBRARY)], check=True, capture_output=True, text=True).stdout
    for name in ("libtorch.so", "libtorch_cpu.so"):
        assert f"[{name}]" in dump, f"{name} is not NEEDED"
    for name in ("libtorch_cuda", "libtorch_python", "libcudart", "libpython", "RPATH", "RUNPATH"):
        assert name not in dump, f"{name} is in the dynamic section"


def cuda_environment(version: str) -> Path:
    folder = ROOT / "build" / f"torch-{version}"
    python = folder / "bin/python"
    stamp = folder / ".installed"
    if not stamp.is_file():
        print(f"installing torch {version} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [
                str(python),
                "-m",
                "pip",
                "--disable-pip-version-check",
                "install",
                "--quiet",
                f"torch=={version}",
                "numpy",
            ],
            check=True,
        )
        stamp.touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda-torch", required=True, metavar="VERSION", help="the version whose CUDA build is installed")
    arguments = parser.parse_args()
    if not LIBRARY.is_file():
        raise SystemExit(f"error: there is no {LIBRARY}; `make library` says why")
    check_dynamic_section()
    print(f"{LIBRARY.name}: sha256 {hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:16]}", flush=True)
    for python in (sys.executable, str(cuda_environment(arguments.cuda_torch))):
        status = subprocess.run([python, "-c", PROBE], cwd=ROOT, check=False).returncode
        if status:
            raise SystemExit(f"error: {python} ended with status {status}")


if __name__ == "__main__":
    main()
