"""Counts that are the same on every machine: operators, host reads, evaluations of the field, live tensor memory."""
# mypy: allow-untyped-calls
# torch's dispatch modes carry no annotations.

from __future__ import annotations

import gc
import importlib
import importlib.util
import pkgutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nesterov_triton import ops
from nesterov_triton.stepping.scratch import SHELF

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# These copy to Python without an operator on a CPU, so the dispatcher alone would miss them.
_SILENT_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


def _is_free(func: Any) -> bool:
    """Whether an operator moves no data."""
    # It calls itself a view, but stands for a tensor filled from Python numbers.
    if func.overloadpacket is _aten.lift_fresh:
        return False
    return bool(func.is_view) or func.overloadpacket in _ALLOCATIONS or func.overloadpacket is _aten._unsafe_view


class MarkedField(nn.Module):
    """A field that counts its calls and lets a running `OperatorCount` set its operators aside.

    Args:
        field: any `field(t, h)`; arguments and result are handed through unchanged.
    """

    def __init__(self, field: Callable[..., Tensor]) -> None:
        super().__init__()
        self.field = field
        self.calls = 0
        self.running = False

    def forward(self, *args: Tensor) -> Tensor:
        self.calls += 1
        self.running = True
        try:
            return self.field(*args)
        finally:
            self.running = False


class OperatorCount(TorchDispatchMode):
    """Counts the Aten operators that run inside a `with` block, below autograd, views and bare allocations left out.

    Attributes:
        solver: operators outside the field, by name.
        field: operators inside the forward of `marked`, by name.
        views: views and allocations outside the field, by name.
        host_reads: how often a value outside the field went to Python (`item`, `bool`, `tolist`, `numpy`,
            and operators whose result Python decides upon); on a GPU each one waits for the device.
        moved: bytes that the operators of `solver` read and write, every argument and every result once.
    """

    def __init__(self, marked: MarkedField | None = None) -> None:
        super().__init__()
        self._marked = marked
        self._silent_reads = _SilentReads(self)
        self.solver: Counter[str] = Counter()
        self.field: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.host_reads = 0
        self.moved = 0

    @property
    def in_field(self) -> bool:
        return self._marked is not None and self._marked.running

    def __enter__(self) -> OperatorCount:
        super().__enter__()
        self._silent_reads.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._silent_reads.__exit__(*exc)
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _READS.intersection(func.tags):
            self.host_reads += not self.in_field
        else:
            counter = self.field if self.in_field else self.views if _is_free(func) else self.solver
            counter[str(func)] += 1
            if counter is self.solver:
                result = func(*args, **(kwargs or {}))
                self.moved += _bytes_moved(func, args, kwargs or {}, result)
                return result
        return func(*args, **(kwargs or {}))


def _bytes_moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    # What is written only is among the results, too: `out=` and the target of a copy.
    read = args[1:] if func.overloadpacket is _aten.copy_ else args
    inputs = _tensors((read, [value for name, value in kwargs.items() if not name.startswith("out")]))
    return sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *_tensors((result,))))


class _SilentReads(TorchFunctionMode):
    def __init__(self, count: OperatorCount) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SILENT_READS:
            self._count.host_reads += not self._count.in_field
        return func(*args, **(kwargs or {}))


class LaunchCount:
    """Counts the package's Triton launches inside a `with` block, by kernel; interpreted ones too.

    Attributes:
        launches: by operator and kernel.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self._patched: list[tuple[Any, Any]] = []

    @property
    def total(self) -> int:
        return sum(self.launches.values())

    def __enter__(self) -> LaunchCount:
        for found in pkgutil.iter_modules(ops.__path__):
            if found.ispkg and importlib.util.find_spec(f"{ops.__name__}.{found.name}.kernel"):
                module: Any = importlib.import_module(f"{ops.__name__}.{found.name}.kernel")
                if hasattr(module, "start"):
                    self._patched.append((module, module.start))
                    module.start = self._counting(found.name, module.start)
        return self

    def __exit__(self, *exc: Any) -> None:
        while self._patched:
            module, start = self._patched.pop()
            module.start = start

    def _counting(self, name: str, start: Callable[..., None]) -> Callable[..., None]:
        def counted(kernel: Any, *args: Any, **kwargs: Any) -> None:
            self.launches[f"{name} {getattr(kernel, '__name__', kernel)}"] += 1
            with _disable_current_modes():  # triton's interpreter is itself written in torch
                start(kernel, *args, **kwargs)

        return counted


@dataclass(frozen=True)
class PerStep:
    """A count split as `setup + accepted * (accepted steps) + rejected * (rejected steps)`.

    `residual` is the largest misfit over the solves it was found from: 0 says that the split is exact.
    """

    setup: float
    accepted: float
    rejected: float
    residual: float


def per_step(counts: Sequence[tuple[int, int, float]]) -> PerStep:
    """Split what was counted in several solves of different length, so that the set-up cancels.

    Args:
        counts: one `(accepted steps, rejected steps, count)` per solve; at least two numbers of accepted steps.
            Where no solve rejected a step, `rejected` is found as 0.

    Raises:
        ValueError: all solves took the same number of accepted steps.
    """
    if len({accepted for accepted, _, _ in counts}) < 2:
        raise ValueError("counts: at least two solves with different numbers of accepted steps are needed")
    table = torch.tensor(counts, dtype=torch.float64)
    design = torch.cat([torch.ones(len(counts), 1, dtype=torch.float64), table[:, :2]], dim=1)
    # gelsd: the smallest solution where the solves do not tell rejected steps from set-up.
    split = torch.linalg.lstsq(design, table[:, 2:], driver="gelsd").solution
    residual = float((design @ split - table[:, 2:]).abs().max())
    setup, accepted, rejected = (round(float(value), 9) + 0.0 for value in split[:, 0])  # + 0.0: no "-0"
    return PerStep(setup, accepted, rejected, residual)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in an operator's arguments or results: single, or in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif not isinstance(value, str) and isinstance(value, Iterable):
            yield from _tensors(value)


class LiveMemory(TorchDispatchMode):
    """Follows the bytes of tensor storage that are alive, for storages first made inside the `with` block.

    Every result of an operator, forward and backward, is followed by a weak reference to its storage: all the allocator
    hands out, but for scratch space inside a single operator (over a solve and its backward pass the peak is within
    2e-4 of that of torch.profiler's allocation events). Storages that existed before (parameters, inputs) are left out.
    The cyclic collector is off inside the block: tensors held by a reference cycle count as what they are, held.

    Attributes:
        live: bytes alive now. peak: the most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._older: set[int] = set()
        self._collect = False

    def __enter__(self) -> LiveMemory:
        SHELF.clear()  # what solves before have left would not be counted
        gc.collect()
        self._collect = gc.isenabled()
        gc.disable()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if self._collect:
            gc.enable()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is not _aten.lift_fresh:  # its argument is the new tensor
            for tensor in _tensors((args, kwargs.values())):
                self._watch(tensor.untyped_storage(), older=True)
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            self._watch(tensor.untyped_storage(), older=False)
        self.peak = max(self.peak, self.live)
        return result

    def _watch(self, storage: torch.UntypedStorage, older: bool) -> None:
        key = storage._cdata
        if key in self._older:
            return
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key).atexit = False
            if older:
                self._older.add(key)
                return
        # An operator may have resized a storage that is known.
        self.live += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self._older.discard(key)
        self.live -= self._sizes.pop(key, 0)
