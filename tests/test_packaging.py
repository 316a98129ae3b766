"""What is built from this checkout: sdist, wheels with and without the library, editable installs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastseq
from fastseq.backends import library
from tools import install_torch

ROOT = Path(fastseq.__file__).parents[1]
if not (ROOT / "setup.py").is_file():
    pytest.skip("fastseq is not tested from its checkout", allow_module_level=True)

# The builds share a folder, and each test the ones before it.
pytestmark = pytest.mark.xdist_group("packaging")

FOLDERS = ("kernels", "benchmarks")
GLIBC = re.compile(r"GLIBC_[\d.]+").fullmatch
TORCH = Path(torch.__file__).parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_library = pytest.mark.skipif(library.reason() is not None, reason=str(library.reason()))
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
needs_network = pytest.mark.skipif(
    not os.environ.get("FASTSEQ_TEST_NETWORK"), reason="needs a package index (FASTSEQ_TEST_NETWORK=1)"
)


# What a package for Linux might import or call before it knows where it is.
LINUX_ONLY = {"Darwin": ("spwd",), "Windows": ("fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")}
NOT_IN_OS = {"Darwin": ("sched_getaffinity",), "Windows": ("sched_getaffinity", "fork", "getloadavg", "getuid", "uname")}


def python(*arguments: str, cwd: Path = ROOT, fails: bool = False, **environment: str) -> str:
    """Both outputs of `python arguments...`, which must succeed, or fail."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={name: value for name, value in {**os.environ, **environment}.items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout.strip()


def pip_wheel(source: Path, folder: Path, *options: str, **environment: str) -> Path:
    python(
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-cache-dir",
        "-w",
        str(folder),
        *options,
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def pip_install(wheel: Path, folder: Path) -> Path:
    python("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(folder), str(wheel))
    return folder


def setup() -> ModuleType:
    """setup.py, without building anything."""
    spec = importlib.util.spec_from_file_location("fastseq_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **options: None)
        spec.loader.exec_module(module)
    return module


def modules() -> set[str]:
    """Every Python file of the package, by its name in a wheel."""
    found = {str(file.relative_to(ROOT)) for file in (ROOT / "fastseq").rglob("*.py")}
    for folder in FOLDERS:
        found |= {f"fastseq/{file.relative_to(ROOT)}" for file in (ROOT / folder).rglob("*.py")}
    return {name for name in found if "__pycache__" not in name}


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution: a clean copy of the project that a test may build in."""
    folder = tmp_path_factory.mktemp("sdist")
    python(
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})",
        FASTSEQ_BUILD="none",
    )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def native_wheel(tmp_path_factory) -> Path:
    """Built in the checkout, where everything is compiled already."""
    folder = tmp_path_factory.mktemp("native")
    return pip_wheel(ROOT, folder, "--no-build-isolation", FASTSEQ_BUILD="cuda" if NVCC else "cpu")


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory, sdist) -> Path:
    return pip_wheel(sdist, tmp_path_factory.mktemp("pure"), "--no-build-isolation", FASTSEQ_BUILD="none")


@pytest.fixture(scope="session")
def pure_install(tmp_path_factory, pure_wheel) -> Path:
    return pip_install(pure_wheel, tmp_path_factory.mktemp("pure-install"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def dist_info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"fastseq_kernels-{fastseq.__version__}.dist-info/{name}").decode()


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process: nobody else builds")
def test_one_process_runs_these(request):
    """pytest 9.2 drops the name of the group, by which pytest-xdist 3.8 sends its tests to one process."""
    assert request.node.nodeid.endswith("@packaging")


def test_version_is_one():
    from fastseq import _version

    assert fastseq.__version__ == _version.__version__
    assert f"\nversion: {fastseq.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {fastseq.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert library.reason() is not None or torch.ops.fastseq_native.version() == fastseq.__version__


def test_sdist_is_complete(sdist):
    """All that git holds, so that the tests and the documentation's links work from it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    expected = {name for name in listed if (ROOT / name).is_file()} - {".gitignore"}
    expected |= {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    there = {str(file.relative_to(sdist)) for file in sdist.rglob("*") if file.is_file()}
    assert expected - there == set()
    assert not [name for name in there if name.endswith((".so", ".pyc")) or name.startswith(("build/", ".venv/", "fastseq/lib/"))]


@needs_library
def test_wheel_with_library(native_wheel):
    glibc = max(tuple(map(int, name.split("_")[1].split("."))) for name in setup().needed_versions(library.path()) if GLIBC(name))
    oldest = re.fullmatch(
        rf"fastseq_kernels-{re.escape(fastseq.__version__)}-py3-none-manylinux_2_(\d+)_{os.uname().machine}.whl",
        native_wheel.name,
    )
    assert oldest and glibc[:2] <= (2, int(oldest[1])) <= tuple(map(int, platform.libc_ver()[1].split(".")))
    facts = message_from_string(dist_info(native_wheel, "WHEEL"))
    assert facts["Root-Is-Purelib"] == "false" and facts["Tag"] == f"py3-none-manylinux_2_{oldest[1]}_{os.uname().machine}"
    assert "fastseq/lib/libfastseq.so" in names(native_wheel)
    assert "fastseq/lib/not-built.txt" not in names(native_wheel)


def test_wheel_without_library(pure_wheel):
    assert pure_wheel.name == f"fastseq_kernels-{fastseq.__version__}-py3-none-any.whl"
    assert message_from_string(dist_info(pure_wheel, "WHEEL"))["Root-Is-Purelib"] == "true"
    assert not [name for name in names(pure_wheel) if name.endswith(".so")]


@pytest.mark.parametrize("kind", ["pure_wheel", pytest.param("native_wheel", marks=needs_library)])
def test_wheel_contents(kind, request):
    """Every module, from the checkout and through the sdist; nothing beside `fastseq` at the top level."""
    inside = names(request.getfixturevalue(kind))
    assert {name for name in inside if name.endswith(".py")} == modules()
    assert {name.split("/")[0] for name in inside} == {
        "fastseq",
        f"fastseq_kernels-{fastseq.__version__}.dist-info",
    }
    assert "fastseq/py.typed" in inside
    data = {f"fastseq/{file.relative_to(ROOT)}" for file in (ROOT / "benchmarks/report/templates").rglob("*") if file.is_file()}
    assert data <= inside


def test_wheel_metadata(pure_wheel):
    facts = message_from_string(dist_info(pure_wheel, "METADATA"))
    assert facts["Name"] == "fastseq-kernels" and facts["Version"] == fastseq.__version__
    assert facts["License-Expression"] == "Apache-2.0" and facts["Requires-Python"] == ">=3.10"
    needed = {item.split(";")[0].strip() for item in facts.get_all("Requires-Dist") if "extra ==" not in item}
    assert needed == {"torch>=2.10"}, "a CUDA build of torch brings Triton, a CPU needs none"
    extras = {"bench", "test", "triton", "examples", "transformers", "rl", "docs", "dev"}
    assert set(facts.get_all("Provides-Extra")) == extras
    assert any(
        item.startswith("triton>=3.4") and "extra == 'triton'" in item.replace('"', "'")
        for item in facts.get_all("Requires-Dist")
    )
    urls = dict(item.split(", ") for item in facts.get_all("Project-URL"))
    assert list(urls) == ["Repository", "Documentation", "Issues", "Changelog"]
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert "fastseq = fastseq.__main__:main" in dist_info(pure_wheel, "entry_points.txt")
    assert "Apache License" in dist_info(pure_wheel, "licenses/LICENSE")


def test_an_address_stands_in_one_place():
    """So that it is replaced in one, and nobody is sent elsewhere."""
    (address,) = re.findall(r'^Repository = "https://([^"]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *(ROOT / ".github").rglob("*.yml"), *(ROOT / "docs").rglob("*.md")]
    assert len(texts) > 30
    assert not [str(file.relative_to(ROOT)) for file in texts if address in file.read_text(encoding="utf-8")]


# Of a workflow what is no target of the Makefile: an environment for one.
PREPARES = {'echo /opt/python/cp311-cp311/bin >> "$GITHUB_PATH"', "python -m pip install torch setuptools wheel"}


def test_workflows_run_make_targets_alone():
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert len(files) >= 3
    commands = [line for file in files for line in re.findall(r"^ +(?:- )?run: (.+)$", file.read_text(), re.MULTILINE)]
    assert len(commands) == sum(file.read_text().count("run:") for file in files)
    made = [re.fullmatch(r"make ([\w-]+)(?: PYTHON=python)?", command) for command in commands if command not in PREPARES]
    assert all(made) and {"lint", "test", "docs", "wheel"} == {found[1] for found in made} <= targets


LOOK = """
import importlib, pathlib, sys
import fastseq, fastseq.kernels, fastseq.benchmarks
from fastseq.backends import library
found = [importlib.util.find_spec(name) for name in ("kernels", "benchmarks")]
print(pathlib.Path(fastseq.__file__).parents[1])
print(library.reason())
print([spec and spec.origin for spec in found])
from fastseq.benchmarks.workloads import base as workloads
print(workloads.__file__)
"""


def test_pure_install_works(pure_install, tmp_path):
    where, reason, top_level, workloads = python("-c", LOOK, cwd=tmp_path, PYTHONPATH=str(pure_install)).splitlines()
    assert where == str(pure_install)
    assert "was not built when fastseq was installed (FASTSEQ_BUILD=none was set)" in reason
    assert top_level == "[None, None]"
    assert workloads == f"{pure_install}/fastseq/benchmarks/workloads/base.py"


@needs_library
def test_native_install_works(native_wheel, tmp_path):
    folder = pip_install(native_wheel, tmp_path / "installed")
    where, reason, top_level, workloads = python("-c", LOOK, cwd=tmp_path, PYTHONPATH=str(folder)).splitlines()
    assert (where, reason, top_level) == (str(folder), "None", "[None, None]")
    assert workloads.startswith(str(folder))


@pytest.mark.parametrize("kind", ["pure_wheel", pytest.param("native_wheel", marks=needs_library)])
def test_a_wheel_runs_where_there_is_only_torch(kind, request):
    """No Triton, no NumPy: .ci/wheel.py, as `make wheel` runs it; auditwheel agrees with the tag where it is installed."""
    told = python(".ci/wheel.py", str(request.getfixturevalue(kind)))
    assert "alone:" in told and "auditwheel does not take" not in told
    if kind == "native_wheel" and importlib.util.find_spec("auditwheel"):
        assert re.search(r"manylinux_2_\d+_\w+: auditwheel agrees", told)


@pytest.mark.parametrize(
    ("needed", "oldest"),
    [
        ({"GLIBC_2.17", "GLIBCXX_3.4.21", "CXXABI_1.3.9", "GCC_3.0"}, (2, 28)),
        ({"GLIBC_2.28", "GLIBCXX_3.4.24"}, (2, 28)),
        ({"GLIBC_2.34", "GLIBC_2.3.2", "GLIBCXX_3.4.29"}, (2, 34)),
        ({"GLIBC_2.17", "GLIBCXX_3.4.29"}, (2, 34)),
        ({"GLIBC_2.36", "GLIBCXX_3.4.29", "GLIBC_PRIVATE"}, (2, 36)),
        ({"GLIBC_2.17", "GLIBCXX_3.4.30"}, (2, 35)),
        ({"GLIBC_2.17", "CXXABI_1.3.99"}, None),
        (set(), None),
    ],
)
def test_the_oldest_manylinux_that_holds(needed, oldest):
    assert setup().manylinux(needed) == oldest


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_versions_of_symbols_are_those_that_readelf_finds():
    dump = subprocess.run(["readelf", "-VW", str(library.path())], capture_output=True, text=True, check=True).stdout
    assert setup().needed_versions(library.path()) == set(re.findall(r"Name: (\S+)\s+Flags", dump))


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_a_pure_wheel_imports_and_runs_on_other_systems(system, pure_install, tmp_path):
    """As far as Linux can tell: what only Linux has is gone, and the system has another name."""
    code = (
        "import torch, sys, os, platform, pathlib\n"
        f"platform.system = lambda: {system!r}\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name in {LINUX_ONLY[system]!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        f"for name in {LINUX_ONLY[system]!r}: sys.modules.pop(name, None)\n"
        f"for name in {NOT_IN_OS[system]!r}: delattr(os, name)\n"
        "import fastseq, fastseq.info\n"
        "from fastseq.backends import library\n"
        "fastseq.LSTM(4, 5)(torch.randn(6, 2, 4))[0].sum().backward()\n"
        "fastseq.functional.attention(*torch.randn(3, 1, 2, 7, 8), causal=True)\n"
        "assert 'which backend runs what' in fastseq.info.as_text()\n"
        "print(library.reason())"
    )
    told = python("-c", code, cwd=tmp_path, PYTHONPATH=str(pure_install), FASTSEQ_CACHE=str(tmp_path / "cache"))
    assert (
        told.splitlines()[-1] == f"the library is for Linux, this is {system}: torch's kernels and PyTorch operations run instead"
    )


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_a_build_elsewhere_makes_a_pure_wheel(system, sdist, monkeypatch):
    told = setup()
    monkeypatch.setattr(told.platform, "system", lambda: system)
    library_, why = told.obtain_library("auto")
    assert library_ is None and why.startswith(f"the library is for Linux, this is {system}")


PLAIN, CPU_TORCH = "torch==9.8.7", {"version": "9.8.7+cpu", "requires_dist": ["filelock", "sympy>=1.13"]}
CUDA_TORCH = {"version": "9.8.7", "requires_dist": ["filelock", "nvidia-cublas==13.0; platform_system == 'Linux'"]}


@pytest.mark.parametrize(
    ("arguments", "gpu", "installed", "offered", "unreachable", "commands", "status"),
    [
        ([PLAIN], False, "", CPU_TORCH, False, [], 0),  # pip's own index gives the CPU build
        ([PLAIN], False, "", CUDA_TORCH, False, [install_torch.CPU_INDEX], 0),
        ([PLAIN], False, "", CUDA_TORCH, True, [install_torch.CPU_INDEX], 0),  # pip's own index follows
        ([PLAIN], False, "", None, True, [install_torch.CPU_INDEX], 0),
        ([PLAIN], True, "", CUDA_TORCH, False, [], 0),
        ([PLAIN], False, "9.8.7+cpu", CUDA_TORCH, False, [], 0),
        ([PLAIN], False, "9.8.6", CUDA_TORCH, False, [install_torch.CPU_INDEX], 0),
        ([PLAIN, "--index", "https://x.example/cu130"], False, "", CPU_TORCH, False, ["https://x.example/cu130"], 0),
        ([PLAIN, "--index", "https://x.example/cu130"], True, "", CPU_TORCH, True, ["https://x.example/cu130"], 1),
    ],
)
def test_which_torch_is_installed(monkeypatch, capsys, arguments, gpu, installed, offered, unreachable, commands, status):
    """A CPU build where there is no GPU, never an error for want of it."""
    indices = []

    def run(command, **options):
        done = subprocess.CompletedProcess(command, 0, "", "")
        if "show" in command:
            done.stdout = f"Name: torch\nVersion: {installed}\n" if installed else ""
        elif "--dry-run" in command:
            done.returncode = offered is None
            done.stdout = json.dumps({"install": [{"metadata": offered}]}) if offered else ""
        else:
            indices.append(command[command.index("--index-url") + 1])
            done.returncode = int(unreachable)
        return done

    monkeypatch.setattr(install_torch.subprocess, "run", run)
    monkeypatch.setattr(install_torch, "has_gpu", lambda: gpu)
    monkeypatch.setattr(install_torch.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(install_torch.sys, "argv", ["install_torch.py", *arguments])
    assert install_torch.main() == status and indices == commands
    assert ("may bring CUDA" in capsys.readouterr().out) == (unreachable and len(arguments) == 1)


def test_from_the_checkout():
    where, _, top_level, workloads = python("-c", LOOK).splitlines()
    assert (where, workloads) == (str(ROOT), f"{ROOT}/benchmarks/workloads/base.py")
    assert top_level == "[None, None]", "a top-level folder has become a package"


def test_installed_modules_of_the_same_names_win(tmp_path):
    """The checkout stands first on sys.path, and `import kernels` still finds an installed package."""
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("ours = False\n")
    code = "import kernels, benchmarks, fastseq.kernels; print(kernels.ours, benchmarks.ours)"
    assert python("-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path)) == "False False"
    for folder in FOLDERS:
        assert not (ROOT / folder / "__init__.py").exists()


def test_editable(sdist, tmp_path):
    """Imports come from the project's folder, which does not itself come onto sys.path."""
    python(
        "-c",
        f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})",
        cwd=sdist,
        FASTSEQ_BUILD="none",
    )
    (wheel,) = tmp_path.glob("*.whl")
    folder = pip_install(wheel, tmp_path / "installed")
    # Without site, and ours first: this environment may have fastseq installed in the same way.
    paths = [str(folder), str(TORCH.parent)]
    code = f"import sys; sys.path += {paths}; import site; site.addsitedir(sys.path[-2])\n{LOOK}"
    where, _, top_level, workloads = python("-S", "-c", code, cwd=tmp_path).splitlines()
    assert (where, top_level) == (str(sdist), "[None, None]")
    assert workloads == f"{sdist}/benchmarks/workloads/base.py"


@needs_library
@needs_network
def test_isolated_build_finds_torch_by_path(tmp_path):
    """pip's isolated environment has setuptools and no torch."""
    wheel = pip_wheel(ROOT, tmp_path, FASTSEQ_BUILD="cuda" if NVCC else "cpu")
    assert "fastseq/lib/libfastseq.so" in names(wheel)


@pytest.mark.slow
@needs_library
def test_sdist_compiles(sdist, tmp_path):
    """From the sources that were packed, alone."""
    wheel = pip_wheel(sdist, tmp_path, "--no-build-isolation", FASTSEQ_BUILD="cpu")
    folder = pip_install(wheel, tmp_path / "installed")
    code = (
        "import fastseq.backends.library as l, torch\n"
        "print(l.reason(), l.architectures(), torch.ops.fastseq_native.cuda_obstacle(0))"
    )
    told = python("-c", code, cwd=tmp_path, PYTHONPATH=str(folder))
    assert told.startswith("None ['default'") and told.endswith("] this library was built without CUDA")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FASTSEQ_BUILD": "bogus"}, "error: FASTSEQ_BUILD='bogus' is not one of auto, cuda, cpu, none"),
        (
            {"FASTSEQ_BUILD": "cuda", "CUDA_HOME": "/nowhere"},
            "FASTSEQ_BUILD=cuda: nvcc was not found (CUDA_HOME=/nowhere)",
        ),
        (
            {"FASTSEQ_BUILD": "cpu", "FASTSEQ_TORCH_DIR": "/nowhere"},
            "FASTSEQ_TORCH_DIR=/nowhere is no installed torch",
        ),
        ({"FASTSEQ_BUILD": "cpu", "MAX_JOBS": "many"}, "MAX_JOBS='many' is not a whole number"),
        ({"FASTSEQ_BUILD": "cpu", "CXX": "/bin/false"}, "FASTSEQ_BUILD=cpu: cmake failed:"),
    ],
)
def test_build_says_what_is_wrong(sdist, environment, expected):
    quiet = {"CUDA_HOME": "", "CUDA_PATH": "", "CUDACXX": "", "TORCH_CUDA_ARCH_LIST": ""}
    told = python("setup.py", "build_native", cwd=sdist, fails=True, **{**quiet, **environment})
    assert expected in told and "Traceback" not in told


def test_auto_never_fails(sdist, tmp_path):
    """Without torch, `auto` makes a pure wheel, says so in a box, and the wheel remembers why."""
    told = python("setup.py", "build_native", cwd=sdist, FASTSEQ_BUILD="auto", FASTSEQ_TORCH_DIR="/nowhere")
    assert "| fastseq was built without its native library" in told and "FASTSEQ_TORCH_DIR=/nowhere is no installed torch" in told
    wheel = pip_wheel(sdist, tmp_path, "--no-build-isolation", FASTSEQ_BUILD="auto", FASTSEQ_TORCH_DIR="/nowhere")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert b"/nowhere is no installed torch" in archive.read("fastseq/lib/not-built.txt")


@needs_nvcc
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", "80-real;90a-real;100-real;120-real;120-virtual"),
        ("9.0", "90a-real"),
        ("8.0, 12.0+PTX", "80-real;120-real;120-virtual"),
        ("Hopper", 'TORCH_CUDA_ARCH_LIST: "Hopper" is none of the accepted forms'),
    ],
)
def test_cuda_architectures(sdist, tmp_path, asked, expected):
    if asked == "" and "release 12." in subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("the default list of CUDA 12 is shorter before 12.8")
    code = "import sys; sys.argv[:] = ['setup.py', '--version']; import setup as s; "
    code += "print(s.find_cmake(), s.find_ninja())"
    cmake, ninja = python("-c", code, cwd=sdist).splitlines()[-1].split()
    done = subprocess.run(
        [
            cmake,
            "-S",
            str(sdist),
            "-B",
            str(tmp_path),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DFASTSEQ_CUDA=ON",
        ]
        + [f"-DCMAKE_CUDA_COMPILER={NVCC}", f"-DFASTSEQ_TORCH_DIR={TORCH}"],
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": asked},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (asked != "Hopper"), done.stdout
    assert expected in re.sub(r"\s+", " ", done.stdout)


@needs_library
@needs_nvcc
def test_library_holds_what_it_says():
    """The machine code and PTX in the file are those that `architectures()` tells."""
    triton = pytest.importorskip("triton")
    places = (
        Path(NVCC).resolve().parent,
        Path("/usr/local/cuda/bin"),
        Path(triton.__file__).parent / "backends/nvidia/bin",
    )
    tool = next((str(folder / "cuobjdump") for folder in places if (folder / "cuobjdump").is_file()), None)
    if tool is None:
        pytest.skip("needs cuobjdump")
    dump = subprocess.run(
        [tool, "--list-elf", "--list-ptx", str(library.path())], capture_output=True, text=True, check=True
    ).stdout
    inside = set(re.findall(r"\.(sm_\d+)\w?\.cubin", dump))
    inside |= {f"compute_{number}" for number in re.findall(r"\.sm_(\d+)\w?\.ptx", dump)}
    told = {name for name in library.architectures() if name.startswith(("sm_", "compute_"))}
    assert inside == {name.rstrip("af") for name in told}, "older versions of cuobjdump leave the suffix out"


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_library_links_to_any_torch():
    """To libtorch.so, which leads to CUDA where torch has it; to no CUDA, Python or build machine."""
    dump = subprocess.run(["readelf", "-dW", str(library.path())], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dump))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    system = {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libm.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
    }
    assert {name for name in needed if not name.startswith("ld-linux")} <= system | {
        "libtorch.so",
        "libtorch_cpu.so",
    }
    assert "RPATH" not in dump and "RUNPATH" not in dump
    assert re.search(r"\(SONAME\).*\[libfastseq\.so\]", dump)


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_library_symbols():
    """Out of it comes our mark alone; into it come torch's C shims, those of CUDA weakly."""
    dump = subprocess.run(["readelf", "--dyn-syms", "-W", str(library.path())], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in dump.splitlines() if re.match(r"\s*\d+:", line)]
    exported = {row[7] for row in rows if len(row) > 7 and row[6] != "UND" and row[4] == "GLOBAL"}
    assert exported - {"_end", "_edata", "__bss_start"} == {"fastseq_library_mark"}
    undefined = {row[7].split("@")[0]: row[4] for row in rows if len(row) > 7 and row[6] == "UND"}
    assert undefined["aoti_torch_get_current_cuda_stream"] == "WEAK"
    assert not [name for name in undefined if name.startswith(("_ZN2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "Py", "_Py"))]
