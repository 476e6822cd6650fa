"""Bytes of the tensors that are alive while code runs.

`LiveMemory` counts them. `Simulation` runs code as if on a CPU, with fake floating-point tensors
(``FakeTensorMode``), which have a shape and no data: a training step of any size takes seconds and
next to no memory, and makes and frees the same tensors as the real one.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

LARGEST_REAL = 2**24  # elements; larger tensors, such as attention masks, are fake whatever their dtype
DEVICE_OF = torch.ops.prim.device.default
GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default  # of a mixture of experts
NUMBER_OF = torch.ops.aten._local_scalar_dense.default


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block, until they are freed.

    Not seen: what an operation frees within itself, and what the allocator keeps or rounds up.

    Attributes:
        kind_of: names the kind of a new tensor.
        live: kind -> bytes alive now.
        peak: the most bytes that were alive together.
        at_peak: kind -> bytes alive at the peak.
    """

    def __init__(self, kind_of: Callable[[Tensor], str] = lambda tensor: "") -> None:
        super().__init__()
        self.kind_of = kind_of
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.peak = 0
        self._total = 0
        self._known: dict[int, weakref.ref] = {}

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count ``tensors``, not even when an operation returns one or a view of one."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            self._known[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _: weakref.ref) -> None:
        self._known.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is DEVICE_OF:  # no operation, and called too often to go the long way
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        output = self._run(func, args, kwargs or {})
        for value in (output,) if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(value, Tensor):
                self._count(value)
        return output

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        return func(*args, **kwargs)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, kind = storage.nbytes(), self.kind_of(tensor)

        def freed(_: weakref.ref) -> None:
            self._total -= size
            self.live[kind] -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self._total += size
        self.live[kind] += size
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, self.live.copy()


class Simulation(LiveMemory):
    """`LiveMemory` in which floating-point tensors have shapes and no data.

    Token ids, positions and what follows from them stay real, since shapes depend on them (which
    rows are supervised). The code reads 0 for a number of a fake tensor, and compares 0.

        simulation = Simulation()
        simulation.take_over(model)  # a model on the meta device
        with simulation:
            model(input_ids=ids, labels=ids).loss.backward()
        simulation.peak
    """

    def __init__(self, kind_of: Callable[[Tensor], str] = lambda tensor: "") -> None:
        super().__init__(kind_of)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Simulation:
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def take_over(self, model: nn.Module) -> None:
        """Replace parameters, buffers and gradients of ``model`` by uncounted fake CPU tensors."""
        made: dict[int, Tensor] = {}  # shared parameters stay shared

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    if tensor.requires_grad:
                        empty.grad = torch.empty_like(empty)
                made[id(tensor)] = empty
            return made[id(tensor)]

        with self._fake:
            for module in model.modules():
                for own in (module._parameters, module._buffers):
                    own.update({name: fake(tensor) for name, tensor in own.items() if tensor is not None})
        self.leave_out(made.values())
        self.leave_out(tensor.grad for tensor in made.values() if tensor.grad is not None)

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        leaves = args if any(isinstance(value, FakeTensor) for value in args) else tree_leaves((args, kwargs))
        if any(isinstance(value, FakeTensor) for value in leaves):
            return self._run_fake(func, args, kwargs)
        if not any(isinstance(value, torch.Generator) for value in leaves):
            try:
                output = func(*args, **kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                output = None
            if isinstance(output, Tensor):
                is_of_numbers = output.is_floating_point() and not any(isinstance(value, Tensor) for value in leaves)
                if is_of_numbers or output.numel() > LARGEST_REAL:
                    return output
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _run_fake(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is NUMBER_OF:
            with unset_fake_temporarily():
                return _zero(args[0]).item()
        if func is GROUPED_PRODUCT and (dtype := args[0].dtype) != torch.bfloat16:
            # On a CPU torch 2.13 computes it in other dtypes too, but its fake version
            # (torch/_meta_registrations.py, _meta_grouped_mm_common) takes bfloat16 alone.
            return func(
                *(a.bfloat16() if isinstance(a, Tensor) and a.dtype == dtype else a for a in args), **kwargs
            ).to(dtype)
        output = func(*args, **kwargs)
        if isinstance(output, Tensor) and output.dtype == torch.bool and output.numel() == 1:
            fakes = [value for value in tree_leaves((args, kwargs)) if isinstance(value, FakeTensor)]
            if all(value.numel() == 1 for value in fakes):
                with unset_fake_temporarily():
                    return func(*tree_map_only(FakeTensor, _zero, args), **tree_map_only(FakeTensor, _zero, kwargs))
        return output


def _zero(tensor: FakeTensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)
