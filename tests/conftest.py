"""What every test starts from: which fastseq is tested is told, unwritten memory is NaN, Triton is interpreted without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

# Read when torch is loaded: a thread that waits for work sleeps. By default it spins for milliseconds after every operation, on a
# core that another worker of pytest needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.utils._device  # noqa: E402

os.environ["FASTSEQ_CACHE"] = "off"  # what this machine's user tuned is no part of the tests
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

import fastseq  # noqa: E402
from fastseq.backends import BACKENDS, library  # noqa: E402
from fastseq.backends.triton import _launch  # noqa: E402
from fastseq.choice import lengths, sources, store  # noqa: E402
from fastseq.choice.device import LEVELS  # noqa: E402
from support import cuda_host, interpreter  # noqa: E402
from support.poison import poison  # noqa: E402

BACKENDS[cuda_host.name] = cuda_host  # has no place in the order: only where it is forced
_patches = ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--level", metavar="NAME", help="only what is run for this level of CPU instructions by name: amx, say")


def pytest_configure() -> None:
    """Triton's interpreter with a bfloat16 that is right, and with every access of every kernel in every test checked."""
    if interpreter.ON:
        _patches.enter_context(interpreter.true_bfloat16())
        _patches.enter_context(interpreter.checked_bounds())
        _patches.enter_context(interpreter.remapped_once())
        patch = _patches.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(_launch, "INTERPRETED_DTYPES", (*_launch.INTERPRETED_DTYPES, torch.bfloat16))


def pytest_unconfigure() -> None:
    _patches.close()


@pytest.fixture
def plain_interpreter() -> Iterator[None]:
    """Triton's interpreter as it is."""
    pytest_unconfigure()
    yield
    pytest_configure()


def pytest_report_header() -> list[str]:
    loaded = f"{library.path()} ({' '.join(library.architectures())})"
    return [
        f"fastseq {fastseq.__version__} from {fastseq.__file__}, torch {torch.__version__}",
        f"library: {library.reason() or loaded}",
    ]


def _names(item: pytest.Item, level: str) -> bool:
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return level in getattr(item, "fixturenames", ()) or any(type(value) is str and value == level for value in values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    level = config.getoption("--level")
    if level is not None:
        items[:] = [item for item in items if _names(item, level)]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def poisoned_allocations() -> Iterator[None]:
    """`torch.empty` and its like, called by fastseq, return NaN: an element left unwritten shows."""
    patch = pytest.MonkeyPatch()
    poison(patch.setattr)
    yield
    patch.undo()


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Every level of the CPU kernels that this processor has."""
    if library.reason():  # it is loaded when it is first asked for
        pytest.skip(library.reason())
    monkeypatch.setenv("FASTSEQ_CPU_LEVEL", request.param)
    if torch.ops.fastseq_native.cpu_level() != request.param:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture(autouse=True, scope="session")
def environment_is_read_again() -> Iterator[None]:
    """The library reads its variables once: it is told of each that a test sets, and of what is as it was before."""

    def told(method: Callable[..., Any]) -> Callable[..., Any]:
        def telling(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            native = torch.ops.fastseq_native
            if hasattr(native, "forget_environment"):  # loaded
                native.forget_environment()
            return result

        return telling

    patch = pytest.MonkeyPatch()
    for name in ("setenv", "delenv", "undo"):
        patch.setattr(pytest.MonkeyPatch, name, told(getattr(pytest.MonkeyPatch, name)))
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def sequences_are_ours() -> Iterator[None]:
    """Which lengths of LSTM, GRU and RNN go to torch's kernels is measured on a machine: tests/backends/test_torch.py has a table
    of its own, and everything else is tested on fastseq's kernels."""
    with lengths.everywhere(lengths.OURS):
        yield


@pytest.fixture(autouse=True)
def nothing_tuned_is_left() -> Iterator[None]:
    """What a test has tuned (a guide's program, say) is not known to the next one."""
    yield
    if any(store._unwritten.values()):
        for entries in store._unwritten.values():
            entries.clear()
        sources.forget()
