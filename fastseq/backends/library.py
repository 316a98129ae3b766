"""The compiled library: found, examined, loaded once; what is wrong with it becomes one sentence.

The file is examined before it is loaded, because loading is too late: a truncated file kills the process
(SIGBUS), and a foreign one would have run its constructors.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import struct
import threading
from pathlib import Path

import torch

from fastseq._version import __version__

__all__ = ["architectures", "load", "path", "reason"]

OLDEST_TORCH = (2, 10)
MARK = b"fastseq-native-library "  # csrc/common/build.cpp
ELF_MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
REINSTALL = "reinstall fastseq-kernels (in a checkout: `make library`)"

_lock = threading.Lock()
_attempted = False
_reason: str | None = None


def path() -> Path | None:
    """``FASTSEQ_LIBRARY`` if set, else ``lib/libfastseq.so`` in the package; None if there is no file."""
    file = _expected_path()
    return file if file.is_file() else None


def load() -> None:
    """Load the library unless that was tried before. Never raises; ``reason()`` tells how it went."""
    global _attempted, _reason
    with _lock:
        if not _attempted:
            _reason = _load()
            _attempted = True


def reason() -> str | None:
    """None if the library is loaded (loading it if need be); else one sentence: why not, and the fix."""
    if not _attempted:
        load()
    return _reason


def architectures() -> list[str]:
    """CPU levels (``default``, ``avx2``, ...), CUDA machine code (``sm_90a``), PTX (``compute_120``).

    Empty without a library.
    """
    return [] if reason() else list(torch.ops.fastseq_native.architectures())


def _expected_path() -> Path:
    chosen = os.environ.get("FASTSEQ_LIBRARY")
    return Path(chosen).expanduser().resolve() if chosen else Path(__file__).resolve().parent.parent / "lib" / "libfastseq.so"


def _load() -> str | None:
    file = _expected_path()
    try:
        obstacle = _missing(file) or _torch_too_old() or _damaged(file) or _foreign(file)
        if obstacle is None:
            torch.ops.load_library(str(file))
    except (OSError, RuntimeError, ValueError) as error:
        summary = " ".join(str(error.__cause__ or error).split())  # torch wraps the loader's own words
        return f"{file} could not be loaded ({summary}); {REINSTALL}"
    return obstacle


def _missing(file: Path) -> str | None:
    if file.is_file():
        return None
    if os.environ.get("FASTSEQ_LIBRARY"):
        return f"FASTSEQ_LIBRARY={os.environ['FASTSEQ_LIBRARY']} is not a file; correct it or unset it"
    if platform.system() != "Linux":
        return f"the library is for Linux, this is {platform.system()}: torch's kernels and PyTorch operations run instead"
    note = file.with_name("not-built.txt")
    if note.is_file():
        why = next(iter(note.read_text(errors="replace").splitlines()), "").rstrip(": ")
        return f"the library was not built when fastseq was installed ({why}); {REINSTALL} once that is mended"
    return (
        f"there is no library at {file}; install a wheel that has it, or build it with a C++ compiler "
        "(in a checkout: `make library`)"
    )


def _torch_too_old() -> str | None:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {torch.__version__} is too old for the library; install torch >= {oldest}"
    return None


def _damaged(file: Path) -> str | None:
    """Whether this is an ELF file of this machine, all of it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(64)
        if header[:4] != b"\x7fELF":
            return f"{file} is not a shared library; {REINSTALL}"
        if len(header) < 64 or header[4] != 2 or header[5] != 1:  # complete, 64 bits, little-endian
            if len(header) < 64:
                return _truncated(file)
            return f"{file} was built for a machine other than 64-bit little-endian; {REINSTALL} on this machine"
        machine, *_ = struct.unpack_from("<H", header, 18)
        program_offset, section_offset = struct.unpack_from("<QQ", header, 32)
        program_size, program_count, section_size, section_count = struct.unpack_from("<HHHH", header, 54)
        if ELF_MACHINES.get(machine) != platform.machine():
            built_for = ELF_MACHINES.get(machine, f"ELF machine {machine}")
            here = platform.machine()
            return f"{file} was built for {built_for}, this machine is {here}; {REINSTALL} on this machine"
        if program_offset + program_size * program_count > size or section_offset + section_size * section_count > size:
            return _truncated(file)
        stream.seek(program_offset)
        table = stream.read(program_size * program_count)
    for index in range(program_count):
        _, _, offset, _, _, stored, _, _ = struct.unpack_from("<IIQQQQQQ", table, index * program_size)
        if offset + stored > size:
            return _truncated(file)
    return None


def _truncated(file: Path) -> str:
    return f"{file} is truncated ({file.stat().st_size} bytes); {REINSTALL}"


def _foreign(file: Path) -> str | None:
    """Whether this is fastseq's library, in the version of this Python package."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(MARK)
        mark = b"" if start < 0 else content[start + len(MARK) : start + len(MARK) + 64].split(b"\0")[0]
    if start < 0:
        return f"{file} is a shared library, but not fastseq's; {REINSTALL}"
    version = mark.decode(errors="replace")
    if version != __version__:
        return f"{file} is of fastseq {version}, the Python package of {__version__}; {REINSTALL}"
    return None
