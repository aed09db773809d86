"""Device loops that are kept and, on CUDA devices, captured as graphs.

A graph replays launches with the addresses they were captured with and sees no Python. So in every solve the field is
called once and watched: what operators it calls, with which numbers, on which memory beside its arguments
(`signature`). Only a loop that was captured with the very same counts; parameters that were replaced, another mode, a
tensor that a closure has bound anew lead to another one. That takes the host 0.7 ms, with a vector-Jacobian product
2.2 ms (batch 256, a network of two layers, H200), as long as the device needs for such a solve. So the graph that was
used last is launched at once, and the field looked at meanwhile, on another stream; if it does something else, what was
launched is forgotten. It has written to memory of the loop alone, and all that it reads is kept (`Entry.outside`).

The first solve by a graph is made twice, by calls and by replays: what does not give the same is not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nesterov_triton.network import Evaluation, Network
from nesterov_triton.status import SolveError

SIZE = 16  # loops kept: one for each shape, forward and backward
SEEN = 512  # keys remembered, most of them without a loop
PATIENCE = 1.0  # seconds that a thread waits for another one's look or capture
R = TypeVar("R")


class Looping(Protocol):
    """What can be kept and captured: a device loop, or a device sweep.

    Attributes:
        replays: what is called in the place of a part, by the part's name.
        used: the names of the parts that have been called.
        meanwhile: called once in a solve, when all that can be launched is.
    """

    replays: dict[str, Callable[[], None]]
    used: set[str]
    meanwhile: Callable[[], None] | None

    def part(self, name: str) -> Callable[[], None]:
        """The part itself."""

    def release(self) -> None:
        """Hold nothing of the solve that is over."""


@dataclass
class Entry:
    """What is known about one key.

    Attributes:
        loop: made when it is first wanted.
        uses: how often it was.
        reason: why it must not be used; empty while it may.
        busy: whether somebody uses the loop.
        dropped: whether it is nobody's any more but the one's who uses it.
        stream, done: where it is used, or was last, on a CUDA device, and the end of that use.
        pool: the memory of its graphs. They are replayed one after the other and hand each other nothing in it, so one
            will do for all: cuBLAS alone wants 32 MiB in each pool (H200).
        seen: the digest of what the field does that it is for.
        outside: memory that the field reads and that is neither given nor its own; kept, or a replay that is in vain
            might read where nothing is any more.
    """

    loop: Any = None
    uses: int = 0
    reason: str = ""
    busy: bool = False
    dropped: bool = False
    stream: Any = None
    done: Any = None
    pool: Any = None
    seen: str = ""
    outside: tuple[torch.UntypedStorage, ...] = ()

    def refuse(self, reason: str) -> None:
        """Never again, and no memory for it."""
        self.reason = reason
        self.let_go()

    def let_go(self) -> None:
        """Free the loop's memory, once the device is done with it: attempts under way would still write to it, to
        pinned memory too, and nobody else waits for them."""
        if self.loop is not None and self.stream is not None:
            (self.stream if self.busy or self.done is None else self.done).synchronize()
        self.loop, self.pool, self.outside = None, None, ()


class Loops:
    """Loops by key, the least recently used dropped, and those of fields that are gone.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._last: dict[Hashable, Hashable] = {}
        self._watched: dict[int, Any] = {}
        self._gone: deque[int] = deque()  # filled at any moment at all, by the garbage collector
        self._lock = threading.RLock()

    def clear(self) -> None:
        """Drop them all, and their memory."""
        with self._lock:
            for key in list(self._entries):
                self._drop(key)
            self._last.clear()

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.dropped = True
            if not entry.busy:  # else whoever uses it lets it go
                entry.let_go()

    @property
    def count(self) -> int:
        """How many loops there are."""
        with self._lock:
            self._purge()
            return sum(entry.loop is not None for entry in list(self._entries.values()))

    def get(self, key: tuple[Hashable, ...], owner: Any) -> Entry:
        """The entry of a key whose first part is `identity(owner)`."""
        with self._lock:
            self._purge()
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = Entry()
                self._watch(owner)
                if len(self._entries) > SEEN:
                    self._drop(next(iter(self._entries)))
            self._entries.move_to_end(key)
            return entry

    def last(self, key: tuple[Hashable, ...]) -> Entry | None:
        """The entry that was confirmed last for what is known without a look at the field, while it has a loop."""
        with self._lock:
            self._purge()
            full = self._last.get(key)
            entry = None if full is None else self._entries.get(full)
            if entry is None or entry.loop is None:
                self._last.pop(key, None)
                return None
            self._entries.move_to_end(full)
            return entry

    def confirm(self, key: tuple[Hashable, ...], full: tuple[Hashable, ...]) -> None:
        """The entry of `full` is the one to try for `key`."""
        with self._lock:
            self._last[key] = full

    def keep(self, entry: Entry, make: Callable[[], Any]) -> None:
        """Make the entry's loop if it has none, and drop the oldest ones beyond the size."""
        if entry.loop is not None:
            return
        # Its memory outlives this solve: a mode of today must not be in it.
        with torch.inference_mode(False), torch.no_grad():
            entry.loop = make()
        with self._lock:
            idle = [key for key, other in list(self._entries.items()) if other.loop is not None and not other.busy]
            for key in idle[: max(0, self.count - self.size)]:
                self._drop(key)

    def _watch(self, owner: Any) -> None:
        owner = getattr(owner, "__self__", owner)  # a bound method goes as soon as nobody looks
        token, gone = id(owner), self._gone
        if token not in self._watched:
            with contextlib.suppress(TypeError):  # what cannot be watched lasts until it is the oldest
                self._watched[token] = weakref.ref(owner, lambda _: gone.append(token))

    def _purge(self) -> None:
        while self._gone:
            token = self._gone.popleft()
            self._watched.pop(token, None)
            for key in [key for key in list(self._entries) if key[0][0] == token]:  # type: ignore[index]
                self._drop(key)
            for key in [key for key in self._last if key[0][0] == token]:  # type: ignore[index]
                del self._last[key]

    @contextlib.contextmanager
    def borrow(self, entry: Entry, stream: Any) -> Iterator[bool]:
        """Use an entry's loop; false where it is in use: by another thread, or by the solve that this one is inside.

        On a CUDA device, on the current `stream`, whichever that is: it waits for the one before.
        """
        with self._lock:
            free = not entry.busy
            entry.busy = entry.busy or free
        if not free:
            yield False
            return
        try:
            if entry.done is not None and stream != entry.stream:
                stream.wait_event(entry.done)
            entry.stream = stream
            yield True
        finally:
            try:
                self._give_back(entry)
            finally:
                with self._lock:  # whatever has failed: or nobody would ever use it again
                    entry.busy = False
                    if entry.dropped:
                        entry.let_go()

    def _give_back(self, entry: Entry) -> None:
        if entry.loop is None:
            return
        entry.loop.release()
        if entry.stream is not None:
            entry.done = entry.done or torch.cuda.Event()  # type: ignore[no-untyped-call]
            entry.done.record(entry.stream)


LOOPS = Loops()


def identity(field: Callable[..., Any]) -> tuple[int, int]:
    """Of a field, for keys: also of a bound method, which is a new object at every look."""
    return id(getattr(field, "__self__", field)), id(getattr(field, "__func__", field))


# -- what a field does -------------------------------------------------------------------------------------------------


class Unfit(Exception):
    """The field does what cannot be captured; raised before it has done it."""


class Later(Exception):
    """Not now, for another thread is at it; nothing is known of the field."""


@contextlib.contextmanager
def _alone(lock: Any, doing: str) -> Iterator[None]:
    """Under the lock, or not at all: who holds it may wait for autograd's thread, and that one for the lock.

    Raises:
        Later: somebody else has had it for too long.
    """
    if not lock.acquire(timeout=PATIENCE):
        raise Later(f"another thread {doing}")
    try:
        yield
    finally:
        lock.release()


_UNFIT = {
    torch.Tag.data_dependent_output: "reads a value of a tensor (.item(), a condition, a conversion)",
    torch.Tag.dynamic_output_shape: "makes tensors whose shape depends on values",
    torch.Tag.nondeterministic_seeded: "draws random numbers",
}
_LOOKING = threading.RLock()


@dataclass(frozen=True)
class Signature:
    """What one call of a field does: its digest, and the memory it reads beside its arguments."""

    digest: str
    outside: tuple[torch.UntypedStorage, ...] = dataclasses.field(default=(), compare=False)


class _Watch(TorchDispatchMode):
    """Writes down every operator call, on what is given and on anything else."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Hashable] = []
        self.outside: dict[int, torch.UntypedStorage] = {}
        self._device = given[0].device
        self._known = {x.untyped_storage().data_ptr(): i for i, x in enumerate(given)}
        self._made = len(given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = sorted(kwargs)
        leaves = _leaves((*args, *(kwargs[name] for name in names)))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._check(func, args, kwargs, tensors)
        self.calls.append((str(func), len(args), *names, *(self._leaf(x) for x in leaves)))
        result = func(*args, **kwargs)
        made = [x for x in _leaves((result,)) if isinstance(x, Tensor)]
        devices = {x.device for x in made}
        if any(devices - {x.device} and (x.ndim or x.device.type != "cpu") for x in tensors):
            raise Unfit("the field moves tensors between devices")
        # What is not an argument's is new, also where something lay that is gone: memory is used again as it happens.
        places = {x.untyped_storage().data_ptr() for x in tensors}
        for place in (x.untyped_storage().data_ptr() for x in made if x.layout == torch.strided):
            if place not in places:
                places.add(place)
                self._known[place] = self._made
                self._made += 1
        return result

    def _check(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        unfit, written = _properties(func)
        if unfit:
            indices = [i for x in args[1:2] if isinstance(x, list | tuple) for i in x if isinstance(i, Tensor)]
            plain = func is torch.ops.aten.index.Tensor and all(i.dtype == torch.int64 for i in indices)
            if not plain:
                raise Unfit(f"the field {unfit}: {func}")
        if any(type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided for x in tensors):
            raise Unfit("the field uses tensors that are not plain memory (sparse ones, or a subclass)")
        for k, name in written:
            value = args[k] if k < len(args) else kwargs.get(name)
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self._known:
                raise Unfit(f"the field changes a tensor of its own: {func}")

    def _leaf(self, x: Any) -> Hashable:
        if not isinstance(x, Tensor):
            return x if isinstance(x, int | float | bool | str | type(None)) else str(x)
        storage = x.untyped_storage()
        place = storage.data_ptr()
        known = self._known.get(place)
        where: Any = place if known is None else -1 - known
        if known is None:
            self.outside[place] = storage
            if x.device != self._device and x.ndim == 0:  # goes into a launch by value
                where = x.item()
        return where, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype, str(x.device), x.requires_grad


def _leaves(values: Iterable[Any]) -> list[Any]:
    """What an operator is given or gives, lists opened, each behind its length; a third of the time of torch's own,
    which open anything."""
    found: list[Any] = []
    for x in values:
        if isinstance(x, list | tuple):
            found.append(f"list of {len(x)}")
            found += _leaves(x)
        else:
            found.append(x)
    return found


@functools.cache
def _properties(func: Any) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Of an operator: why it cannot be captured, if it cannot; places and names of the arguments that it writes to."""
    unfit = next((what for tag, what in _UNFIT.items() if tag in func.tags), "")
    infos = [(argument.name, argument.alias_info) for argument in func._schema.arguments]
    return unfit, tuple((k, name) for k, (name, info) in enumerate(infos) if info is not None and info.is_write)


def signature(
    network: Network,
    t: Tensor,
    *features: Tensor,
    params: Sequence[Tensor] | None = None,
    check: Callable[[Evaluation, Sequence[Tensor]], None] | None = None,
) -> Signature:
    """What one call of the field does, in a form to compare; with `params`, its vector-Jacobian product too, of what
    `check` has seen.

    The call is checked as any other and not counted. A compiled field runs as it was before it was compiled: while
    calls are watched torch.compile would give the field up for good, so it is told to stand back.

    Raises:
        Unfit: it does what cannot be captured.
        Later: another thread looks at its field.
    """
    watch = _Watch((t, *features))
    before, network.remember, remember = network.evaluations, False, network.remember  # a copy would be seen as its own
    try:
        with _alone(_LOOKING, "looks at its field"), torch.compiler.set_stance("force_eager"), watch:
            if params is None:
                network(t, *features)
            else:
                evaluation = network.taped(t, *features)
                if check is not None:
                    check(evaluation, params)
                evaluation.pullback(torch.ones_like(evaluation.u).reshape(-1), tuple(params))
    finally:
        network.evaluations, network.remember = before, remember
    return Signature(hashlib.sha256(repr(watch.calls).encode()).hexdigest(), tuple(watch.outside.values()))


def own_tensors(field: Callable[..., Any]) -> tuple[tuple[int, bool], ...]:
    """Where the field's parameters and buffers lie, and which of them need gradients."""
    if not isinstance(field, nn.Module):
        return ()
    return tuple((x.data_ptr(), x.requires_grad) for x in (*field.parameters(), *field.buffers()))


def not_own(storages: Iterable[torch.UntypedStorage], field: Callable[..., Any]) -> tuple[torch.UntypedStorage, ...]:
    """Those that hold neither parameters nor buffers of the field."""
    own = set()
    if isinstance(field, nn.Module):
        own = {x.untyped_storage().data_ptr() for x in (*field.parameters(), *field.buffers())}
    return tuple(x for x in storages if x.data_ptr() not in own)


def switches() -> Hashable:
    """What else decides which kernels are launched."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        *_precisions(),
        # Of those some are younger than the oldest torch there may be.
        *(getattr(cuda.matmul, name, None) for name in _REDUCTIONS),
        cuda.preferred_blas_library(),
        *(getattr(cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math", "cudnn")),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )


_REDUCTIONS = (
    "allow_fp16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction_split_k",
    "allow_bf16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction_split_k",
    "allow_fp16_accumulation",
)  # fmt: skip


def _precisions() -> tuple[Hashable, ...]:
    """Of float32 arithmetic. The old switches, such as `allow_tf32`, set these too, and raise when they are asked once
    somebody has set one of these."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if not hasattr(matmul, "fp32_precision"):
        return torch.get_float32_matmul_precision(), matmul.allow_tf32, cudnn.allow_tf32
    return matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision  # type: ignore[attr-defined]


# -- graphs ------------------------------------------------------------------------------------------------------------


def captures(device: torch.device) -> bool:
    """Whether there are graphs on the device; elsewhere attempts are called one by one."""
    return device.type == "cuda"


_CAPTURING = threading.RLock()
_STREAMS = threading.local()  # of each thread: another one's look at its field must not get into a capture
_FAILED: list[Any] = []  # graphs whose capture failed: torch's allocator of pinned memory asks them from then on
Use = Literal["look", "capture"]


def _stream(device: torch.device, use: Use) -> Any:
    """This thread's stream on the device for that, beside the current one. A look has one of its own: cuBLAS has a
    workspace for each stream, and a graph may have kept that of the stream it was captured on."""
    known: dict[Any, Any] = _STREAMS.__dict__
    if (device, use) not in known:
        known[device, use] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return known[device, use]


@contextlib.contextmanager
def aside(device: torch.device, use: Use, ready: Any = None) -> Iterator[None]:
    """On a CUDA device what is launched within goes to another stream: after all that was launched before it, or,
    with an event, after that alone. What is launched later comes after it: memory that it reads may be freed then."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device, use)
    if ready is None:
        stream.wait_stream(torch.cuda.current_stream(device))
    else:
        stream.wait_event(ready)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


def captured(function: Callable[[], None], device: torch.device, entry: Entry) -> Callable[[], None]:
    """The function's launches as a graph, to be replayed on the current stream. It must have run before, `aside` for a
    capture: autograd goes back on the streams that it went forward on.

    Not by `torch.cuda.graph`, which leaves stream, allocator and generator as they are in a capture when one fails.

    Args:
        entry: whose it is; has the pool.

    Raises:
        RuntimeError: it does what cannot be captured, or somebody else did while it was.
        Later: another thread captures.
    """
    graph = torch.cuda.CUDAGraph()
    with _alone(_CAPTURING, "captures"), torch.cuda.device(device):
        torch.cuda.synchronize()
        _clear_workspaces()
        pool = entry.pool = entry.pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.stream(_stream(device, "capture")), _uncollected():
                try:
                    # Other threads, such as those that load data, may go on meanwhile.
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    function()
                    graph.capture_end()
                except BaseException:
                    entry.pool = None  # a pool whose graphs are all gone cannot be used again
                    _abandon(graph, device, pool)
                    raise
        finally:
            _clear_workspaces()
        torch.cuda.synchronize()
    return graph.replay


def _clear_workspaces() -> None:
    """Let cuBLAS make its workspaces anew: those that a graph uses in the graph's own pool, and nobody else those.

    Torch keeps one for each handle and stream. Without this a graph has the address of one that was there before, and
    that goes with the next graph of the same stream that is destroyed (pytorch issue 193402). As
    `torch._inductor.cudagraph_trees` does.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: what it frees may synchronise, or belong to another graph, and either ends a
    capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _abandon(graph: Any, device: torch.device, pool: Any) -> None:
    """Out of a capture that has failed, as far as there is a way.

    Where `capture_end` raises, `CUDAGraph` neither stops the allocators' redirection to the pool nor ever gives up its
    claim to it. For memory of the device that can be made up for, as `torch.cuda.use_mem_pool` ends. Pinned memory's
    goes on, by a function that reads the graph: so the graph stays.
    """
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
        return  # nothing had gone wrong but the function itself
    _FAILED.append(graph)
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)  # raises where there is no redirection, nor a claim
        torch._C._cuda_releasePool(device.index, pool)
    with contextlib.suppress(RuntimeError):
        _settle(device)


def _settle(device: torch.device) -> None:
    """A capture that fails leaves the device's generator of random numbers in it, which then refuses to draw any; the
    end of one that does not fail takes it out."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    torch.zeros(1, device=device)
    graph.capture_end()


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two solves have given the same, but for what sums in another order may change."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        eps = {torch.float64: 1e-10, torch.float32: 1e-4}.get(x.dtype, 1e-2)
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


class Stale(Exception):
    """The field does something else than the graph that was launched."""

    def __init__(self, seen: Signature) -> None:
        super().__init__()
        self.seen = seen


def by_graph(
    entry: Entry,
    device: torch.device,
    solve: Callable[[], R],
    results: Callable[[R], Sequence[Tensor]],
    check: Callable[[], None] | None = None,
) -> R | None:
    """`solve()` by replays of the entry's loop. None where they cannot be had, and then the entry says why. It may be
    None, or raise, after `solve` has been called.

    Args:
        solve: may be called twice, for the same.
        results: what is to be compared of what it returns.
        check: called once, as soon as the device has something to do.

    Raises:
        Later: another thread captures.
    """
    loop: Looping = entry.loop
    if loop.replays or check is not None:
        found = _beside(loop, solve, check)
        if loop.used <= loop.replays.keys():
            return found
    with aside(device, "capture"):
        called = solve()
    before, reason = dict(loop.replays), "the field cannot be captured"
    try:
        for name in sorted(loop.used - loop.replays.keys()):
            loop.replays[name] = _captured_in_two(loop.part(name), device, entry)
        replayed = solve()
        if same(results(called), results(replayed)):
            reason = ""
            return replayed
        reason = "what is replayed gives another result than what is called"
    except (SolveError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        reason = f"the field cannot be captured: {str(error).strip().splitlines()[0]}"
    finally:
        if reason:
            loop.replays, entry.pool = before, None
    entry.refuse(reason)
    return None


def _captured_in_two(part: Callable[[], None], device: torch.device, entry: Entry) -> Callable[[], None]:
    """As `captured`, in two tries: what another thread does may end one, and has nothing to do with the field."""
    with contextlib.suppress(RuntimeError):
        return captured(part, device, entry)
    return captured(part, device, entry)


def _beside(loop: Looping, solve: Callable[[], R], check: Callable[[], None] | None) -> R:
    """`solve()`, and `check()` while the device is at it."""
    if check is None:
        return solve()
    left = [check]

    def once() -> None:
        if left:
            left.pop()()

    loop.meanwhile = once
    try:
        found = solve()
    finally:
        loop.meanwhile = None
    once()
    return found
