"""The compiler's gate: what nvcc made of every CUDA kernel, without a GPU.

The table is written by `python tests/csrc/resources.py --write`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.triton_gate import loaded

resources = loaded(Path(__file__).with_name("resources.py"))
KEY = "forward lstm bf16 sm_90a"
ROW = {"registers": 255, "spilled": 0, "shared": resources.RESERVED}


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return resources.built()
    except resources.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def kernels(library):
    try:
        return resources.kernels(library)
    except resources.Unavailable as reason:
        pytest.skip(str(reason))


def test_kernels_are_as_the_table_says(kernels):
    rows = {kernel.key: kernel.row for kernel in kernels}
    assert len(rows) == len(kernels)
    found = resources.judged(rows, resources.toolkit(), {kernel.architecture for kernel in kernels})
    assert not found, found


def test_the_library_has_the_machine_code_that_it_names(kernels):
    named = [name for name in resources.library.architectures() if name.startswith("sm_")]
    assert {kernel.architecture for kernel in kernels} == set(named)
    assert not resources.unlike({kernel.key for kernel in kernels}, named)


def test_the_library_has_every_architecture(kernels):
    missing = set(resources.architectures()) - {kernel.architecture for kernel in kernels}
    if missing and (os.environ.get("TORCH_CUDA_ARCH_LIST") or resources.toolkit() < 12080):
        pytest.skip(f"built without {', '.join(sorted(missing))}: for TORCH_CUDA_ARCH_LIST, or by nvcc before 12.8")
    assert not missing


def test_products_take_the_instruction_of_their_precision_and_spill_nothing(kernels, library):
    """The largest kernel forward and backward, for each precision and architecture."""
    largest = ("wide", resources.REDUCE_SCATTER)
    chosen = [kernel for kernel in kernels if "lstm" in kernel.key and any(word in kernel.key for word in largest)]
    found = resources.instructions(library, chosen)
    assert found.keys() == {kernel.key for kernel in chosen}
    for key, code in found.items():
        wanted = resources.PRODUCTS[key.split()[2]]
        assert wanted in code, key
        assert {name for name in code if "MMA" in name} <= {wanted}, key
        if wanted != "FFMA":  # which activations are made of, too
            first, last = code.index(wanted), len(code) - code[::-1].index(wanted)
            assert not {"LDL", "STL"} & set(code[first:last]), key


def test_the_table_has_every_kernel_and_no_fault():
    table = resources.read()["kernels"]
    assert not resources.unlike(table, resources.architectures())
    faults = {key: found for key, row in table.items() if (found := resources.faults(key, row, None))}
    assert not faults, faults
    unexplained = [key for key, row in table.items() if bool(row["spilled"]) != ("reason" in row)]
    assert not unexplained, unexplained


def test_every_reason_excuses_a_kernel_and_no_more_than_it_says():
    table = resources.read()["kernels"]
    for words, most, _ in resources.REASONS:
        found = [row["spilled"] for key, row in table.items() if set(words.split()) <= set(key.split())]
        assert 0 < max(found) <= most, words


def test_the_architectures_are_those_of_cmake():
    assert resources.architectures() == ["sm_80", "sm_90a", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"registers": 256}, "256 registers, 255 are there"),
        ({"shared": 2048}, "2048 bytes of static shared memory, which csrc/recurrent/plan.cpp gives away"),
        ({"spilled": 8}, "spills 8 bytes of each thread into local memory"),
    ],
)
def test_a_fault_is_seen(change, fault):
    assert resources.faults(KEY, ROW, ROW) == []
    assert resources.faults(KEY, ROW | change, None) == [fault]


def test_more_than_the_table_is_seen(monkeypatch):
    monkeypatch.setattr(resources, "reason_of", lambda key, spilled: "because")
    assert resources.faults(KEY, ROW | {"spilled": 8}, ROW | {"spilled": 8}) == []
    assert resources.faults(KEY, ROW | {"spilled": 12}, ROW | {"spilled": 8}) == ["spills 12 bytes of each thread, were 8"]


def test_what_is_new_or_gone_is_seen():
    table = resources.read()
    rows, where = table["kernels"], {"sm_90a"}
    rows = {key: row for key, row in rows.items() if key.split()[-1] in where}
    assert resources.judged(rows, table["toolkit"], where) == {}
    renamed = {key.replace(KEY, "forward lstm bf16 wider sm_90a"): row for key, row in rows.items()}
    assert resources.judged(renamed, table["toolkit"], where) == {
        "forward lstm bf16 wider sm_90a": ["is not in the table: write it again"],
        KEY: ["is not in the library, but in the table: write it again"],
    }


def test_a_kernel_that_an_architecture_lacks_is_seen():
    keys = resources.read()["kernels"].keys()
    for gone in (KEY, "probe sm_80"):
        assert resources.unlike(keys - {gone}, resources.architectures()) == {gone}
    assert resources.unlike(keys | {f"{KEY}0"}, resources.architectures()) == {f"{KEY}0"}


@pytest.mark.parametrize("number", ["1", "(int)1"])
def test_names_are_read_as_either_demangler_writes_them(number):
    tile = "fastseq::recurrent::Tile16<fastseq::gpu::Bfloat16>"
    name = f"void fastseq::recurrent::forward_kernel<fastseq::RnnTanh, {tile}, {number}>(fastseq::recurrent::ForwardParams)"
    assert resources.words_of(name) == "forward rnn_tanh bf16"
    assert resources.words_of(name.replace("1>", "4>")) == "forward rnn_tanh bf16 wide"
    name = f"void fastseq::recurrent::backward_reduce_scatter_kernel<fastseq::Lstm, {tile} >(fastseq::recurrent::BackwardParams)"
    assert resources.words_of(name) == resources.words_of(name.replace(" >(", ">(")) == "backward_reduce_scatter lstm bf16"
    assert resources.words_of("fastseq::(anonymous namespace)::probe()") == "probe"
    assert resources.words_of("fastseq::limits::grid_barrier(fastseq::limits::ExchangeParams)") == "grid_barrier"
