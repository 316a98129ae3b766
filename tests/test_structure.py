"""How the package is laid out: imports go one way, every op and cell has each of its files, rules that the machine keeps."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from fastseq.backends import BACKENDS
from fastseq.backends.cpu.recurrent import CELLS as NATIVE
from fastseq.backends.cuda.recurrent import CELLS as CUDA_CELLS
from fastseq.cells import CELLS
from fastseq.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastseq"

# The package's layers: a file may import from those to its right, never from its left. Last stand facts: the ops' arguments, the
# cells.
LAYERS = (
    "tuning",
    "convert",
    "models",
    "distributed",
    "modules",
    "functional",
    "ops",
    "backends",
    "choice",
    "kernels",
    "reference",
    "ops.types",
    "cells",
)


def layer(path: Path) -> str | None:
    if path == PACKAGE / "ops" / "types.py":
        return "ops.types"
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py").lstrip("_")
    return name if name in LAYERS else None


def imported(path: Path) -> set[tuple[str, ...]]:
    """Every dotted name that a file imports."""
    package = ("fastseq", *path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).parent.parts)
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        found |= set(names)
    return found


def imports(path: Path) -> set[str]:
    """First component, below fastseq, of everything a file imports from fastseq; of the ops' types both."""
    below = {name[1:] for name in imported(path) if name[0] == "fastseq" and len(name) > 1}
    return {"ops.types" if name[:2] == ("ops", "types") else name[0] for name in below}


@pytest.mark.parametrize("path", sorted(p for p in PACKAGE.rglob("*.py") if layer(p)), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = LAYERS.index(layer(path))
    wrong = {name for name in map(lambda name: name.lstrip("_"), imports(path)) if name in LAYERS and LAYERS.index(name) < own}
    assert not wrong, f"{path.relative_to(ROOT)} imports from its left: {sorted(wrong)}"


MODELS = sorted((PACKAGE / "models").glob("*.py"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_models_stand_on_what_users_have(path):
    """A reader can copy one: of fastseq it uses public names alone, beside them torch and other models."""
    import fastseq

    public, functions = {"models", "functional", *fastseq.__all__}, fastseq.functional.__all__
    names = {name for name in imported(path) if name[0] != "__future__"}
    inside = {name[1:] for name in names if name[0] == "fastseq" and len(name) > 1}
    wrong = {name for name in inside if name[0] not in public or (name[0] == "functional" and not {*name[1:]} <= {*functions})}
    wrong |= {name for name in names if name[0] not in ("fastseq", "torch", *sys.stdlib_module_names)}
    assert not wrong, f"{path.name} imports {sorted(wrong)}"
    read = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in read if isinstance(node.value, ast.Name) and node.value.id == "fastseq"}
    assert used <= public, f"{path.name} uses fastseq's {sorted(used)}"


def test_models_have_no_base_class_and_take_no_unnamed_options():
    for path in MODELS:
        for model in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
            bases = {ast.unparse(base) for base in model.bases}
            assert bases <= {"nn.Module", "NamedTuple", "torch.autograd.Function"}, f"{path.name}: {model.name} is a {bases}"
            for method in (node for node in model.body if isinstance(node, ast.FunctionDef)):
                assert method.args.kwarg is None, f"{path.name}: {model.name}.{method.name} takes what it does not name"


# The same for benchmarks/; what stands beside these folders may import all of them.
BENCHMARK_FOLDERS = ("gpu", "cpu", "claims", "suites", "report", "measure", "roofline", "providers", "workloads")
BENCHMARK_FILES = sorted(p for name in BENCHMARK_FOLDERS for p in (ROOT / "benchmarks" / name).rglob("*.py"))


@pytest.mark.parametrize("path", BENCHMARK_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_benchmarks_import_one_way(path):
    own = BENCHMARK_FOLDERS.index(path.relative_to(ROOT / "benchmarks").parts[0])
    names = [name[2:] for name in imported(path) if name[:2] == ("fastseq", "benchmarks") and len(name) > 2]
    wrong = {name[0] for name in names if name[0] not in BENCHMARK_FOLDERS or BENCHMARK_FOLDERS.index(name[0]) < own}
    assert not wrong, f"{path.relative_to(ROOT)} imports from its left: {sorted(wrong)}"


def test_every_folder_of_the_benchmarks_is_in_their_readme():
    folders = {p.name for p in (ROOT / "benchmarks").iterdir() if p.is_dir() and p.name not in ("results", "ops", "__pycache__")}
    assert folders == set(BENCHMARK_FOLDERS)
    text = (ROOT / "benchmarks/README.md").read_text()
    assert all(f"`{name}/`" in text for name in (*folders, "ops", "results"))


def test_no_module_is_hidden_by_what_it_holds():
    """``import fastseq.functional.attention as a`` must not be a function: importlib and autodoc go by names."""
    import fastseq
    import fastseq.integrations.flash_attn  # noqa: F401

    hidden = []
    for name, module in list(sys.modules.items()):
        parent, _, last = name.rpartition(".")
        if name.startswith("fastseq.") and not name.startswith("fastseq.benchmarks") and parent in sys.modules:
            if getattr(sys.modules[parent], last, module) is not module:
                hidden.append(name)
    assert not hidden and callable(fastseq.convert) and callable(fastseq.functional.attention)


def test_kernels_import_no_package_code():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imports(path) & set(LAYERS) - {"kernels"}, path


# Where an op has kernels of its own; a backend that runs it says so in its `ops`.
KERNELS = {
    "scan": ("csrc/cpu/scan.cpp", "kernels/scan/scan.py"),
    "recurrent": ("csrc/cpu/recurrent.cpp",),
    "attention": ("kernels/attention/forward.py", "kernels/attention/backward.py", "kernels/attention/weights.py"),
    "attention_decode": ("kernels/attention/decode.py", "csrc/cpu/attention_decode.cpp"),
}


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_all_its_files(op):
    files = (
        f"fastseq/ops/{op}.py",
        f"fastseq/reference/{op}.py",
        *KERNELS[op],
        *(f"fastseq/backends/{name}/{op}.py" for name in ("cpu", "triton") if op in BACKENDS[name].ops),
        f"tests/ops/test_{op}.py",
        f"tests/reference/test_{op}.py",
        f"benchmarks/ops/test_{op}.py",
    )
    missing = [path for path in files if not (ROOT / path).is_file()]
    assert not missing
    assert op in BACKENDS["reference"].ops


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: cell.name)
def test_every_cell_has_all_its_files(cell):
    files = (
        f"fastseq/reference/cells/{cell.family}.py",
        # without one, why_not of the cpu backend names the cell
        *([f"csrc/recurrent/cells/{cell.family}.h"] if cell.name in NATIVE else []),
        f"kernels/recurrent/cells/{cell.family}.py",
    )
    missing = [path for path in files if not (ROOT / path).is_file()]
    assert not missing, f"cell {cell.name} has no {', '.join(missing)}"
    import fastseq
    from fastseq.kernels.recurrent import configs
    from fastseq.reference import cells as reference
    from support import recurrent_equations as equations

    module = cell.family.replace("_", "")
    lacking = {module, f"{module}cell"} - {name.lower() for name in fastseq.__all__}
    assert not lacking, f"fastseq/modules/__init__.py and fastseq/__init__.py export no {', no '.join(lacking)} (in any case)"
    for table, where in (
        (reference._STEPS, "_STEPS of fastseq/reference/cells/__init__.py"),
        (configs.CELLS, "CELLS of kernels/recurrent/configs.py"),
        (equations._STEPS, "_STEPS of tests/support/recurrent_equations.py"),
    ):
        assert cell.name in table, f"cell {cell.name} is not in {where}"
    assert equations.GATES.get(cell.name, 4) == len(cell.gates), "GATES of tests/support/recurrent_equations.py"
    states = tuple(state for state in cell.states if state != "h")
    assert equations.STATES.get(cell.name, ()) == states, "STATES of tests/support/recurrent_equations.py"


def test_cell_facts_agree_in_both_languages():
    for cell in map(CELLS.get, NATIVE):
        header = (ROOT / f"csrc/recurrent/cells/{cell.family}.h").read_text()
        constant = dict(re.findall(r"static constexpr \w+ (k\w+) = (\w+);", header))
        assert int(constant["kGates"]) == len(cell.gates)
        assert int(constant["kSaved"]) == len(cell.saved)
        assert int(constant["kStates"]) == cell.wide_states
        assert int(constant["kVectors"]) == len(cell.vectors)
        assert int(constant["kOwnRecurrent"]) == cell.own_recurrent


@pytest.mark.parametrize(
    "header, cells", [("csrc/cpu/recurrent_kernel.h", NATIVE), ("csrc/recurrent/cells.h", CUDA_CELLS)], ids=["cpu", "cuda"]
)
def test_the_cells_of_the_kernels_agree_in_both_languages(header, cells):
    rows = re.findall(r"X\((\w+), \"(\w+)\"\)", (ROOT / header).read_text())
    assert tuple(name for _, name in rows) == cells
    assert all((ROOT / f"csrc/recurrent/cells/{CELLS[name].family}.h").is_file() for name in cells)


def test_one_registration():
    """STABLE_TORCH_LIBRARY stands in one file; the sources that CMake lists are the ones that exist."""
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h", ".inl")]
    assert [p.name for p in sources if "STABLE_TORCH_LIBRARY(" in p.read_text()] == ["registration.cpp"]
    listed = (ROOT / "CMakeLists.txt").read_text()
    for path in sources:
        if path.suffix in (".cpp", ".cu"):
            name = str(path.relative_to(ROOT))
            pattern = re.sub(r"_(default|avx2|avx512|avx512_bf16|amx)\.cpp$", "_${level}.cpp", name)
            assert name in listed or pattern in listed, f"{name} is not in CMakeLists.txt"


def test_every_kernel_of_a_level_can_be_left_out():
    """A library for one machine has something in the place of every function of the levels that it goes without."""
    names = r"\b(\w+)_(default|avx2|avx512|avx512_bf16|amx)\(\);"
    declared = {found for p in (ROOT / "csrc").rglob("*.h") for found in re.findall(names, p.read_text())}
    left_out = (ROOT / "csrc/cpu/left_out.cpp").read_text()
    products, others = left_out.split("#define LEFT_OUT(level)")
    of_products, of_all = (set(re.findall(r"(\w+)_##level\(\)", part)) for part in (products, others))
    uses = re.findall(r"FASTSEQ_WITHOUT_(\w+)\)\n(LEFT_OUT\w*)\(\1\)", left_out)
    found = {(name, level) for level, macro in uses for name in of_products | (of_all if macro == "LEFT_OUT" else set())}
    assert found | set(re.findall(r"(\w+)_(avx512_bf16|amx)\(\) {", left_out)) >= declared


# What only common/prims.cuh may say: the machine's own words, and waits that the host execution could not see.
MACHINE = re.compile(r"\b__\w+|\basm\b|\bvolatile\b|<<<|\b(thread|block)Idx\b|\b(block|grid)Dim\b|\bthread_local\b|\bcuda\w*")


@pytest.mark.parametrize(
    "path", sorted(set((ROOT / "csrc").rglob("*.cuh")) - {ROOT / "csrc/common/prims.cuh"}), ids=lambda p: p.name
)
def test_kernels_speak_of_the_machine_through_prims(path):
    code = re.sub(r"//.*", "", path.read_text())
    found = [match[0] for match in MACHINE.finditer(code)]
    assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_kernel_folders_shadow_nobody():
    """An __init__.py would make the folder importable as `kernels` (Hugging Face's package) or `benchmarks` from the checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "benchmarks" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_setup_does_not_import_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert not any(name.split(".")[0] == "torch" for name in names)


def test_no_banners_and_nothing_postponed():
    """Comments are shapes and whys."""
    wrong = []
    for path in [
        *ROOT.glob("*.py"),
        *(p for d in ("fastseq", "kernels", "benchmarks", "csrc", "examples") for p in (ROOT / d).rglob("*")),
    ]:
        if path.suffix not in (".py", ".cpp", ".cu", ".cuh", ".h", ".inl"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"(#|//)\s*([-=#*~]{4,}|TODO|FIXME|XXX|HACK)", line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}")
    assert not wrong
