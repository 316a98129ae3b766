"""The op battery: one class of tests that every op inherits, run for every backend.

A test class inherits :class:`OpBattery`, names its op and lists its ``CASES``; ``tests/ops/conftest.py`` runs each test for each
case, dtype and backend. The truth is what PyTorch makes of the same values in fp64, by its own modules or by equations written
out in this folder: nothing of the package takes part in it. The bound is twice what PyTorch itself loses in the dtype
(``fastseq/testing.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastseq import backends
from fastseq.testing import assert_all_close_to_truth, pooled_error

SEEDS = range(1, 4)  # of the inputs that PyTorch's own error is known from, beside those of a test
MORE_SEEDS = range(1, 16)  # where it is known from them alone


class OpBattery:
    """What holds for every op and backend.

    A subclass defines ``OP``, ``CASES``, ``SMALL_CASES``, ``make``, ``resized``, ``run``, ``run_torch``, ``op_samples`` and, if
    the backends of the op refuse some calls, ``against``.
    """

    OP: ClassVar[str] = ""
    CASES: ClassVar[Sequence[Any]] = ()
    SMALL_CASES: ClassVar[Sequence[Any]] = ()  # for what is slow: numerical gradients, compilation
    COMPILED_CASES: ClassVar[Sequence[Any]] = ()  # with sizes that differ from one another, or Dynamo takes them for one
    DTYPES: ClassVar[Sequence[torch.dtype]] = (torch.float64, torch.float32, torch.bfloat16)

    def make(self, case: Any, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Inputs of a case, the same values for every dtype up to rounding; floating tensors that want gradients require them."""
        raise NotImplementedError

    def resized(self, case: Any) -> Any:
        """The case with other dynamic sizes."""
        raise NotImplementedError

    def run(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The op's public, differentiable function."""
        raise NotImplementedError

    def run_torch(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The same by PyTorch itself, with the same outputs and nothing of the package: in fp64, the truth."""
        raise NotImplementedError

    def op_samples(self, case: Any, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
        """(registered op, arguments) pairs for ``torch.library.opcheck``."""
        raise NotImplementedError

    def against(self, inputs: dict[str, Any], backend: str, backward: bool) -> list[str]:
        """A backend's reasons against the calls of ``run``, or against those of its backward."""
        return []

    def magnifies(self, case: Any) -> bool:
        """Whether the error depends on the values so much that those of one set of inputs do not tell PyTorch's own."""
        return False

    def gradients_jump(self, case: Any, dtype: torch.dtype) -> bool:
        """Whether rounding in this dtype may move a value across a jump of the derivative: gradients cannot be compared then."""
        return False

    # shared machinery

    @classmethod
    def backends(cls) -> list[str]:
        """Backends that have the op and can run on this machine's CPU."""
        return [
            name
            for name, module in backends.BACKENDS.items()
            if {"cpu", "any"} & set(module.devices) and module.available() is None and cls.OP in module.ops
        ]

    def supports(self, case: Any, dtype: torch.dtype, backend: str) -> bool:
        return not self.against(self.make(case, dtype), backend, False)

    @contextmanager
    def backward_of(self, inputs: dict[str, Any], backend: str) -> Iterator[None]:
        """Force the backend for a backward, or the reference where the backend has only the forward."""
        with backends.use_backend("reference" if self.against(inputs, backend, True) else backend):
            yield

    def gradients(self, outputs: tuple[Tensor, ...], inputs: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
        """Gradients of every input for fixed random gradients of every output."""
        generator = torch.Generator().manual_seed(seed)
        wanted = differentiable(inputs)
        given = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device) for out in outputs]
        grads = torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True)
        return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}

    def truth(self, inputs: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Outputs and gradients by PyTorch, in fp64, from the values that the inputs have in their dtype."""
        exact = {name: widened(value) for name, value in inputs.items()}
        outputs = self.run_torch(exact)
        return outputs, self.gradients(outputs, exact)

    def own_error(self, case: Any, dtype: torch.dtype) -> float:
        """PyTorch's relative error, where it is known better than from the inputs of a test."""
        if dtype == torch.float64:
            return in_fp64(_own_error(type(self), case, torch.float32, MORE_SEEDS))
        return _own_error(type(self), case, dtype) if self.magnifies(case) else 0.0

    def test_forward_and_gradients(self, case: Any, dtype: torch.dtype, backend: str) -> None:
        self.check(case, dtype, backend)

    def check(self, case: Any, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
        """Outputs and gradients are as close to the truth as PyTorch's own."""
        inputs = self.make(case, dtype, device)
        true_outputs, true_grads = self.truth(inputs)
        torch_outputs = self.run_torch(inputs)
        torch_grads = self.gradients(torch_outputs, inputs)
        with backends.use_backend(backend):
            outputs = self.run(inputs)
        with self.backward_of(inputs, backend):
            grads = self.gradients(outputs, inputs)
        named = [{f"output {i}": out for i, out in enumerate(outs)} for outs in (outputs, torch_outputs, true_outputs)]
        if not self.gradients_jump(case, dtype):
            for results, gradients in zip(named, (grads, torch_grads, true_grads), strict=True):
                results |= {f"gradient of {name}": grad for name, grad in gradients.items()}
        assert_all_close_to_truth(*named, own_error=self.own_error(case, dtype))

    def test_rerun_is_bit_equal(self, case: Any, dtype: torch.dtype, backend: str) -> None:
        inputs = self.make(case, dtype)
        runs = []
        for _ in range(2):
            with backends.use_backend(backend):
                outputs = self.run(inputs)
            with self.backward_of(inputs, backend):
                runs.append([*outputs, *self.gradients(outputs, inputs).values()])
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)

    def test_backward_takes_any_forward(self, small_case: Any, backend: str) -> None:
        """Saved tensors are the op's contract: this backend's backward on the forward of every other."""
        inputs = self.make(small_case, torch.float64)
        _, true_grads = self.truth(inputs)
        for other in self.backends():
            if not self.supports(small_case, torch.float64, other):
                continue
            with backends.use_backend(other):
                outputs = self.run(inputs)
            with self.backward_of(inputs, backend):
                grads = self.gradients(outputs, inputs)
            named = [{f"{name}, forward by {other}": grad for name, grad in each.items()} for each in (grads, true_grads)]
            assert_all_close_to_truth(named[0], named[1], named[1], own_error=self.own_error(small_case, torch.float64))

    def test_gradcheck(self, small_case: Any, backend: str) -> None:
        inputs = self.make(small_case, torch.float64)
        names = list(differentiable(inputs))

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self.run({**inputs, **dict(zip(names, tensors, strict=True))})

        # a backend without this backward leaves the choice open, or nothing could be differentiated
        with backends.use_backend("auto" if self.against(inputs, backend, True) else backend):
            tensors = tuple(inputs[name] for name in names)
            assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)

    def test_compile(self, compiled_case: Any) -> None:
        """One graph without a break; a second size does not compile again; the same results. (The op chooses the backend.)"""
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        fixed = {name: value for name, value in self.make(compiled_case, torch.float64).items() if not isinstance(value, Tensor)}
        compiled = torch.compile(lambda tensors: self.run(fixed | tensors), fullgraph=True, dynamic=True, backend=counter)
        graphs = 0  # what the first call compiled
        for case in (compiled_case, self.resized(compiled_case)):
            inputs = {name: value for name, value in self.make(case, torch.float64).items() if isinstance(value, Tensor)}
            expected, outputs = self.run(fixed | inputs), compiled(inputs)
            grads, expected_grads = self.gradients(outputs, inputs), self.gradients(expected, inputs)
            torch.testing.assert_close(outputs, expected)
            torch.testing.assert_close(grads, expected_grads)
            graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs

    def test_export(self, compiled_case: Any) -> None:
        inputs = self.make(compiled_case, torch.float64)
        inputs = {name: value.detach() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

        class Exported(torch.nn.Module):
            def forward(_, **given: Tensor) -> tuple[Tensor, ...]:
                return self.run({**inputs, **given})

        program = torch.export.export(Exported(), (), tensors)
        torch.testing.assert_close(program.module()(**tensors), self.run(inputs))

    def test_opcheck(self, small_case: Any, backend: str) -> None:
        with backends.use_backend(backend):
            for op, arguments in self.op_samples(small_case, torch.float32):
                results = torch.library.opcheck(op, arguments)
                assert set(results.values()) == {"SUCCESS"}, results


@functools.cache
def _own_error(battery: type[OpBattery], case: Any, dtype: torch.dtype, seeds: range = SEEDS) -> float:
    """PyTorch's largest relative error in a case: of a few sets of inputs, since small cases have few elements."""
    self, worst = battery(), 0.0
    for seed in seeds:
        inputs = self.make(case, dtype, seed=seed)
        outputs = self.run_torch(inputs)
        results = [(outputs, self.gradients(outputs, inputs)), self.truth(inputs)]
        worst = max(worst, pooled_error(*({str(name): t for name, t in (*enumerate(o), *g.items())} for o, g in results)))
    return worst


def in_fp64(error: float) -> float:
    """PyTorch's relative error in fp64 from that in fp32, in proportion, for there is no wider truth to measure it against.

    Twice that, since what stands for the truth errs as much.
    """
    return 2 * error * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def differentiable(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}


def widened(value: Any) -> Any:
    """The value in fp64 if it is a floating tensor, as a leaf of its own."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def headed(head: str) -> Callable[[str], str]:
    """``msg`` of ``torch.testing``: the text under a head of its own."""
    return lambda text: f"{head}: {text}"
