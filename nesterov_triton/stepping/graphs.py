"""Device loops that are kept and, on CUDA devices, captured as graphs.

A graph replays launches with the addresses they were captured with and sees no Python. So before every solve the field
is called once and watched: what operators it calls, with which numbers, on which memory beside its arguments
(`signature`). Only a loop that was captured with the very same is used; parameters that were replaced, another mode, a
tensor that a closure has bound anew lead to another one.

A loop is captured when it is wanted for the second time, or at once where `loop="graph"` asks for it. The first solve
by a graph is made twice, by calls and by replays: what does not give the same is not used.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nesterov_triton.network import Network

SIZE = 16  # loops kept: one for each shape, forward and backward
SEEN = 512  # keys remembered, most of them without a loop
R = TypeVar("R")


class Looping(Protocol):
    """What can be kept and captured: a device loop, or a device sweep.

    Attributes:
        parts: the functions that it calls again and again, by name; a captured one is put in its place.
        used: the names of those that have been called.
    """

    parts: dict[str, Callable[[], None]]
    used: set[str]

    def release(self) -> None:
        """Hold nothing of the solve that is over."""


@dataclass
class Entry:
    """What is known about one key.

    Attributes:
        loop: made when it is first wanted.
        uses: how often it was.
        captured: whether its parts are graphs that have been found to give the same.
        reason: why it must not be used; empty while it may.
    """

    loop: Any = None
    uses: int = 0
    captured: bool = False
    reason: str = ""
    busy: bool = False


class Loops:
    """Loops by key, the least recently used dropped, and those of fields that are gone.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._watched: dict[int, Any] = {}
        self._lock = threading.RLock()

    def clear(self) -> None:
        """Drop them all, and their memory."""
        with self._lock:
            self._entries.clear()

    def get(self, key: tuple[Hashable, ...], owner: Any) -> Entry:
        """The entry of a key whose first part is `identity(owner)`."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = Entry()
                self._watch(owner)
                if len(self._entries) > SEEN:
                    self._entries.popitem(last=False)
            self._entries.move_to_end(key)
            return entry

    def keep(self, entry: Entry, make: Callable[[], Any]) -> None:
        """Make the entry's loop if it has none, and drop the oldest ones beyond the size."""
        if entry.loop is None:
            entry.loop = make()
            with self._lock:
                old = [key for key, other in self._entries.items() if other.loop is not None and not other.busy]
                for key in old[: self.count - self.size]:
                    del self._entries[key]

    @property
    def count(self) -> int:
        """How many loops there are."""
        return sum(entry.loop is not None for entry in self._entries.values())

    def _watch(self, owner: Any) -> None:
        owner = getattr(owner, "__self__", owner)  # a bound method goes as soon as nobody looks
        token = id(owner)
        if token in self._watched:
            return
        with contextlib.suppress(TypeError):  # what cannot be watched lasts until it is the oldest
            self._watched[token] = weakref.ref(owner, lambda _: self._forget(token))

    def _forget(self, token: int) -> None:
        with self._lock:
            self._watched.pop(token, None)
            for key in [key for key in self._entries if key[0][0] == token]:  # type: ignore[index]
                del self._entries[key]

    @contextlib.contextmanager
    def borrow(self, entry: Entry) -> Iterator[bool]:
        """Use an entry's loop; false where it is in use: by another thread, or by the solve that this one is inside."""
        with self._lock:
            free = not entry.busy
            entry.busy = entry.busy or free
        try:
            yield free
        finally:
            if free:
                if entry.loop is not None:
                    entry.loop.release()
                entry.busy = False


LOOPS = Loops()


def identity(field: Callable[..., Any]) -> tuple[int, int]:
    """Of a field, for keys: also of a bound method, which is a new object at every look."""
    return id(getattr(field, "__self__", field)), id(getattr(field, "__func__", field))


# -- what a field does ----------------------------------------------------------------------------------------------


@dataclass
class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operator call."""

    given: Sequence[Tensor]
    calls: list[Hashable] = field(default_factory=list)
    reason: str = ""

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {x.untyped_storage().data_ptr(): i for i, x in enumerate(self.given)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        self.calls.append((str(func), *(self._leaf(x) for x in leaves)))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reason = self.reason or "the field reads a value of a tensor (.item(), a condition, a conversion)"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and self._place(value) not in self._known:
                self.reason = self.reason or f"the field changes a tensor of its own ({func})"
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._known.setdefault(self._place(x), len(self._known))
        return result

    def _leaf(self, x: Any) -> Hashable:
        if isinstance(x, Tensor):
            known = self._known.get(self._place(x))
            where = x.untyped_storage().data_ptr() if known is None else -1 - known
            return where, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad
        return x if isinstance(x, int | float | bool | str | type(None)) else str(x)

    def _place(self, x: Tensor) -> int:
        return x.untyped_storage().data_ptr()


def signature(network: Network, t: Tensor, *features: Tensor) -> tuple[Hashable, str]:
    """What one call of the field does, to compare, and why it cannot be captured, if anything says so.

    The call is checked and counted as any other, and its count taken back.
    """
    watch = _Watch((t, *features))
    before = network.evaluations
    with watch:
        network(t, *features)
    if before:
        network.evaluations = before
    return tuple(watch.calls), watch.reason


def own_tensors(field: Callable[..., Any]) -> Hashable:
    """Where the field's parameters and buffers lie, and which of them need gradients."""
    if not isinstance(field, nn.Module):
        return ()
    return tuple((x.data_ptr(), x.requires_grad) for x in (*field.parameters(), *field.buffers()))


# -- graphs ------------------------------------------------------------------------------------------------------------


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """The function's launches as a graph, to be replayed on the current stream. It must have run before.

    Raises:
        RuntimeError: it does what cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those that load data, may go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two solves have given the same, but for what sums in another order may change."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return False
            continue
        eps = {torch.float64: 1e-9, torch.float32: 1e-3}.get(x.dtype, 3e-2)
        size = float(x.abs().max()) if x.numel() else 0.0
        if not torch.allclose(x, y, rtol=eps, atol=eps * size, equal_nan=True):
            return False
    return True


_warned: set[str] = set()


def warn_once(reason: str) -> None:
    """Say why the eager loop runs though a graph was wanted; once for each reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"the eager loop runs instead of a graph: {reason}", RuntimeWarning, stacklevel=2)


def by_graph(entry: Entry, solve: Callable[[], R], results: Callable[[R], Sequence[Tensor]]) -> R:
    """`solve()` by the entry's loop, by replays if they can be had. Where none can, the entry says why.

    Args:
        solve: may be called twice, for the same.
        results: what is to be compared of what it returns.
    """
    if entry.captured:
        return solve()
    called = solve()
    parts = dict(entry.loop.parts)
    try:
        for name in sorted(entry.loop.used):
            entry.loop.parts[name] = captured(parts[name])
        replayed = solve()
        if same(results(called), results(replayed)):
            entry.captured = True
            return replayed
        entry.reason = "what is replayed gives another result than what is called: the field may draw random numbers"
    except RuntimeError as error:
        entry.reason = f"the field cannot be captured: {str(error).strip().splitlines()[0]}"
    entry.loop.parts.update(parts)
    warn_once(entry.reason)
    return called
