"""fastseq without its library, with a broken one, without Triton, without a GPU: it imports and says why."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq import info
from fastseq.__main__ import main
from fastseq.backends import library
from fastseq.cells import CELLS
from fastseq.ops import OPS

LIBRARY = library.path()
needs_library = pytest.mark.skipif(library.reason() is not None, reason=str(library.reason()))


def run(code: str, *, hide: tuple[str, ...] = (), **environment: str) -> str:
    """The standard output of `code` in a fresh Python that cannot import the modules `hide`."""
    prologue = f"import sys\nfor name in {hide!r}: sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", prologue + code],
        cwd=Path(fastseq.__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TELL = """
import fastseq
from fastseq import info
from fastseq.__main__ import main
from fastseq.backends import library
from fastseq.cells import CELLS
import torch
library.load()
assert library.reason() is None or library.architectures() == []
print(library.reason())
"""


def reason_for(file: Path) -> str:
    return run(TELL, FASTSEQ_LIBRARY=str(file))


def test_library_is_there_when_it_can_be():
    """`make test` builds with FASTSEQ_BUILD=auto, which never fails; this does."""
    asked = os.environ.get("FASTSEQ_BUILD", "auto")
    if asked == "none" or (asked == "auto" and not (shutil.which("c++") or shutil.which("g++"))):
        pytest.skip("built without the library on purpose")
    assert library.reason() is None


@needs_library
def test_loaded_library_answers():
    native = torch.ops.fastseq_native
    assert native.version() == fastseq.__version__
    assert library.architectures()[0] == "default"
    toolkit, driver, devices = native.cuda_versions()
    assert (toolkit > 0) == any(name.startswith("sm_") for name in library.architectures())
    assert devices == torch.cuda.device_count()
    if devices == 0:
        assert native.cuda_obstacle(0)
        with pytest.raises(RuntimeError, match="no CUDA kernel of fastseq can run on device 0"):
            native.cuda_image(0)


@needs_library
def test_environment_is_read_once():
    """Programs may set variables in any thread, and calls take microseconds."""
    code = """
import os
import fastseq
from fastseq import info
from fastseq.__main__ import main
from fastseq.backends import library
import torch
library.load()
native = torch.ops.fastseq_native
print(native.cpu_level())
os.environ["FASTSEQ_CPU_LEVEL"] = "sse9"
print(native.cpu_level())
native.forget_environment()
for level in ("sse9", "default"):
    os.environ["FASTSEQ_CPU_LEVEL"] = level
    try:
        print(native.cpu_level())
    except RuntimeError as error:
        print("FASTSEQ_CPU_LEVEL=sse9 is none of" in str(error))
"""
    assert run(code, FASTSEQ_CPU_LEVEL="default").split() == ["default", "default", "True", "default"]


@needs_library
def test_stream_symbol_is_bound_exactly_in_cuda_builds_of_torch():
    assert torch.ops.fastseq_native.cuda_stream_lent() == bool(torch.version.cuda)


def test_missing(tmp_path):
    assert (
        reason_for(tmp_path / "nowhere.so") == f"FASTSEQ_LIBRARY={tmp_path / 'nowhere.so'} is not a file; correct it or unset it"
    )


@pytest.mark.parametrize("noted", [False, True])
def test_missing_from_the_package(tmp_path, noted):
    """A pure wheel says why its build made no library, where that is known."""
    package = tmp_path / "fastseq"
    shutil.copytree(Path(fastseq.__file__).parent, package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    if noted:
        (package / "lib").mkdir()
        (package / "lib/not-built.txt").write_text("no C++ compiler was found; install g++\n")
    told = run(f"sys.path.insert(0, {str(tmp_path)!r})\n{TELL}")
    assert "\n" not in told
    if noted:
        assert "was not built when fastseq was installed (no C++ compiler was found; install g++)" in told
    else:
        assert told.startswith(f"there is no library at {package}/lib/libfastseq.so; install")


def altered(offset: int, value: bytes) -> bytes:
    content = bytearray(LIBRARY.read_bytes())
    content[offset : offset + len(value)] = value
    return bytes(content)


def renamed(old: bytes, new: bytes) -> bytes:
    content = LIBRARY.read_bytes()
    assert len(old) == len(new) and content.count(old) == 1
    return content.replace(old, new)


OTHER_VERSION = "9" * len(fastseq.__version__)
BROKEN = {
    "empty": (lambda: b"", "is not a shared library"),
    "text": (lambda: b"this is text\n" * 100, "is not a shared library"),
    # Loading one of these would end in SIGBUS.
    "truncated in the magic number": (lambda: LIBRARY.read_bytes()[:3], "is not a shared library"),
    "truncated in the header": (lambda: LIBRARY.read_bytes()[:40], "is truncated (40 bytes)"),
    "truncated in the middle": (lambda: LIBRARY.read_bytes()[:5000], "is truncated (5000 bytes)"),
    "truncated by one byte": (
        lambda: LIBRARY.read_bytes()[:-1],
        f"is truncated ({LIBRARY and LIBRARY.stat().st_size - 1} bytes)",
    ),
    "other machine": (
        lambda: altered(18, struct.pack("<H", 22)),
        "was built for ELF machine 22, this machine is",
    ),
    "32 bits": (lambda: altered(4, b"\x01"), "other than 64-bit little-endian"),
    # Some other library under our name: its constructors must not run.
    "foreign": (
        lambda: (Path(torch.__file__).parent / "lib/libshm.so").read_bytes(),
        "is a shared library, but not fastseq's",
    ),
    "other version": (
        lambda: renamed(library.MARK + fastseq.__version__.encode(), library.MARK + OTHER_VERSION.encode()),
        f"is of fastseq {OTHER_VERSION}, the Python package of {fastseq.__version__}",
    ),
    # All bytes are there and some are wrong: the dynamic loader's words are passed on.
    "damaged inside": (
        lambda: renamed(b"libtorch_cpu.so\0", b"libtorch_xyz.so\0"),
        "could not be loaded (libtorch_xyz.so: cannot open",
    ),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, str]:
    """What one fresh process says about every broken file."""
    folder = tmp_path_factory.mktemp("broken")
    files = {}
    for name, (content, _) in BROKEN.items():
        files[name] = folder / f"{name}.so"
        files[name].write_bytes(content())
    told = run(
        "import json, os, torch\nfrom fastseq.backends import library\nverdicts = {}\n"
        f"for name, file in { ({name: str(file) for name, file in files.items()})!r}.items():\n"
        "    os.environ['FASTSEQ_LIBRARY'] = file\n    library._attempted = False\n"
        "    verdicts[name] = library.reason()\n"
        "    assert library.architectures() == []\n"
        "print(json.dumps(verdicts))"
    )
    return json.loads(told)


@needs_library
@pytest.mark.parametrize("name", BROKEN)
def test_broken(verdicts, name):
    assert BROKEN[name][1] in verdicts[name]
    assert f"{name}.so" in verdicts[name]
    assert library.REINSTALL in verdicts[name] and "\n" not in verdicts[name]


@needs_library
def test_torch_too_old():
    told = run("import torch\ntorch.__version__ = '2.9.1+cpu'\n" + TELL)
    assert told == "torch 2.9.1+cpu is too old for the library; install torch >= 2.10"


@pytest.mark.parametrize("hidden", ["triton", "numpy", "rich"])
def test_import_without(hidden):
    told = run(
        "import torch\nsys.modules.pop('triton', None)\n"
        f"sys.modules[{hidden!r}] = None\n" + TELL + "from fastseq import info; print(info.as_text())"
    )
    assert "which backend runs what" in told


def test_import_is_lazy():
    """Importing fastseq imports neither Triton nor the benchmark, loads no library and touches no GPU."""
    told = run(
        "import torch\nbefore = set(sys.modules)\nimport fastseq\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'triton', 'matplotlib', 'rich', 'jinja2'}), torch.cuda.is_initialized(),"
        " sys.modules['fastseq.backends.library']._attempted)"
    )
    assert told == "[] False False"


def test_works_without_library(tmp_path):
    told = run(
        "import torch, fastseq.modules\nprint(fastseq.modules.LSTM(3, 4)(torch.randn(5, 2, 3))[0].shape)",
        FASTSEQ_LIBRARY=str(tmp_path / "nowhere.so"),
    )
    assert told == "torch.Size([5, 2, 4])"


def command(*arguments: str, hide: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, runpy\n"
        + (f"sys.modules[{hide!r}] = None\n" if hide else "")
        + "runpy.run_module('fastseq', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(fastseq.__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_info():
    told = command("info").stdout
    for expected in (
        fastseq.__version__,
        torch.__version__,
        "backends, in order of preference",
        "which backend runs what on cpu",
        "reference",
    ):
        assert expected in told
    titles = [line.split(",")[0] for line in told.splitlines() if line and not line.startswith(" ")]
    assert titles[:4] == ["devices", "versions", "library", "backends"]


@needs_library
def test_info_is_a_matrix():
    """Calls that go the same way are one row, and backends stand below their dtypes."""
    told = command("info", FASTSEQ_BACKEND="").stdout
    assert "CPU: baseline, AVX2, AVX-512, AVX512-BF16, AMX; CUDA: " in told
    lines = told[told.index("which backend runs what on cpu") :].splitlines()
    places = [match.start() for match in re.finditer(r"\S+", lines[1])]
    rows = [line for line in lines[2:] if re.match("  (recurrent|attention)", line)]
    assert all(line[place - 2 : place] == "  " and line[place] != " " for line in rows for place in places)
    lstm = next(line for line in rows if "lstm" in line)
    assert "gru" in lstm and lstm.split()[-4:] == ["cpu", "cpu", "cpu", "cpu"]
    assert sum(line.startswith("  recurrent") for line in rows) < len(CELLS)
    assert all(re.search(rf"\b{cell}\b", "\n".join(lines)) for cell in CELLS)


def test_info_as_json_with_a_broken_library(tmp_path):
    done = command("info", "--json", FASTSEQ_LIBRARY=str(tmp_path / "nowhere.so"), FASTSEQ_BACKEND="")
    found = json.loads(done.stdout)
    assert "is not a file" in found["library"]["reason"]
    assert found["devices"][0]["device"] == "cpu"
    on_cpu = [choice for choice in found["support"] if choice["device"] == "cpu"]
    by_op = {op: {choice["by_dtype"]["float32"] for choice in on_cpu if choice["op"] == op} for op in OPS}
    assert by_op["recurrent"] == {"reference", "torch"}
    assert by_op["attention"] == {"reference", "torch"}
    assert done.stderr == "", "it makes no calls, so there is nothing to warn of"


def test_info_with_a_forced_backend():
    told = command("info", FASTSEQ_BACKEND="reference").stdout
    rows = [line for line in told.splitlines() if re.match("  (recurrent|attention)", line)]
    assert all(row.split()[-4:] == ["reference"] * 4 for row in rows) and "FASTSEQ_BACKEND=reference" in told


def test_what_the_terminal_cannot_show(tmp_path, monkeypatch):
    """An encoding without a sign costs that sign alone, and a reader who leaves is no error."""

    def leaves():
        raise BrokenPipeError

    for told, wanted, status in ((lambda: "1.2\u00d7", "1.2?\n", 0), (leaves, "", 141)):
        monkeypatch.setattr(info, "as_text", told)
        with open(tmp_path / "out", "w", encoding="ascii") as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert main(["info"]) == status
        assert (tmp_path / "out").read_text() == wanted


def test_bench_without_its_packages():
    done = command("bench", "--help", hide="rich")
    assert done.returncode != 0
    assert done.stderr.strip() == "error: the benchmark needs rich; run: pip install rich"


def test_unknown_command():
    done = command("launch")
    assert done.returncode == 2 and "invalid choice: 'launch'" in done.stderr
