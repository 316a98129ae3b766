"""The build: runs CMake for the native library and puts kernels/ and benchmarks/ into the package.

Metadata stand in pyproject.toml; sources, flags and architectures in CMakeLists.txt. torch is found by its
path and never imported, so a build needs no torch of its own: the library uses torch's stable ABI, and any
torch >= 2.10 has the headers for it.

Environment:
    FASTSEQ_BUILD          auto (default): CUDA if nvcc is found, else CPU; on any trouble a package without
                           the library, never a failed install
                           cuda, cpu: exactly that, or an error;  none: no library
    FASTSEQ_BUILD_LEVELS   native: the CPU kernels of this machine's instructions alone, in half the time (`make bench`
                           in a checkout without a library does so); all (default)
    FASTSEQ_TORCH_DIR      the torch package to build against, where it is not found by itself
    CUDA_HOME              the CUDA toolkit (CUDACXX, CUDA_PATH, PATH and /usr/local/cuda are looked at too)
    TORCH_CUDA_ARCH_LIST   CUDA architectures, as for torch's own extensions: "8.0 9.0a+PTX"
    MAX_JOBS               compilers at a time (default: the processors, as far as there are 4 GB for each)
"""

from __future__ import annotations

import collections
import operator
import os
import platform
import re
import shutil
import site
import struct
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
FOLDERS = ("kernels", "benchmarks")  # top-level folders installed as fastseq.<folder>
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "results", "README.md")
MODES = ("auto", "cuda", "cpu", "none")
OLDEST_TORCH = (2, 10)
OLDEST_CMAKE = (3, 26)
# glibc, and the newest GLIBCXX, CXXABI and GCC of the distributions that have it (PEP 600). torch's own wheels need the first.
RUNTIMES = (
    ((2, 28), (3, 4, 24), (1, 3, 11), (7, 0, 0)),
    ((2, 31), (3, 4, 28), (1, 3, 12), (7, 0, 0)),
    ((2, 34), (3, 4, 29), (1, 3, 13), (7, 0, 0)),
    ((2, 35), (3, 4, 30), (1, 3, 13), (12, 0, 0)),
    ((2, 39), (3, 4, 33), (1, 3, 15), (14, 0, 0)),
)


class BuildError(Exception):
    """Why there is no library: one sentence, and what to do about it."""


def build_mode() -> str:
    mode = os.environ.get("FASTSEQ_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        raise SystemExit(f"error: FASTSEQ_BUILD={os.environ['FASTSEQ_BUILD']!r} is not one of {', '.join(MODES)}")
    return mode


def site_packages() -> Iterator[Path]:
    """Where torch may be installed, best first. An isolated build sees none of them on sys.path."""
    paths = sysconfig.get_paths()
    yield from (Path(paths["purelib"]), Path(paths["platlib"]))
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            yield from sorted(Path(os.environ[variable]).glob("lib/python3*/site-packages"), reverse=True)
    yield Path(site.getusersitepackages())
    yield from map(Path, site.getsitepackages())


def find_torch() -> Path:
    chosen = os.environ.get("FASTSEQ_TORCH_DIR")
    places = [Path(chosen)] if chosen else [folder / "torch" for folder in site_packages()]
    for folder in places:
        if (folder / "include/torch/csrc").is_dir() and (folder / "lib/libtorch.so").is_file():
            break
    else:
        if chosen:
            raise BuildError(f"FASTSEQ_TORCH_DIR={chosen} is no installed torch (no include/ and lib/libtorch.so)")
        raise BuildError(
            "torch was not found (looked in " + ", ".join(dict.fromkeys(map(str, places))) + "); install torch >= 2.10 first, "
            "activate the environment that has it, or set FASTSEQ_TORCH_DIR to the torch package's folder"
        )
    version_file = folder / "version.py"
    found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", version_file.read_text() if version_file.is_file() else "")
    if found and (int(found[2]), int(found[3])) < OLDEST_TORCH:
        raise BuildError(f"torch {found[1]} in {folder} is too old; install torch >= 2.10")
    return folder


def find_nvcc() -> Path | None:
    places = [
        os.environ.get("CUDACXX"),
        *(os.path.join(os.environ[name], "bin/nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)),
    ]
    if not any(places):
        places = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((Path(place) for place in places if place and os.access(place, os.X_OK)), None)


def find_tool(name: str, package_path: str) -> str | None:
    """A program from its Python package (whose launcher fails in an isolated build) or from PATH."""
    candidates = [str(folder / package_path) for folder in site_packages()]
    for candidate in (*candidates, os.path.join(sysconfig.get_path("scripts"), name), shutil.which(name)):
        if candidate and os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
            answer = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
            found = re.search(r"(\d+)\.(\d+)", answer.stdout)
            if answer.returncode == 0 and found and (name != "cmake" or (int(found[1]), int(found[2])) >= OLDEST_CMAKE):
                return candidate
    return None


def find_cmake() -> str | None:
    return find_tool("cmake", "cmake/data/bin/cmake")


def find_ninja() -> str | None:
    return find_tool("ninja", "ninja/data/bin/ninja")


def find_compiler() -> str | None:
    if os.environ.get("CXX"):
        return shutil.which(os.environ["CXX"].split()[-1])  # "ccache g++" too
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def jobs() -> int:
    """MAX_JOBS, or as many compilers as there are processors and 4 GB for."""
    if os.environ.get("MAX_JOBS"):
        try:
            return max(1, int(os.environ["MAX_JOBS"]))
        except ValueError:
            raise BuildError(f"MAX_JOBS={os.environ['MAX_JOBS']!r} is not a whole number") from None
    processors = len(os.sched_getaffinity(0))
    meminfo = Path("/proc/meminfo")
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text() if meminfo.is_file() else "")
    return max(1, min(processors, int(available[1]) // (4 << 20))) if available else processors


def start_afresh_if_changed(folder: Path, choices: list[str]) -> None:
    """CMake keeps the compilers and flags of its first run whatever is set later."""
    flags = [f"{name}={os.environ.get(name, '')}" for name in ("CXX", "CXXFLAGS", "CUDAHOSTCXX", "CUDAFLAGS", "LDFLAGS")]
    wanted = "\n".join([*choices, *flags])
    record = folder / "choices.txt"
    if not record.is_file() or record.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        record.write_text(wanted)


def run_visibly(command: list[str]) -> None:
    """Run, show the output as it comes; its last lines go into the error."""
    print("+", " ".join(command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    tail: collections.deque[str] = collections.deque(maxlen=25)
    for line in process.stdout:
        print(line, end="", flush=True)
        tail.append(line)
    if process.wait() != 0:
        raise BuildError(f"{Path(command[0]).name} failed:\n{''.join(tail).rstrip()}")


def compile_library(kind: str) -> Path:
    """Build the library (kind: cuda or cpu) and return its path.

    Raises:
        BuildError: if anything that it takes is missing, or CMake, a compiler or the linker fails.
    """
    if platform.system() != "Linux":
        raise BuildError(f"the library is for Linux, this is {platform.system()}; FASTSEQ_BUILD=none installs without it")
    torch = find_torch()
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found; install g++ (11 or newer) or set CXX")
    cmake, ninja = find_cmake(), find_ninja()
    if cmake is None or ninja is None:
        missing = " and ".join(name for name, path in (("cmake >= 3.26", cmake), ("ninja", ninja)) if path is None)
        raise BuildError(f"{missing} not found; `pip install cmake ninja`")
    options = [
        f"-DFASTSEQ_TORCH_DIR={torch}",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DFASTSEQ_CUDA={'ON' if kind == 'cuda' else 'OFF'}",
    ]
    if kind == "cuda":
        nvcc = find_nvcc()
        if nvcc is None:
            asked = next(
                (f"{name}={os.environ[name]}" for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH") if os.environ.get(name)),
                None,
            )
            raise BuildError(f"nvcc was not found{f' ({asked})' if asked else ''}; set CUDA_HOME to CUDA's toolkit")
        options.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    folder = ROOT / "build" / f"native-{kind}"
    start_afresh_if_changed(folder, [compiler, *options[:1], *options[3:]])
    count = jobs()
    levels = os.environ.get("FASTSEQ_BUILD_LEVELS", "").strip().lower() or "all"
    run_visibly([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options, f"-DFASTSEQ_BUILD_LEVELS={levels}"])
    run_visibly([cmake, "--build", str(folder), "--parallel", str(count)])
    return folder / "libfastseq.so"


def obtain_library(mode: str) -> tuple[Path | None, str]:
    """The library that FASTSEQ_BUILD asks for, or None and why there is none."""
    if mode == "none":
        return None, "FASTSEQ_BUILD=none was set"
    if mode in ("cuda", "cpu"):
        try:
            return compile_library(mode), ""
        except BuildError as error:
            raise SystemExit(f"error: FASTSEQ_BUILD={mode}: {error}") from None
    trouble = []
    for kind in ("cuda", "cpu") if find_nvcc() else ("cpu",):
        try:
            library = compile_library(kind)
        except (BuildError, OSError) as error:
            trouble.append(str(error))
            continue
        if trouble:
            say_boxed(
                "fastseq was built for the CPU only.",
                trouble,
                "FASTSEQ_BUILD=cuda stops with this error instead.",
            )
        return library, ""
    say_boxed(
        "fastseq was built without its native library; it works, slower on a CPU.",
        trouble,
        "FASTSEQ_BUILD=cpu (or cuda) stops with this error instead; FASTSEQ_BUILD=none wants no library.",
    )
    return None, trouble[-1]


def say_boxed(headline: str, reasons: list[str], hint: str) -> None:
    lines = [headline, ""]
    for text in (*reasons, hint):
        for line in text.splitlines():
            lines += textwrap.wrap(line, 96, drop_whitespace=False) or [""]
    rule = "+" + "-" * 98 + "+"
    print("\n".join(["", rule, *(f"| {line:<96} |" for line in lines), rule, ""]), file=sys.stderr, flush=True)


def needed_versions(library: Path) -> set[str]:
    """The versions of symbols that a library needs of others, "GLIBC_2.34" and the like: its section .gnu.version_r."""
    content = library.read_bytes()
    (table,), (size, count) = struct.unpack_from("<Q", content, 0x28), struct.unpack_from("<HH", content, 0x3A)
    # of each section: name, type, flags, address, offset, size, link, info
    sections = [struct.unpack_from("<IIQQQQII", content, table + size * index) for index in range(count)]
    found = set()
    for _, kind, _, _, entry, _, link, files in sections:
        if kind != 0x6FFFFFFE:
            continue
        names = sections[link][4]
        for _ in range(files):
            _, versions, _, first, following = struct.unpack_from("<HHIII", content, entry)
            item = entry + first
            for _ in range(versions):
                _, _, _, name, step = struct.unpack_from("<IHHII", content, item)
                found.add(content[names + name : content.index(0, names + name)].decode())
                item += step
            entry += following
    return found


def manylinux(needed: set[str]) -> tuple[int, int] | None:
    """The oldest glibc whose distributions have all of these versions, libstdc++'s among them; None: no such is known."""

    def newest(prefix: str) -> tuple[int, ...]:
        own = [version.removeprefix(prefix) for version in needed if version.startswith(prefix)]
        return max((tuple(map(int, version.split("."))) for version in own if re.fullmatch(r"[\d.]+", version)), default=())

    glibc = newest("GLIBC_")
    for oldest, *runtime in RUNTIMES if glibc else ():
        if all(map(operator.le, map(newest, ("GLIBCXX_", "CXXABI_", "GCC_")), runtime)):
            return max(oldest, (glibc[0], glibc[1]))
    return None


class FastseqDistribution(Distribution):
    """Knows which library it carries: that decides the wheel's tag and where its files are installed."""

    library: Path | None = None

    def has_ext_modules(self) -> bool:
        return self.library is not None


class Build(build):
    """setuptools' build, then the folders and the library that it does not know about."""

    sub_commands = [*build.sub_commands, ("build_folders", None), ("build_native", None)]

    def run(self) -> None:
        # Left by an earlier build, a module that no longer exists would be packed again.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Addition(Command):
    """A step of the build that adds files to the package."""

    user_options = [("inplace", "i", "write into the checkout instead of the build folder")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def package(self) -> Path:
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib or "build/lib")) / "fastseq"

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildFolders(Addition):
    """kernels/ and benchmarks/ become fastseq.kernels and fastseq.benchmarks; a checkout needs no copy."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            return
        for folder in FOLDERS:
            if (ROOT / folder).is_dir():
                shutil.copytree(ROOT / folder, self.package() / folder, ignore=NOT_SHIPPED, dirs_exist_ok=True)


class BuildNative(Addition):
    """fastseq/lib/libfastseq.so, or fastseq/lib/not-built.txt, which says why there is none."""

    def run(self) -> None:
        library, why = obtain_library(build_mode())
        self.distribution.library = library
        folder = self.package() / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        target, note = folder / "libfastseq.so", folder / "not-built.txt"
        if library is None:
            target.unlink(missing_ok=True)
            note.write_text(f"{why}\n")
            return
        note.unlink(missing_ok=True)
        # Renamed into place: a process that has the old file mapped keeps it.
        fresh = folder / f".libfastseq.so.{os.getpid()}"
        shutil.copy(library, fresh)
        os.replace(fresh, target)


class Wheel(bdist_wheel):
    """py3-none-<platform> with the library, py3-none-any without: no Python ABI, only torch's stable one.

    The platform is the oldest manylinux that has what the library needs; linux, for this machine alone, if that is not known, or
    newer than this machine's own glibc, whose pip would refuse it.
    """

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = self.distribution.library is None
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return "py3", "none", "any"
        name = re.sub(r"[-.]", "_", self.plat_name or sysconfig.get_platform())
        if not name.startswith("linux_") or not self.distribution.library:
            return "py3", "none", name
        oldest, here = manylinux(needed_versions(self.distribution.library)), platform.libc_ver()
        if oldest is None or here[0] != "glibc" or oldest > tuple(map(int, here[1].split(".")[:2])):
            return "py3", "none", name
        return "py3", "none", f"manylinux_{oldest[0]}_{oldest[1]}_{name.removeprefix('linux_')}"


def build_tools() -> list[str]:
    """What an isolated build has to fetch: nothing where it is installed, or no library can be built."""
    if build_mode() == "none" or not {"egg_info", "bdist_wheel"} & set(sys.argv):
        return []
    try:
        find_torch()
    except BuildError:
        return []
    return [name for name, path in (("cmake>=3.26", find_cmake()), ("ninja", find_ninja())) if path is None]


setup(
    distclass=FastseqDistribution,
    setup_requires=build_tools(),
    cmdclass={"build": Build, "build_folders": BuildFolders, "build_native": BuildNative, "bdist_wheel": Wheel},
)
